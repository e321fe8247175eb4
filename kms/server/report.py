"""How the server is, for who asks: what it says at its start, and what has come up since."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kms.server.listeners import Endpoint
from kms.service.service import Service
from kms.storage.lock import earlier_files
from kms.wire.messages import ServerView


@dataclass(frozen=True, slots=True)
class Report:
    """Called, it tells."""

    service: Service
    keystore: Path
    memory: str
    """The line about it."""
    memory_is_locked: bool
    endpoints: Sequence[Endpoint]
    audit_data: str
    metrics: Callable[[], str]
    """Where they are, or why not; empty when none are wanted."""

    def __call__(self) -> ServerView:
        service, keyring = self.service, self.service.keyring.current
        log = service.keeper.log
        return ServerView(
            listening=[endpoint.address for endpoint in self.endpoints],
            keystore=str(self.keystore),
            generation=keyring.generation,
            key_groups=len(keyring.groups),
            principals=service.access.origin,
            audit_log=None if log is None else str(log.path),
            audit_data=None if log is None else self.audit_data,
            memory_locked=self.memory_is_locked,
            metrics=self.metrics() or None,
            warnings=self._warnings(),
        )

    def _warnings(self) -> list[str]:
        service, metrics = self.service, self.metrics()
        log = service.keeper.log
        warnings = []
        if log is not None and log.trouble:
            warnings.append(f"the audit log cannot be written, and nothing is answered until it can: {log.trouble}")
        if service.usage_trouble:
            warnings.append(f"usage is not saved: {service.usage_trouble}")
        if not self.memory_is_locked:
            warnings.append(self.memory)
        if metrics.startswith("no metrics"):
            warnings.append(metrics)
        kept = [path.name for path in earlier_files(self.keystore) if os.path.lexists(path)]
        if kept:
            warnings.append(
                f"{', '.join(kept)}: of before a migration, with the keys of what was destroyed since; remove it"
            )
        return warnings
