"""Run `kms-NAME` with the cheapest key derivation, so that a test can afford it often, and perhaps with a fault in it.

    python -m kms_tests.faults.program MUTANT NAME ARGUMENT...

A mutant breaks one rule of a durable save; `sound` breaks none. `load` as the name only loads the keystore ARGUMENT, and
`raise` raises its costs, as the start of a server does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from kms.core import derive
from kms.core.derive import KdfParameters
from kms.core.keyring import Command, DestroyVersion, Keyring, RotateGroup, transition
from kms.host import durable, private
from kms.host.durable import DurableFile
from kms.storage import format4
from kms.storage.file import Keystore
from kms.storage.journal_file import JournalFile
from kms.storage.lock import KeystoreLock
from kms.storage.root_keys import RootKeys

TINY: Final = KdfParameters(memory_kib=8, iterations=1, parallelism=1)
JOURNALED: Final = "import kms.limits; kms.limits.JOURNAL_FROM_BYTES = 0; "
"""Has a server keep a journal for a keystore of any size."""
CHEAP: Final = "from kms.core.derive import KdfParameters; KdfParameters.__init__.__defaults__ = (8, 1, 1)"
"""What a real server does not raise the costs of."""


def _no_fsync_of_the_file() -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def _no_fsync_of_the_directory() -> None:
    durable.fsync_directory = lambda descriptor: None


def _rename_before_fsync() -> None:
    real = DurableFile.commit

    def commit(self: DurableFile, last_look: Callable[[], None] = lambda: None) -> None:
        self._temp.rename(self._path)
        self._path, self._temp = self._path, self._path
        real(self)

    DurableFile.commit = commit  # type: ignore[method-assign]


def _write_in_place() -> None:
    def write_file(path: Path, data: bytes | bytearray | memoryview, last_look: Callable[[], None] = lambda: None) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        durable.sync_names(path.parent)
        return

    durable.write_file = write_file


def _no_fsync_of_the_parent() -> None:
    private.sync_names = lambda path: None  # type: ignore[attr-defined]


def _no_fsync_at_load() -> None:
    durable.sync_names = lambda path: None


def _append_twice() -> None:
    real = JournalFile.append

    def append(self: JournalFile, line: bytes) -> None:
        real(self, line + line)

    JournalFile.append = append  # type: ignore[method-assign]


def _forget_the_former_journal() -> None:
    real = format4.Encoder.encode

    def encode(self: format4.Encoder, keyring: Keyring, front: format4.Front, keys: RootKeys) -> bytearray:
        return real(self, keyring, replace(front, former_journal=None), keys)

    format4.Encoder.encode = encode  # type: ignore[method-assign]


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "no fsync of the file": _no_fsync_of_the_file,
    "no fsync of the directory": _no_fsync_of_the_directory,
    "rename before fsync": _rename_before_fsync,
    "write in place": _write_in_place,
    "no fsync of the parent": _no_fsync_of_the_parent,
    "no fsync at load": _no_fsync_at_load,
    "append twice": _append_twice,
    "forget the former journal": _forget_the_former_journal,
}


def command(name: str, *arguments: str, mutant: str = "sound") -> list[str]:
    return [sys.executable, "-m", "kms_tests.faults.program", mutant, name, *arguments]


def _load(keystore: Path) -> int:
    from kms.core.secret import Secret
    from kms.storage import file
    from kms.storage.lock import KeystoreLock

    with KeystoreLock(keystore) as lock:
        _, keyring = file.load(lock, Secret(bytearray(os.environb[b"MINIKMS_PASSPHRASE"])))
    print(keyring.generation)
    return 0


def _raise(keystore: Path) -> int:
    from kms.core.secret import Secret
    from kms.storage import file
    from kms.storage.lock import KeystoreLock

    with KeystoreLock(keystore) as lock:
        passphrase = Secret(bytearray(os.environb[b"MINIKMS_PASSPHRASE"]))
        return 0 if file.raise_costs(lock, passphrase, parameters=KdfParameters(16, 1, 1)) else 1


def _migrate(keystore: Path) -> int:
    with KeystoreLock(keystore) as lock:
        store, _ = _opened(lock)
        print(store.migrate().generation)
    return 0


def _rotate(keystore: Path) -> int:
    """As a server does that has a journal: one change is a line of it, the next one another."""
    return _change(keystore, RotateGroup("default"), RotateGroup("default"))


def _destroy(keystore: Path) -> int:
    """The same with a change that is a fold, and one behind it."""
    return _change(keystore, DestroyVersion("default", 3), RotateGroup("default"))


def _change(keystore: Path, *commands: Command) -> int:
    with KeystoreLock(keystore) as lock:
        store, keyring = _opened(lock)
        for command in commands:
            group = transition(keyring, command, now=1, mint=store.mint)
            store.commit(keyring.generation, [group])
            keyring = Keyring(keyring.generation + 1, {**keyring.groups, group.key_id: group})
            # In one write, which is the answer.
            os.write(1, b"%d\n" % keyring.generation)
    return 0


def _opened(lock: KeystoreLock) -> tuple[Keystore, Keyring]:
    from kms.core.secret import Secret
    from kms.storage import file

    file.JOURNAL_FROM_BYTES = 0  # type: ignore[attr-defined]
    return file.load(lock, Secret(bytearray(os.environb[b"MINIKMS_PASSPHRASE"])))


def main(arguments: list[str]) -> int:
    mutant, name, *rest = arguments
    if mutant != "sound":
        MUTANTS[mutant]()
    # Called without costs it gives the default ones; a keystore's own are given.
    derive.KdfParameters = lambda *costs: KdfParameters(*costs) if costs else TINY  # type: ignore[assignment,misc]
    if name == "load":
        return _load(Path(rest[0]))
    if name == "raise":
        return _raise(Path(rest[0]))
    if name == "migrate":
        return _migrate(Path(rest[0]))
    if name == "rotate":
        return _rotate(Path(rest[0]))
    if name == "destroy":
        return _destroy(Path(rest[0]))
    from importlib import import_module

    return int(import_module(f"kms.cli.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
