"""What the memory of a running server holds, and what is left in it.

- The passphrase: nothing once the keystore is unlocked, however it was given.
- The root key: nothing; only its sub-keys live on.
- A live KEK: at most three copies, those of one OpenSSL context. A destroyed one: none, at once.
- After the wipe at the end of the server: no key at all.
- A token: nothing, until a request shows it.
- All of it is locked, out of reach of swap, where the limit allows; and the log says whether it is.

A token is compared by its digest and not kept, but each request that shows one leaves it in freed memory until that is
used again, since CPython's `str` cannot be wiped. How often is not promised, and not tested.
"""

from __future__ import annotations

import base64
import os
import pty
import re
import secrets
import select
import signal
from pathlib import Path

import pytest

from kms_tests import java_keystore
from kms_tests.integration.processes import DEADLINE, Machine, Server
from kms_tests.secrets.memory import Launcher, copies, end, pieces, stopping_at_its_end, true_keys, wait_until_stopped

LENGTHS = (28, 200, 3000)
"""Bytes of a passphrase: small blocks, large blocks, and what the allocators of Python and C hand out differently."""
MOST_COPIES = 3
KEY_NAMES = ("root key", "wrapping key", "check key", "MAC key", "journal's MAC key")

KEEPS_A_COPY = """
import sys
from kms.server import daemon
unlock = daemon._unlock
def keep(config, lock, passphrase, *rest):
    global copy
    copy = bytes(passphrase.view())
    return unlock(config, lock, passphrase, *rest)
daemon._unlock = keep
from kms.cli.server import main
sys.exit(main())
"""
KEEPS_THE_ROOT_KEY = """
import sys
from kms.storage import root_keys
class Keeping(root_keys.RootKeys):
    def __init__(self, root):
        super().__init__(root)
        global copy
        copy = bytes(root.view())
root_keys.RootKeys = Keeping
from kms.storage import file
file.RootKeys = Keeping
from kms.cli.server import main
sys.exit(main())
"""
DOES_NOT_WIPE = """
from kms.service.service import Service
from kms.storage.file import Keystore
Service._wipe = lambda service: globals().update(kept_service=service)
Keystore.wipe = lambda keystore: globals().update(kept_keystore=keystore)
"""

MAY_NOT_LOCK = """
import ctypes, resource
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) == 0
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
"""


def typed(master: int, *answers: str) -> None:
    """Answer each question at the terminal with a line."""
    for answer in answers:
        seen = b""
        while not seen.rstrip(b" ").endswith(b":"):
            assert select.select([master], [], [], DEADLINE)[0], f"no question came, only {seen!r}"
            seen += os.read(master, 1024)
        os.write(master, answer.encode() + b"\n")


@pytest.fixture
def passphrase(request: pytest.FixtureRequest) -> str:
    length: int = request.param
    return secrets.token_urlsafe(length)[:length]


def machine_with(bare: Machine, passphrase: str) -> Machine:
    made = bare.admin("init", environment={"MINIKMS_PASSPHRASE": passphrase})
    assert made.status == 0, made.stderr
    return bare


def passphrase_file(machine: Machine, passphrase: str) -> Path:
    path = machine.file("passphrase", passphrase.encode() + b"\n")
    path.chmod(0o600)
    return path


def assert_no_trace(server: Server, passphrase: str) -> None:
    root = true_keys(server.machine.keystore, passphrase)["root key"]
    found = copies(server.pid, {"passphrase": passphrase.encode(), "root key": root})
    assert found == {"passphrase": 0, "root key": 0}


@pytest.mark.parametrize("passphrase", LENGTHS, indirect=True)
def test_a_passphrase_from_the_environment_leaves_no_trace(bare: Machine, passphrase: str) -> None:
    server = machine_with(bare, passphrase).start(environment={"MINIKMS_PASSPHRASE": passphrase})
    assert_no_trace(server, passphrase)
    assert passphrase.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()


@pytest.mark.parametrize("passphrase", LENGTHS, indirect=True)
def test_a_passphrase_from_a_file_leaves_no_trace(bare: Machine, passphrase: str) -> None:
    file = passphrase_file(machine_with(bare, passphrase), passphrase)
    server = bare.start("--passphrase-file", str(file), environment={"MINIKMS_PASSPHRASE": None})
    assert_no_trace(server, passphrase)


