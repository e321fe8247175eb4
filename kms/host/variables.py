"""Environment variables that switch something on."""

from __future__ import annotations

from collections.abc import Mapping

from kms.errors import ConfigError


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether the variable says yes; raises `ConfigError` where it says neither that nor no."""
    value = environ.get(name, "").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ConfigError(f"{name}: give 1 or 0")
