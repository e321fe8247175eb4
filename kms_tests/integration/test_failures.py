"""What can go wrong around a command, and that it says so in one line and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, UNPRIVILEGED, Machine, Server, eventually

BEFORE = b"what was there before"
SMALL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
"""
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
"""A shell starts its background jobs with SIGINT ignored, and so may whatever runs these tests."""


@pytest.fixture
def output(machine: Machine) -> Iterator[Path]:
    """An existing output file, which must be as it was when the test ends, with no temp file beside it."""
    path = machine.file("output", BEFORE)
    yield path
    assert path.read_bytes() == BEFORE
    assert not machine.temp_files()


def test_a_token_file_that_others_may_read_is_refused_with_the_chmod_that_mends_it(machine: Machine) -> None:
    token = machine.data / "api.token"
    token.chmod(0o644)
    refused = machine.refused_start()
    assert refused.status == 77
    assert f"chmod 600 {token}" in refused.said_one_line("kms-server")
    refused = machine.client("--unix", str(machine.socket), "--token-file", str(token), "health")
    assert refused.status == 77
    assert f"chmod 600 {token}" in refused.said_one_line("kms-client")


def test_a_token_file_that_cannot_be_read_is_refused(machine: Machine) -> None:
    token = machine.file("unreadable.token", b"x" * 43)
    token.chmod(0)
    refused = machine.client("--unix", str(machine.socket), "--token-file", str(token), "health", prologue=UNPRIVILEGED)
    assert refused.status == 77, refused.stderr
    assert f"chmod 600 {token}" in refused.said_one_line("kms-client")


def test_an_input_that_cannot_be_read_is_refused(machine: Machine, server: Server, output: Path) -> None:
    plain = machine.file("plain", b"content")
    plain.chmod(0)
    for command in ("encrypt-file", "encrypt"):
        refused = server.client(command, "--in", str(plain), "--out", str(output), prologue=UNPRIVILEGED)
        assert refused.status == 74, refused.stderr
        assert str(plain) in refused.said_one_line("kms-client")


def test_a_token_that_is_not_the_servers_is_refused(machine: Machine, server: Server) -> None:
    token = machine.file("wrong.token", b"not the token\n")
    token.chmod(0o600)
    refused = server.client("--token-file", str(token), "health")
    assert refused.status == 77
    assert "not the token" not in refused.said_one_line("kms-client")
    assert server.admin("--admin-token-file", str(machine.data / "api.token"), "list-keys").status == 77


def test_a_keystore_that_a_server_holds_is_refused_with_the_servers_pid(machine: Machine, server: Server) -> None:
    before = machine.keystore.read_bytes()
    refused = machine.admin(
        "change-passphrase", "--keystore", str(machine.keystore), environment={"MINIKMS_NEW_PASSPHRASE": "x"}
    )
    assert refused.status == 75
    assert str(server.pid) in refused.said_one_line("kms-admin")
    assert machine.keystore.read_bytes() == before


@pytest.mark.parametrize("form", ["mke1", "mke2"])
def test_a_container_that_was_cut_short_never_opens(machine: Machine, server: Server, output: Path, form: str) -> None:
    sealed = machine.root / "sealed"
    plain = machine.file("plain", os.urandom(100_000))
    made = server.client("encrypt-file", "--in", str(plain), "--out", str(sealed), "--format", form)
    assert made.status == 0
    whole = sealed.read_bytes()
    header = 8 + int.from_bytes(whole[4:8], "big") if form == "mke1" else 7 + int.from_bytes(whole[5:7], "big") + 64
    expected = {0: 65, 3: 65, 7: 65, header - 1: 65, header: 1, header + 20: 1, header + 40: 1, len(whole) - 1: 1}
    for length, status in expected.items():
        cut = machine.file("cut", whole[:length])
        refused = server.client("decrypt-file", "--in", str(cut), "--out", str(output))
        assert (length, refused.status) == (length, status), refused.stderr
        refused.said_one_line("kms-client")


def test_a_pipe_gets_an_authentic_beginning_of_a_file_that_was_cut_off_and_is_told(
    machine: Machine, server: Server
) -> None:
    content = os.urandom(200_000)
    plain, sealed = machine.file("plain", content), machine.root / "sealed"
    assert server.client("encrypt-file", "--in", str(plain), "--out", str(sealed)).status == 0
    cut = machine.file("cut", sealed.read_bytes()[:-20])
    told = server.client("decrypt-file", "--in", str(cut), "--out", "-")
    assert told.status == 65
    assert told.stdout == content[: 3 * 65_536]
    said = told.said_one_line("kms-client")
    assert "decryption failed after 196608 bytes, which are authentic; the rest is damaged or cut off" in said


