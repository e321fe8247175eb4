"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from kms.core.derive import KdfParameters
from kms_tests.strategies import PROFILE

settings.load_profile(PROFILE)


@pytest.fixture
def tiny() -> KdfParameters:
    """The cheapest Argon2id there is: a derivation costs microseconds instead of a tenth of a second."""
    return KdfParameters(memory_kib=8, iterations=1, parallelism=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty private data directory."""
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    path.chmod(0o700)
    return path


@pytest.fixture
def foreign_uid(monkeypatch: pytest.MonkeyPatch) -> int:
    """From here on this process believes to be a user who owns no file, not even root's: `os.geteuid` answers this."""
    uid = 4242
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return uid
