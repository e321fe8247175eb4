"""Where files are that nobody named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def data_directory(environ: Mapping[str, str]) -> Path:
    """Where keystore, tokens and socket live unless told otherwise."""
    base = environ.get("XDG_DATA_HOME")
    if base:
        return Path(base) / "mini-kms"
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".mini-kms"