def test_a_container_that_was_altered_never_opens(machine: Machine, server: Server, output: Path) -> None:
    sealed = machine.root / "sealed"
    plain = machine.file("plain", b"some content")
    assert server.client("encrypt-file", "--in", str(plain), "--out", str(sealed)).status == 0
    whole = bytearray(sealed.read_bytes())
    for position in (20, len(whole) - 20, len(whole) - 1):
        whole[position] ^= 1
        altered = machine.file("altered", bytes(whole))
        whole[position] ^= 1
        refused = server.client("decrypt-file", "--in", str(altered), "--out", str(output))
        assert refused.status == 1
        assert "decryption failed" in refused.said_one_line("kms-client")


@pytest.mark.parametrize("command", [["encrypt-file"], ["decrypt-file"], ["reencrypt", "--key", "default"]])
def test_a_directory_in_the_place_of_a_file_is_refused(
    machine: Machine, server: Server, output: Path, command: list[str]
) -> None:
    refused = server.client(*command, "--in", str(machine.root), "--out", str(output))
    assert refused.status == 65
    assert str(machine.root) in refused.said_one_line("kms-client")
    plain = machine.file("plain", b"MKE1")
    refused = server.client(*command, "--in", str(plain), "--out", str(machine.root))
    assert refused.status == 65
    refused.said_one_line("kms-client")


@pytest.mark.parametrize("command", ["encrypt-file", "decrypt-file", "decrypt", "encrypt"])
def test_an_input_that_does_not_exist_is_refused(machine: Machine, server: Server, output: Path, command: str) -> None:
    refused = server.client(command, "--in", str(machine.root / "absent"), "--out", str(output))
    assert refused.status == 66
    assert "absent" in refused.said_one_line("kms-client")


def test_an_input_that_is_no_container_is_refused(machine: Machine, server: Server, output: Path) -> None:
    plain = machine.file("plain", b"just some text, of which no container is made")
    for command in (["decrypt-file"], ["reencrypt", "--key", "default"]):
        refused = server.client(*command, "--in", str(plain), "--out", str(output))
        assert refused.status == 65
        refused.said_one_line("kms-client")


def test_an_output_that_the_disk_has_no_room_for_is_not_made(machine: Machine, server: Server, output: Path) -> None:
    plain = machine.file("plain", bytes(4 << 20))
    sealed = machine.root / "sealed"
    assert server.client("encrypt-file", "--in", str(plain), "--out", str(sealed)).status == 0
    for target in (output, machine.root / "new"):
        for command, source in (("encrypt-file", plain), ("decrypt-file", sealed)):
            failed = server.client(command, "--in", str(source), "--out", str(target), prologue=SMALL_DISK)
            assert failed.status == 74
            assert str(target) in failed.said_one_line("kms-client")
    assert not (machine.root / "new").exists()


def test_a_full_disk_behind_standard_output_is_told(machine: Machine, server: Server) -> None:
    plain = machine.file("plain", bytes(1 << 20))
    with Path("/dev/full").open("wb") as full:
        failed = server.client("encrypt-file", "--in", str(plain), "--out", "-", stdout=full)
    assert failed.status == 74
    failed.said_one_line("kms-client")


