"""What becomes of --out: with real processes, and what a shell does around them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, Machine, Server, eventually, program

SECRET = b"a secret that is long enough to be found"


def shell(machine: Machine, server: Server, line: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", line],
        cwd=machine.root,
        env=machine.environment | {"PATH": machine.path(), "MINIKMS_UNIX_SOCKET": str(server.socket)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.fixture
def sealed(machine: Machine, server: Server) -> Path:
    machine.file("plain", SECRET)
    assert shell(machine, server, "kms-client encrypt --in plain --out ciphertext").returncode == 0
    assert shell(machine, server, "kms-client encrypt-file --in plain --out container").returncode == 0
    return machine.root


@pytest.mark.parametrize("command", ["decrypt --in ciphertext", "decrypt-file --in container"])
@pytest.mark.parametrize("out", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_by_its_name_is_appended_to_and_not_replaced(
    machine: Machine, server: Server, sealed: Path, command: str, out: str
) -> None:
    (sealed / "link").symlink_to("/dev/stdout")
    (sealed / "log").write_bytes(b"before\n")
    inode = (sealed / "log").stat().st_ino
    done = shell(machine, server, f"kms-client {command} --out {out} >> log")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (sealed / "log").read_bytes() == b"before\n" + SECRET
    assert (sealed / "log").stat().st_ino == inode


def test_standard_output_without_a_name_leaves_no_new_file(machine: Machine, server: Server, sealed: Path) -> None:
    before = sorted(sealed.iterdir())
    line = "exec 3>gone; rm gone; kms-client decrypt --in ciphertext --out /dev/stdout >&3; echo $?"
    assert shell(machine, server, line).stdout == b"0\n"
    assert sorted(path for path in sealed.iterdir() if path.name != "bin") == [one for one in before if one.name != "bin"]


def test_a_descriptor_that_the_shell_opened_is_written_to(machine: Machine, server: Server, sealed: Path) -> None:
    done = shell(machine, server, "kms-client decrypt --in ciphertext --out /dev/fd/3 3>three")
    assert done.returncode == 0, done.stderr
    assert (sealed / "three").read_bytes() == SECRET
    done = shell(machine, server, "kms-client decrypt --in ciphertext --out /dev/fd/7")
    assert done.returncode == 65
    assert b"no descriptor that this command was started with" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_that_is_moved_to_another_key_stays_whose_it_is(machine: Machine, server: Server, sealed: Path) -> None:
    for name in ("ciphertext", "container"):
        os.chown(sealed / name, 12345, 54321)
        (sealed / name).chmod(0o640)
        done = shell(machine, server, f"kms-client reencrypt --in {name} --out {name} --key default")
        assert done.returncode == 0, done.stderr
        state = (sealed / name).stat()
        assert (state.st_uid, state.st_gid, state.st_mode & 0o7777) == (12345, 54321, 0o640)


def test_what_is_killed_before_it_has_verified_leaves_nothing(machine: Machine, server: Server) -> None:
    machine.file("plain", SECRET * 200_000)
    assert shell(machine, server, "kms-client encrypt-file --in plain --out container").returncode == 0
    content = (machine.root / "container").read_bytes()
    os.mkfifo(machine.root / "slow")
    out = machine.root / "out"
    out.mkdir()
    process = subprocess.Popen(
        [*program("client"), "--unix", str(server.socket), "decrypt-file", "--in", "slow", "--out", str(out / "f")],
        cwd=machine.root,
        env=machine.environment,
    )
    with (machine.root / "slow").open("wb", buffering=0) as slow:
        slow.write(content[:-100])
        # All but the last hundred bytes is decrypted by then, and written.
        written = Path(f"/proc/{process.pid}/io")
        eventually("it has written most of it", lambda: _written(written) > len(content) // 2)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)
    assert list(out.iterdir()) == []


def _written(io: Path) -> int:
    return next(int(line.split()[1]) for line in io.read_text().splitlines() if line.startswith("wchar"))
