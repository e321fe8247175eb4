"""Look for secrets in the memory of another process, as root may.

What is looked for is not the whole secret but pieces of 16 bytes that overlap: an allocator that gets a block back
writes its own pointers over the start, and the rest would escape a search for the whole. The true keys are derived
here anew, from the passphrase and the keystore, and never asked of the process that is looked into.

Below a thread's stack pointer lies what calls that have returned left there: OpenSSL's spilled registers, for one. No
program in Python can reach that, and the next calls write over it; so it can be left out of the count.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final
from uuid import UUID

from kms.core import derive
from kms.core.keyring import KeySlot
from kms.core.secret import Secret
from kms.core.specs import AES_256
from kms.storage import format4
from kms.storage.root_keys import RootKeys
from kms_tests.integration.processes import Machine, Server, eventually

PIECE: Final = 16
_STEP: Final = 8
_NOT_MEMORY: Final = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")
_LABELS: Final = {
    "wrapping key": "mini-kms/v4/wrap-kek",
    "check key": "mini-kms/v4/root-check",
    "MAC key": "mini-kms/v4/keystore-mac",
    "journal's MAC key": "mini-kms/v4/journal-mac",
}
"""Written out, as the format has them: this is a second opinion."""


def true_keys(keystore: Path, passphrase: str) -> dict[str, bytes]:
    """The root key, its sub-keys, and each live KEK by its group and version, such as `default 1`."""
    raw = keystore.read_bytes()
    with format4.Sealed(raw, None).header.derive(Secret(bytearray(passphrase.encode()))) as root:
        keys = {"root key": bytes(root.view())}
        for name, label in _LABELS.items():
            keys[name] = bytes(derive.sub_key(root, label).view())
        root_keys = RootKeys(root)
    for group in json.loads(raw)["keyGroups"]:
        for version in group["versions"]:
            if version["wrappedKey"] is not None:
                slot = KeySlot(group["keyId"], UUID(group["keyUuid"]).bytes, AES_256, version["version"])
                kek = root_keys.unwrap(slot, b64decode(version["wrappedKey"]))
                keys[f"{group['keyId']} {version['version']}"] = bytes(kek.view())
    return keys


def pieces(secret: bytes) -> list[bytes]:
    """Pieces of `secret` that overlap, or of a long one stand further apart; its last bytes are always among them.

    Wherever 23 bytes in a row survive, or `len(secret) // 40 + 15` if that is more, there is one of them.
    """
    assert len(secret) >= PIECE, "a secret this short would be found by chance"
    last = len(secret) - PIECE
    step = max(_STEP, len(secret) // 40)
    return [secret[start : start + PIECE] for start in sorted({*range(0, last + 1, step), last})]


def copies(pid: int, secrets: Mapping[str, bytes], *, dead_frames: bool = True) -> dict[str, int]:
    """How often each secret is in the memory of process `pid`: the count of its most frequent piece.

    `dead_frames` is whether what lies below the stack pointers counts.
    """
    wanted = {name: pieces(secret) for name, secret in secrets.items()}
    counts = {name: [0] * len(parts) for name, parts in wanted.items()}
    for region in _regions(pid, [] if dead_frames else _stack_pointers(pid)):
        for name, parts in wanted.items():
            for index, part in enumerate(parts):
                counts[name][index] += region.count(part)
    return {name: max(found) for name, found in counts.items()}


def _stack_pointers(pid: int) -> list[int]:
    threads = list(Path(f"/proc/{pid}/task").iterdir())

    def states() -> list[list[str]]:
        # Of a thread at rest: its system call, the call's arguments, stack pointer, program counter. See proc(5).
        return [(thread / "syscall").read_text(encoding="ascii").split() for thread in threads]

    eventually("every thread is at rest", lambda: all(state[0] != "running" for state in states()))
    return [int(state[-2], 16) for state in states()]


def _regions(pid: int, stack_pointers: Sequence[int]) -> Iterator[bytes]:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
            addresses, permissions, *rest = line.split(maxsplit=5)
            if "r" not in permissions or (len(rest) > 3 and rest[3].strip() in _NOT_MEMORY):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            alive = max((pointer for pointer in stack_pointers if start <= pointer < end), default=start)
            yield _read(memory, alive, end)
    finally:
        os.close(memory)


def _read(memory: int, start: int, end: int) -> bytes:
    content = bytearray()
    while start + len(content) < end:
        try:
            part = os.pread(memory, end - start - len(content), start + len(content))
        except OSError as error:
            # Beyond the end of a mapped file there is nothing to read, and nothing to hide.
            if error.errno == errno.EIO:
                break
            raise
        if not part:
            break
        content += part
    return bytes(content)


@dataclass(frozen=True)
class Launcher:
    """A program around one of ours. Its script may stop it at any point, so that it can be looked into there."""

    machine: Machine
    script: str

    @contextmanager
    def start(
        self, *arguments: str, environment: Mapping[str, str | None] | None = None, terminal: int | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        log = self.machine.root / "launched.stderr"
        with log.open("wb") as stderr:
            process = self._popen(list(arguments), environment, stderr, terminal)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _popen(
        self, arguments: list[str], environment: Mapping[str, str | None] | None, stderr: BinaryIO, terminal: int | None
    ) -> subprocess.Popen[bytes]:
        prologue = "" if terminal is None else "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        return subprocess.Popen(
            [sys.executable, "-c", prologue + self.script, *arguments],
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=self.machine.changed(environment),
            cwd=self.machine.root,
            start_new_session=True,
        )

    def server(self, process: subprocess.Popen[bytes]) -> Server:
        """The launched kms-server, once it is ready."""
        server = Server(process, self.machine, self.machine.root / "launched.stderr")
        server.wait_until_ready()
        return server


def stopping_at_its_end(name: str) -> str:
    """A launcher's script: the program `name`, stopped between its work and the interpreter's end."""
    return (
        f"import os, signal, sys\nfrom kms.cli.{name} import main\nstatus = main()\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\nsys.exit(status)\n"
    )


def wait_until_stopped(process: subprocess.Popen[bytes]) -> None:
    """Return once `process` has stopped itself; fail when it ended instead."""

    def is_stopped() -> bool:
        assert process.poll() is None, f"it ended with status {process.returncode}"
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] == "T"

    eventually("the process has stopped itself", is_stopped)


def end(process: subprocess.Popen[bytes]) -> int:
    """Let a stopped process go on to its end; its exit status."""
    process.send_signal(signal.SIGCONT)
    return process.wait(20)
