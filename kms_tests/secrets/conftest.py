"""What the tests here need of the machine; they fail, and do not skip, where it is missing."""

from __future__ import annotations

import os
import shutil
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def _needs() -> None:
    assert sys.platform == "linux", "these tests look into /proc, and need Linux"
    assert os.geteuid() == 0, "these tests read the memory of a process that forbids it, and need root"
    missing = [tool for tool in ("strace", "systemd-analyze") if shutil.which(tool) is None]
    assert not missing, f"not installed here: {', '.join(missing)} (apt-get install strace systemd)"
