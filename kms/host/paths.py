"""Where files are that nobody named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kms.errors import ConfigError


def data_directory(environ: Mapping[str, str]) -> Path:
    """Where keystore, tokens and socket live unless told otherwise; raises `ConfigError` where nothing says it.

    Ask only for what is needed: a service in a container may have no home directory, and every file named.
    """
    base = Path(environ.get("XDG_DATA_HOME", ""))
    # A relative one is to be ignored (XDG Base Directory Specification): it would be another in each directory.
    if base.is_absolute():
        return base / "mini-kms"
    home = Path(environ.get("HOME", ""))
    if home.is_absolute():
        return home / ".mini-kms"
    try:
        return Path.home() / ".mini-kms"
    except RuntimeError:  # what `Path.home` raises
        raise ConfigError(
            "this user has no home directory to look for files in; set XDG_DATA_HOME to a directory, or name each file"
        ) from None
