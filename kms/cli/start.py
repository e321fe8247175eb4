"""Where the three programs begin and end: signals and the standard streams first, before anything else is loaded.

What is imported at the top is all that runs before there is a way to be interrupted without a traceback.
"""

from __future__ import annotations

from kms.cli.signals import leave_on_signals
from kms.host.occupied import occupy

leave_on_signals()
occupy()


def client() -> int:
    """`kms-client`, as a process; returns its exit status."""
    _take_streams()
    from kms.cli.client import main

    return main()


def admin() -> int:
    """`kms-admin`, as a process; returns its exit status."""
    _take_streams()
    from kms.cli.admin import main

    return main()


def server() -> int:
    """`kms-server`, as a process; returns its exit status."""
    _take_streams()
    from kms.cli.server import main

    return main()


def _take_streams() -> None:
    from kms.host import standard

    standard.take()
