"""A process nobody can look into. What it changes cannot be undone, so each test has a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kms.host import hardening

ROOT = Path(__file__).parent.parent
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")


def _run(script: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=30,
    ).stdout.strip()


def test_the_core_limit_is_0_and_cannot_be_raised() -> None:
    script = (
        "import resource\nfrom kms.host.hardening import *\nforbid_dumps()\nprint(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert _run(script) == "(0, 0)"


@on_linux
def test_the_process_is_not_dumpable() -> None:
    script = (
        "import ctypes\nfrom kms.host.hardening import *\nforbid_dumps()\nprint(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    assert _run(script) == "0"


@on_linux
def test_a_system_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def prctl(self, *arguments: int) -> int:
            return -1

    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(hardening, "LIBC", Refusing())
    with pytest.raises(OSError, match="PR_SET_DUMPABLE"):
        hardening.forbid_dumps()


@on_linux
def test_memory_is_locked_exactly_when_it_says_so() -> None:
    script = (
        "from kms.host.hardening import *\nlocked = lock_memory()\n"
        "status = open('/proc/self/status').read()\n"
        "print(locked, int(status.split('VmLck:')[1].split()[0]) > 0)"
    )
    assert _run(script) in ("True True", "False False")


def test_memory_is_not_locked_under_a_finite_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, 1 << 16))
    monkeypatch.setattr(hardening, "_may_exceed_limits", lambda: False)
    assert not hardening.lock_memory()


@on_linux
@pytest.mark.parametrize(
    ("status", "expected"),
    [("CapEff:\t0000000000004000\n", True), ("CapEff:\t0000000000000000\n", False), ("Name:\tx\n", False)],
)
def test_the_limit_is_lifted_for_who_has_the_capability(
    status: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_text(status, encoding="ascii")
    monkeypatch.setattr(hardening, "Path", lambda _: tmp_path / "status")
    assert hardening._may_exceed_limits() is expected


def test_where_the_capability_cannot_be_read_the_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "Path", lambda _: tmp_path / "absent")
    assert not hardening._may_exceed_limits()


def test_a_variable_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_TEST", "hunter2")
    assert hardening.take_environment("MINIKMS_TEST") == bytearray(b"hunter2")
    assert "MINIKMS_TEST" not in os.environ
    assert hardening.take_environment("MINIKMS_TEST") is None


def test_a_variable_that_is_set_to_nothing_is_not_one_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_TEST", "")
    assert hardening.take_environment("MINIKMS_TEST") == bytearray()


@on_linux
def test_a_variable_that_was_taken_cannot_be_read_from_proc() -> None:
    script = (
        "from kms.host.hardening import *\ntaken = take_environment('MINIKMS_TEST')\n"
        "print(bytes(taken).decode(), b'hunter2' in open('/proc/self/environ', 'rb').read())"
    )
    assert _run(script, MINIKMS_TEST="hunter2") == "hunter2 False"


@on_linux
def test_the_interpreters_copy_of_a_variable_that_was_taken_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_TEST", "hunter2")
    copy = os.environb[b"MINIKMS_TEST"]
    hardening.take_environment("MINIKMS_TEST")
    assert copy == bytes(7)


@on_linux
def test_a_variable_of_one_byte_does_not_take_that_byte_from_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_TEST", "x")
    assert hardening.take_environment("MINIKMS_TEST") == bytearray(b"x")
    assert ord(bytes([120])) == 120


HOARD = """
from kms.host import hardening

def rss():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

def hoard():
    # As two hundred connections do whose frames grow by what each read brings, while small things come and go.
    frames, kept = [bytearray() for _ in range(200)], []
    for _ in range(15):
        for frame in frames:
            frame += bytes(1 << 16)
            kept.append(bytes(1000))
    return kept[::100]

{prepare}
small = [hoard()]
before = rss()
for _ in range(3):
    small.append(hoard())
print((rss() - before) >> 20)
"""


@on_linux
def test_memory_that_was_needed_once_is_given_back() -> None:
    assert int(_run(HOARD.format(prepare="hardening.give_memory_back()"))) <= 5
