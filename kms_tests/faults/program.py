"""Run `kms-NAME` with the cheapest key derivation, so that a test can afford it often, and perhaps with a fault in it.

    python -m kms_tests.faults.program MUTANT NAME ARGUMENT...

A mutant breaks one rule of a durable save; `sound` breaks none. `load` as the name only loads the keystore ARGUMENT, and
`raise` raises its costs, as the start of a server does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kms.core import derive
from kms.core.derive import KdfParameters
from kms.host import durable, private
from kms.host.durable import DurableFile

TINY: Final = KdfParameters(memory_kib=8, iterations=1, parallelism=1)
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


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "no fsync of the file": _no_fsync_of_the_file,
    "no fsync of the directory": _no_fsync_of_the_directory,
    "rename before fsync": _rename_before_fsync,
    "write in place": _write_in_place,
    "no fsync of the parent": _no_fsync_of_the_parent,
    "no fsync at load": _no_fsync_at_load,
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
    from importlib import import_module

    return int(import_module(f"kms.cli.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
