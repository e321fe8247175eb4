"""What is known of this package once it is installed."""

from __future__ import annotations


def version() -> str:
    """The version that is installed, or a remark that none is."""
    # Here, since it takes 45 ms, and few commands ask.
    from importlib import metadata

    try:
        return metadata.version("mini-kms")
    except metadata.PackageNotFoundError:
        return "(run from its source)"