def _has_begun_its_output(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has a file open that has no name yet, or its temporary one."""
    links = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return any("/#" in link or "/.kms-" in link for link in links)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_encryption_leaves_nothing_behind(
    machine: Machine, server: Server, number: signal.Signals, status: int
) -> None:
    target = machine.root / "sealed"

    process = machine.popen(
        "client", "--unix", str(server.socket), "encrypt-file", "--in", "-", "--out", str(target), prologue=INTERRUPTIBLE
    )
    with process:
        try:
            assert process.stdin is not None
            process.stdin.write(bytes(100_000))
            process.stdin.flush()
            eventually("the encryption waits for more", lambda: _waits_for_input(process))
            assert _has_begun_its_output(process)
            process.send_signal(number)
            assert process.wait(DEADLINE) == status
            assert process.stderr is not None
            said = process.stderr.read().decode()
        except BaseException:
            process.kill()
            raise
    assert "Traceback" not in said
    assert said.count("\n") == 1
    assert said.startswith("kms-client: ")
    assert not target.exists()
    assert not machine.temp_files()


def test_a_signal_is_not_lost_between_two_reads_of_a_pipe(machine: Machine, server: Server) -> None:
    # A read of the pipe that begins just after the signal came must not sleep on it; it does not happen each time.
    for attempt in range(12):
        arguments = ("--unix", str(server.socket), "encrypt-file", "--in", "-", "--out", str(machine.root / "sealed"))
        with machine.popen("client", *arguments, prologue=INTERRUPTIBLE) as process:
            try:
                assert process.stdin is not None
                process.stdin.write(bytes(100_000))
                process.stdin.flush()
                eventually("the encryption is under way", lambda: _has_begun_its_output(process))
                process.send_signal(signal.SIGINT)
                assert process.wait(5) == 130, f"attempt {attempt}"
            finally:
                process.kill()


def test_standard_input_that_does_not_block_is_read_to_its_end(machine: Machine, server: Server) -> None:
    # Whoever shares the other end of an open pipe or terminal can have made it so (O_NONBLOCK is the file's, not ours).
    read, write = os.pipe()
    os.set_blocking(read, False)
    sealed, back = machine.root / "sealed", machine.root / "back"
    with open(read, "rb") as source, open(write, "wb", buffering=0) as pipe:  # noqa: PTH123 (descriptors)
        process = machine.popen(
            "client", "--unix", str(server.socket), "encrypt-file", "--in", "-", "--out", str(sealed), stdin=source
        )
        with process:
            pipe.write(b"the beginning, ")
            eventually("it has read that and waits, or has ended", lambda: _has_read(pipe.fileno(), process))
            with contextlib.suppress(BrokenPipeError):
                pipe.write(b"and the end")
            pipe.close()
            assert process.wait(DEADLINE) == 0
    assert server.client("decrypt-file", "--in", str(sealed), "--out", str(back)).status == 0
    assert back.read_bytes() == b"the beginning, and the end"


def _waits_for_input(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has read all there is in its standard input, and sleeps; or has ended."""
    assert process.stdin is not None
    return _has_read(process.stdin.fileno(), process)


def _has_read(pipe: int, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        return True
    unread = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    state = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    return unread == bytes(4) and state in "SZ"


def test_a_server_that_is_not_there_is_told(machine: Machine, output: Path) -> None:
    plain = machine.file("plain", b"content")
    for address in (["--unix", str(machine.root / "no.sock")], ["--tcp", "127.0.0.1:1"]):
        for command in (["health"], ["encrypt-file", "--in", str(plain), "--out", str(output)]):
            failed = machine.client(*address, *command)
            assert failed.status == 69
            assert address[1] in failed.said_one_line("kms-client")
        failed = machine.admin(*address, "list-keys")
        assert failed.status == 69
        failed.said_one_line("kms-admin")


def test_a_server_that_dies_during_a_command_is_told(machine: Machine, server: Server, output: Path) -> None:
    with machine.popen(
        "client", "--unix", str(server.socket), "encrypt", "--in", "-", "--out", str(output), stderr=subprocess.PIPE
    ) as process:
        server.kill()
        _, stderr = process.communicate(b"content", timeout=DEADLINE)
    assert process.returncode == 69
    assert stderr.decode().startswith("kms-client: ")


@pytest.mark.parametrize("program", ["client", "admin", "server"])
@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["no-such-command"]])
def test_bad_usage_is_told_in_one_line(bare: Machine, program: str, arguments: list[str]) -> None:
    refused = bare.run(program, *arguments)
    assert refused.status == 64
    refused.said_one_line(f"kms-{program}")


def test_a_refusal_of_the_server_is_told_with_its_reason(server: Server) -> None:
    refused = server.admin("disable-version", "--key", "default", "--version", "1")
    assert refused.status == 1
    assert "rotate" in refused.said_one_line("kms-admin")
    refused = server.admin("create-key", "--key", "no spaces")
    assert refused.status == 1
    refused.said_one_line("kms-admin")
    refused = server.admin("rotate-key", "--key", "absent")
    assert refused.status == 1
    refused.said_one_line("kms-admin")


def test_init_never_touches_what_is_there(machine: Machine) -> None:
    before = {path: path.read_bytes() for path in machine.data.iterdir() if path.is_file()}
    assert machine.admin("init").status != 0
    assert {path: path.read_bytes() for path in before} == before


def test_destruction_is_not_done_without_a_yes(server: Server) -> None:
    assert server.admin("rotate-key", "--key", "default").status == 0
    refused = server.admin("destroy-version", "--key", "default", "--version", "1")
    assert refused.status == 64
    assert "--yes" in refused.said_one_line("kms-admin")
    assert server.groups() == {"default": {1: "ENABLED", 2: "ACTIVE"}}
