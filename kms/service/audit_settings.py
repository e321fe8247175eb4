"""What is asked of the audit log. Imports nothing that takes time: the command lines read it, too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class DataAudit(StrEnum):
    """What is recorded of the data plane. The control plane is, always."""

    ALL = "all"
    REFUSED = "refused"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """Whether, where and how the audit log is kept."""

    path: Path
    data: DataAudit
    is_off: bool
    is_always_kept: bool
    """Else one is kept when there are principals."""
    accept_rollback: bool
    """Whether to start on a keystore that is older than its audit log."""

    def keeps(self, *, has_principals: bool) -> bool:
        """Whether an audit log is kept, given whether there is a file of principals."""
        return not self.is_off and (self.is_always_kept or has_principals)