@pytest.mark.parametrize("passphrase", [28], indirect=True)
def test_a_typed_passphrase_leaves_no_trace(bare: Machine, passphrase: str) -> None:
    machine_with(bare, passphrase)
    master, terminal = pty.openpty()
    launcher = Launcher(bare, "import sys\nfrom kms.cli.server import main\nsys.exit(main())\n")
    try:
        with launcher.start("--tcp-port=0", environment={"MINIKMS_PASSPHRASE": None}, terminal=terminal) as process:
            typed(master, passphrase)
            assert_no_trace(launcher.server(process), passphrase)
            process.terminate()
            assert process.wait(DEADLINE) == 0
    finally:
        os.close(master)
        os.close(terminal)


@pytest.mark.parametrize("passphrase", [28], indirect=True)
def test_a_first_run_leaves_no_trace_of_the_passphrase(bare: Machine, passphrase: str) -> None:
    tokens = {"MINIKMS_API_TOKEN": secrets.token_hex(), "MINIKMS_ADMIN_TOKEN": secrets.token_hex()}
    environment = {"MINIKMS_PASSPHRASE": passphrase, **tokens}
    assert bare.admin("init", "--keystore-only", environment=environment).status == 0
    assert_no_trace(bare.start(environment=environment), passphrase)


@pytest.mark.parametrize("passphrase", [28], indirect=True)
def test_a_keystore_of_format_2_leaves_no_trace_either(bare: Machine, passphrase: str) -> None:
    salt = secrets.token_bytes(16)
    bare.data.mkdir(mode=0o700)
    bare.keystore.touch(mode=0o600)
    bare.keystore.write_bytes(
        java_keystore.write([java_keystore.Group("default", 1, [java_keystore.Version(1, "ACTIVE")])], passphrase, salt)
    )
    tokens = {"MINIKMS_API_TOKEN": secrets.token_hex(), "MINIKMS_ADMIN_TOKEN": secrets.token_hex()}
    server = bare.start(environment={"MINIKMS_PASSPHRASE": passphrase, **tokens})
    found = copies(server.pid, {"passphrase": passphrase.encode(), "root key": java_keystore.root_key(passphrase, salt)})
    assert found == {"passphrase": 0, "root key": 0}


@pytest.mark.parametrize("passphrase", [28], indirect=True)
@pytest.mark.parametrize(("script", "kept"), [(KEEPS_A_COPY, "passphrase"), (KEEPS_THE_ROOT_KEY, "root key")])
def test_a_server_that_keeps_a_copy_is_caught(bare: Machine, passphrase: str, script: str, kept: str) -> None:
    launcher = Launcher(machine_with(bare, passphrase), script)
    with launcher.start("--tcp-port=0", environment={"MINIKMS_PASSPHRASE": passphrase}) as process:
        launcher.server(process)
        sought = {"passphrase": passphrase.encode(), "root key": true_keys(bare.keystore, passphrase)["root key"]}
        assert copies(process.pid, sought)[kept] > 0


def test_a_piece_that_survives_is_found_wherever_the_rest_was_overwritten() -> None:
    secret = secrets.token_bytes(100)
    for start in range(100 - 23):
        survivor = secret[start : start + 23]
        assert any(piece in survivor for piece in pieces(secret)), start


def work(server: Server) -> None:
    """Every operation that uses a key, and those that change which there are: three groups' worth of versions."""
    api, admin = server.machine.api_token, server.machine.admin_token
    plaintext = base64.b64encode(secrets.token_bytes(100)).decode()
    with server.unix() as wire:
        assert wire.ask(type="CreateKeyGroup", token=admin, keyId="billing")["status"] == "ok"
        for _ in range(3):
            assert wire.ask(type="RotateKeyGroup", token=admin, keyId="default")["status"] == "ok"
            for _ in range(20):
                ciphertext = wire.ask(type="Encrypt", token=api, plaintext=plaintext)["ciphertext"]
                assert wire.ask(type="Decrypt", token=api, ciphertext=ciphertext)["plaintext"] == plaintext
                assert wire.ask(type="ReEncrypt", token=api, ciphertext=ciphertext, keyId="billing")["status"] == "ok"
                assert wire.ask(type="GenerateDataKey", token=api)["status"] == "ok"
        assert wire.ask(type="DisableVersion", token=admin, keyId="default", version=2)["status"] == "ok"


def passphrase_of(machine: Machine) -> str:
    return machine.environment["MINIKMS_PASSPHRASE"]


def test_each_live_kek_is_there_at_most_three_times_and_the_root_key_not_at_all(server: Server) -> None:
    work(server)
    keys = true_keys(server.machine.keystore, passphrase_of(server.machine))
    found = copies(server.pid, keys)
    keks = {name: count for name, count in found.items() if name not in KEY_NAMES}
    assert keks.keys() == {"default 1", "default 2", "default 3", "default 4", "billing 1"}
    assert found["root key"] == 0
    # One at least, or this looks in the wrong place.
    assert all(1 <= count <= MOST_COPIES for count in keks.values()), keks
    assert all(1 <= found[name] <= MOST_COPIES for name in KEY_NAMES[1:]), found


