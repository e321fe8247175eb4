"""Every command that prints, with standard streams that fail: all of it is out, or the exit code and one line say so.

A disk that is full, a limit for files, a descriptor that is closed, one that does not block and takes a piece at a time,
an error at each write and at the close: each with the interpreter's own buffer and without (PYTHONUNBUFFERED). And no file
that a command opens gets the number of a standard stream that was closed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kms_tests.faults import strace
from kms_tests.integration.processes import DEADLINE, PASSPHRASE, Machine, Server

_BIG: Final = 600_000
_KEPT: Final = "--keystore kept.json --audit-log kept.log"
COMMANDS: Final = {
    "health": "kms-client health",
    "a data key": "kms-client generate-data-key",
    "a data key as JSON": "kms-client --json generate-data-key",
    "encrypt": "kms-client encrypt --text hello",
    "encrypt as JSON": "kms-client encrypt --text hello --json",
    "encrypt a large one": "kms-client encrypt --in big",
    "decrypt": "kms-client decrypt --in big.ct",
    "decrypt as JSON": "kms-client decrypt --in big.ct --json",
    "decrypt to a path": "kms-client decrypt --in big.ct --out /dev/stdout",
    "encrypt-file": "kms-client encrypt-file --in big --out -",
    "decrypt-file": "kms-client decrypt-file --in big.mke --out -",
    "decrypt-file to a path": "kms-client decrypt-file --in big.mke --out /dev/fd/1",
    "reencrypt": "kms-client reencrypt --in big.mke --out - --key default",
    "what was written, as JSON": "kms-client decrypt --in big.ct --out there --json",
    "list-keys": "kms-admin list-keys",
    "list-keys with versions": "kms-admin list-keys --usage",
    "list-keys as JSON": "kms-admin list-keys --json",
    "describe-key": "kms-admin describe-key default",
    "rotate-key": "kms-admin rotate-key turning",
    "enable-version": "kms-admin enable-version turning --version v1",
    "disable-version": "kms-admin disable-version turning --version v1",
    "destroy-version": "kms-admin destroy-version spent --version v1 --yes",
    "create-key": "kms-admin create-key turning-$(date +%s%N)",
    "status": "kms-admin status",
    "status as JSON": "kms-admin status --json",
    "reload": "kms-admin reload",
    "change-passphrase": f"MINIKMS_NEW_PASSPHRASE='{PASSPHRASE}' kms-admin change-passphrase {_KEPT}",
    "init": "rm -rf new; XDG_DATA_HOME=$PWD/new kms-admin init",
    "new-token": "kms-admin new-token billing",
    "new-token into a file": "rm -f t; kms-admin new-token billing --out t",
    "explain": "kms-admin explain --principal p --operation Encrypt default --principals principals.toml",
    "verify-audit": f"kms-admin verify-audit {_KEPT}",
    "the help of a program": "kms-admin --help",
    "the help of a command": "kms-client encrypt -h",
    "the version": "kms-server --version",
    "the help of the server": "kms-server --help",
    "completion": "_KMS_CLIENT_COMPLETE=bash_source kms-client",
}
"""Each prints something, and can be run again and again."""
REPEATABLE: Final = re.compile(r"decrypt|list-keys|help|-h|version$|health|explain|verify|COMPLETE")
"""Of those whose output is the same each time."""

every_command = pytest.mark.parametrize("command", list(COMMANDS.values()), ids=list(COMMANDS))
with_and_without_buffer = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


@pytest.fixture(scope="module")
def place(template: Path) -> Iterator[tuple[Machine, Server]]:
    """A server, and files for each command to read."""
    machine = Machine(template)
    try:
        machine.file(
            "principals.toml",
            b'[principals.p]\ntoken_sha256 = ["'
            + b"0" * 64
            + b'"]\n\n[[principals.p.allow]]\noperations = ["Encrypt"]\ngroups = ["default"]\n',
        ).chmod(0o600)
        _keep_audit_log(machine)
        server = machine.start()
        machine.file("big", os.urandom(_BIG))
        for line in (
            "kms-client encrypt --in big --out big.ct",
            "kms-client encrypt-file --in big --out big.mke",
            "kms-admin create-key turning && kms-admin rotate-key turning && kms-admin disable-version turning --version 1",
            "kms-admin create-key spent && kms-admin rotate-key spent && kms-admin destroy-version spent --version 1 --yes",
            "for n in $(seq 40); do kms-admin create-key a-group-with-a-name-that-is-rather-long-$n; done",
        ):
            done = run(machine, server, line)
            assert done.returncode == 0, done.stderr
        yield machine, server
    finally:
        machine.dispose()


def _keep_audit_log(machine: Machine) -> None:
    log, keystore = machine.root / "kept.log", machine.root / "kept.json"
    keystore.write_bytes(machine.keystore.read_bytes())
    keystore.chmod(0o600)
    server = machine.start("--audit-log", str(log), "--keystore", str(keystore))
    assert server.client("health").status == 0
    assert server.stop() == 0


def run(
    machine: Machine, server: Server, line: str, unbuffered: str = "", **options: object
) -> subprocess.CompletedProcess[bytes]:
    environment = machine.environment | {"PATH": machine.path(), "MINIKMS_UNIX_SOCKET": str(server.socket)}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = unbuffered
    environment["MINIKMS_PASSPHRASE"] = PASSPHRASE
    streams: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        ["sh", "-c", line], cwd=machine.root, env=environment, timeout=DEADLINE, check=False, **(streams | options)
    )


def is_told(done: subprocess.CompletedProcess[bytes], what: bytes) -> None:
    assert done.returncode == 74, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith(b"token_sha256")]
    assert len(lines) == 1, done.stderr
    assert re.match(rb"kms-\w+: error: .*" + what, lines[0]), lines


@every_command
@with_and_without_buffer
def test_a_full_disk_behind_standard_output_is_told(place: tuple[Machine, Server], command: str, unbuffered: str) -> None:
    is_told(run(*place, f"({command}) > /dev/full", unbuffered), b"No space left on device")


@every_command
@with_and_without_buffer
def test_a_closed_standard_output_is_told(place: tuple[Machine, Server], command: str, unbuffered: str) -> None:
    is_told(run(*place, f"({command}) >&-", unbuffered), b"Bad file descriptor")


@every_command
@with_and_without_buffer
def test_a_limit_for_files_is_told(place: tuple[Machine, Server], command: str, unbuffered: str) -> None:
    # In blocks of 512 bytes: none at all for what is short, some for what is long.
    blocks = 100 if "big" in command and "--out there" not in command else 0
    if re.search(r"there| init|--out t|change-passphrase", command):
        pytest.skip("its files are over the limit before it has anything to print")
    is_told(
        run(*place, f"trap '' XFSZ; : > limited; ulimit -f {blocks}; ({command}) > limited", unbuffered), b"File too large"
    )


@every_command
@with_and_without_buffer
def test_a_pipe_that_takes_a_piece_at_a_time_and_does_not_block_gets_all(
    place: tuple[Machine, Server], command: str, unbuffered: str
) -> None:
    usual = run(*place, command, unbuffered)
    assert usual.returncode == 0, usual.stderr
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    pieces: list[bytes] = []

    def read() -> None:
        while piece := os.read(reader, 1000):
            pieces.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        done = run(*place, command, unbuffered, stdout=writer)
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)
    assert (done.returncode, done.stderr.count(b"error")) == (0, 0), done.stderr
    got = b"".join(pieces)
    if REPEATABLE.search(command):
        assert got == usual.stdout
    else:
        # Each is encrypted anew; what is of a fixed form has its length again. Where it tells a time, or
        # whether it was done already, the number of lines is all that is the same.
        may_differ = re.search(r"turning|describe|status", command)
        assert len(got) == len(usual.stdout) or (may_differ and got.count(b"\n") == usual.stdout.count(b"\n"))


@every_command
def test_a_reader_that_went_away_is_no_error_to_talk_about(place: tuple[Machine, Server], command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*place, command, stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert b"error" not in done.stderr


@every_command
def test_no_standard_stream_at_all_costs_the_result_and_nothing_else(place: tuple[Machine, Server], command: str) -> None:
    keystore = place[0].keystore.read_bytes()
    done = run(*place, f"({command}) <&- >&- 2>&-; echo $?")
    assert done.stdout == b"74\n"
    assert done.stderr == b""
    if "turning" not in command:
        assert place[0].keystore.read_bytes() == keystore


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
@every_command
def test_streams_that_a_command_does_not_need_may_be_closed(
    place: tuple[Machine, Server], command: str, closed: str
) -> None:
    done = run(*place, f"({command}) {closed}")
    if command == COMMANDS["new-token"] and "2>&-" in closed:
        # What it says there is needed: nobody is let in by a token whose digest is lost.
        assert (done.returncode, done.stdout) == (74, b"")
    else:
        assert done.returncode == 0
        assert done.stdout


@every_command
def test_no_file_of_ours_gets_the_number_of_a_standard_stream(
    place: tuple[Machine, Server], command: str, tmp_path: Path
) -> None:
    strace.require(attach=False)
    log = tmp_path / "calls"
    traced = f"strace -f -qq -o {shlex.quote(str(log))} -e trace=openat,socket,dup,accept4,pipe2 -e signal=none"
    line = re.sub(r"(?<![\w/.-])kms-(client|admin|server)(?= |$)", rf"{traced} \g<0>", command)
    run(*place, f"({line}) <&- >&- 2>&-")
    calls = log.read_text().splitlines()
    # Before that the interpreter reads its own modules, and holds none of them open.
    occupied = max(number for number, call in enumerate(calls) if "O_PATH" in call and call.endswith("= 2"))
    assert not [call for call in calls[occupied + 1 :] if re.search(r"= [012]$", call) and "pipe2" not in call]


@pytest.mark.parametrize(
    "fault", ["write:error=EIO:when=1", "write:error=ENOSPC:when=1", "write:error=EDQUOT:when=1", "close:error=EIO:when=1"]
)
@every_command
def test_an_error_of_the_disk_is_told_at_a_write_and_at_the_close(
    place: tuple[Machine, Server], command: str, fault: str, tmp_path: Path
) -> None:
    strace.require(attach=False)
    printed = tmp_path / "printed"
    traced = f"strace -f -qq -o /dev/null -P {printed} -e trace=write,close -e inject={fault} -e signal=none"
    line = re.sub(r"(?<![\w/.-])kms-(client|admin|server)(?= |$)", rf"{traced} \g<0>", command)
    done = run(*place, f"({line}) > {printed}")
    is_told(done, b"(Input/output error|No space left|Disk quota)")