def test_a_destroyed_kek_is_gone_at_once(server: Server) -> None:
    work(server)
    keys = true_keys(server.machine.keystore, passphrase_of(server.machine))
    with server.unix() as wire:
        for version in (1, 2):
            reply = wire.ask(type="DestroyVersion", token=server.machine.admin_token, keyId="default", version=version)
            assert reply["status"] == "ok"
    found = copies(server.pid, keys, dead_frames=False)
    assert found["default 1"] == found["default 2"] == 0
    assert found["default 3"] > 0


def left_at_the_end(machine: Machine, script: str) -> dict[str, int]:
    """The copies of every key in a server that has worked, was stopped, and is about to exit."""
    launcher = Launcher(machine, script)
    with launcher.start("--tcp-port=0") as process:
        work(launcher.server(process))
        keys = true_keys(machine.keystore, passphrase_of(machine))
        process.send_signal(signal.SIGTERM)
        wait_until_stopped(process)
        found = copies(process.pid, keys, dead_frames=False)
        assert end(process) == 0
    return found


def test_after_the_wipe_at_the_end_no_key_is_left(machine: Machine) -> None:
    found = left_at_the_end(machine, stopping_at_its_end("server"))
    assert len(found) > len(KEY_NAMES)
    assert not any(found.values()), found


def test_a_server_that_does_not_wipe_is_caught(machine: Machine) -> None:
    found = left_at_the_end(machine, DOES_NOT_WIPE + stopping_at_its_end("server"))
    assert all(count for name, count in found.items() if name != "root key"), found


def test_changing_the_passphrase_leaves_nothing_of_either(machine: Machine) -> None:
    old, new = passphrase_of(machine), secrets.token_urlsafe(40)
    before = true_keys(machine.keystore, old)
    launcher = Launcher(machine, stopping_at_its_end("admin"))
    with launcher.start("change-passphrase", environment={"MINIKMS_NEW_PASSPHRASE": new}) as process:
        wait_until_stopped(process)
        after = true_keys(machine.keystore, new)
        sought = {"old passphrase": old.encode(), "new passphrase": new.encode(), "the KEK": after.pop("default 1")}
        sought |= {f"old {name}": key for name, key in before.items()} | {f"new {name}": key for name, key in after.items()}
        found = copies(process.pid, sought, dead_frames=False)
        assert end(process) == 0
    assert not any(found.values()), found


@pytest.mark.parametrize("passphrase", [28], indirect=True)
def test_init_leaves_nothing_of_what_was_typed_or_made(bare: Machine, passphrase: str) -> None:
    master, terminal = pty.openpty()
    launcher = Launcher(bare, stopping_at_its_end("admin"))
    try:
        with launcher.start("init", environment={"MINIKMS_PASSPHRASE": None}, terminal=terminal) as process:
            typed(master, passphrase, passphrase)
            wait_until_stopped(process)
            sought = {"passphrase": passphrase.encode(), **true_keys(bare.keystore, passphrase)}
            sought |= {"API token": bare.api_token.encode(), "admin token": bare.admin_token.encode()}
            found = copies(process.pid, sought, dead_frames=False)
            assert end(process) == 0
    finally:
        os.close(master)
        os.close(terminal)
    assert not any(found.values()), found


@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_server_that_was_not_asked_yet_holds_no_token(machine: Machine, source: str) -> None:
    tokens = {"MINIKMS_API_TOKEN": secrets.token_urlsafe(32), "MINIKMS_ADMIN_TOKEN": secrets.token_urlsafe(32)}
    if source == "file":
        tokens = {"MINIKMS_API_TOKEN": machine.api_token, "MINIKMS_ADMIN_TOKEN": machine.admin_token}
    server = machine.start(environment=tokens if source == "environment" else None)
    found = copies(server.pid, {name: token.encode() for name, token in tokens.items()})
    assert not any(found.values()), found


def locked_kib(server: Server) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"^VmLck:\s+(\d+) kB", status, re.MULTILINE)[0])


def test_memory_is_locked_and_the_log_says_so(server: Server) -> None:
    assert "memory is locked" in server.stderr, "these tests need CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK"
    assert locked_kib(server) > 1000


def test_where_memory_may_not_be_locked_the_log_says_that(machine: Machine) -> None:
    server = machine.start(prologue=MAY_NOT_LOCK)
    assert "memory is not locked" in server.stderr
    assert locked_kib(server) == 0
