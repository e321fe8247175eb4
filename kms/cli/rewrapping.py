"""`kms-client reencrypt`: files and whole trees to another key, or to a rotated one's new version.

Each file is replaced as a whole, and its header says where it is: so whoever interrupts this only runs it again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import render, screen
from kms.cli.data_options import CannotOpenError, aad_options, force_option, from_key_option, opening, origin, say_written
from kms.cli.options import PATH, Settings, connected, examples, key_option
from kms.cli.refused import naming
from kms.client.environment import API
from kms.errors import (
    EXIT_OK,
    EXIT_REFUSED,
    ConfigError,
    DecryptionFailedError,
    FileAccessError,
    InputError,
    InputMissingError,
    KmsError,
)

if TYPE_CHECKING:
    from kms.client.file_io import Progress, Source, Target

_OF_ONE_FILE: Final = (CannotOpenError, DecryptionFailedError, InputError, FileAccessError)
"""What is wrong with a file, and does not keep the others from being changed."""

Rewrap = Callable[["Source", "Target", "Progress | None"], None]
"""Moves one file, or changes which key groups it is under."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to each file: exactly one of the three names a key group."""

    key: str | None
    add: str | None
    drop: str | None
    from_key: str | None
    aad: bytes

    def check(self) -> None:
        """Raise `click.UsageError` for any other number of them."""
        given = [name for name in (self.key, self.add, self.drop) if name is not None]
        if len(given) != 1:
            raise click.UsageError("give one of --key, --add-key and --drop-key", click.get_current_context())

    @property
    def group(self) -> str:
        return self.key or self.add or self.drop or ""

    @property
    def done(self) -> str:
        if self.drop is not None:
            return f"taken from {self.group}"
        return f"{'added' if self.add is not None else 'moved'} to {self.group}"

    @contextlib.contextmanager
    def rewrapping(self, settings: Settings, source: str | None = None) -> Iterator[Rewrap]:
        """What does it to a file; `source` as in `connected`."""
        from kms.client import files

        if self.drop is not None:
            # Nobody has to be asked: whoever can write a file can take a part of it away.
            yield lambda source, target, progress: files.drop_recipient(
                source, target, key_id=self.group, progress=progress
            )
            return
        change = files.reencrypt_file if self.add is None else files.add_recipient
        with connected(settings, API, source) as (client, _), naming(self.group):
            yield lambda source, target, progress: change(
                client, source, target, key_id=self.group, source_key_id=self.from_key, aad=self.aad, progress=progress
            )

    def is_done(self, keks: Sequence[tuple[str, int]], active: int | None) -> bool:
        """Whether a file under `keks` needs no change any more; `active` is the group's active version, if it is known."""
        if self.drop is not None:
            return all(group != self.drop for group, _ in keks)
        if self.from_key is not None and self.key is not None and self.from_key != self.key:
            return all(group != self.from_key for group, _ in keks)
        under = [version for group, version in keks if group == self.group]
        return active is not None and under == [active]


@click.command(
    "reencrypt",
    epilog=examples(
        "kms-client reencrypt --in docs.tar.mke --out docs.tar.mke --key billing",
        "kms-client reencrypt backups/ notes.mke --key billing",
        "kms-client reencrypt backups/ --add-key archive",
    ),
)
@click.argument("paths", nargs=-1, type=PATH, metavar="[PATH]...")
@click.option("--in", "source", type=PATH, metavar="PATH", help="Input file; - is standard input.")
@click.option("--out", "target", type=PATH, metavar="PATH", help="Output file, replaced if it is there.")
@key_option("Key group to move to, under its active version.")
@key_option("Key group that an MKE2 file is to be under, too.", "--add-key")
@key_option("Key group that an MKE2 file is to be under no more.", "--drop-key")
@from_key_option
@aad_options
@force_option
@click.pass_obj
def reencrypt(
    settings: Settings,
    paths: Sequence[str],
    source: str | None,
    target: str | None,
    key: str | None,
    add_key: str | None,
    drop_key: str | None,
    from_key: str | None,
    aad: bytes,
    *,
    force: bool,
) -> int:
    """Move files or ciphertexts to another key, or to a rotated one's new version, without seeing the plaintext.

    Each PATH is a file, which is replaced, or a directory, in which every container and every ciphertext is. What is
    where it should be already is left alone: run it again to go on where it was interrupted.

    A file says itself which key group it is under. Where others can write it, give --from-key.
    """
    change = Change(key, add_key, drop_key, from_key, aad)
    change.check()
    if paths and (source is not None or target is not None):
        raise ConfigError("give either files, or --in and --out")
    if paths:
        found = list(_files(paths))
        with change.rewrapping(settings) as rewrap:
            return _all(settings, found, change, rewrap)
    if source is None or target is None:
        raise ConfigError("name the files to move, or give --in and --out")
    begin = origin(settings, source, target)
    with (
        change.rewrapping(settings, source) as rewrap,
        opening(from_key),
        screen.target(target, force=force) as destination,
        render.progress(begin, screen.path_of(destination)) as progress,
    ):
        rewrap(begin, destination, progress)
    say_written(settings, target)
    return EXIT_OK


def _files(paths: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Each file, and whether it was named itself; those of a directory in the order of their names, links not followed."""
    for text in paths:
        path = Path(text)
        if not path.is_dir():
            if not path.exists():
                raise InputMissingError(f"there is no file {path}")
            if not path.is_file():
                raise InputError(f"{path} is not a regular file, which alone can be replaced; use --in and --out")
            yield path, True
            continue
        for directory, names, others in os.walk(path, onerror=_refuse):
            names.sort()
            for name in sorted(others):
                found = Path(directory, name)
                if found.is_file() and not found.is_symlink():
                    yield found, False


def _refuse(error: OSError) -> None:
    raise error


@dataclass(slots=True)
class _Outcome:
    changed: int = 0
    unchanged: int = 0
    foreign: int = 0
    failed: dict[Path, str] = field(default_factory=dict)
    """And why."""


def _all(settings: Settings, found: Sequence[tuple[Path, bool]], change: Change, rewrap: Rewrap) -> int:
    outcome = _Outcome()
    try:
        with render.counting("files", len(found)) as count:
            _each(found, change, rewrap, outcome, count)
    except (KeyboardInterrupt, KmsError):
        if outcome.changed:
            render.remark(f"{_files_in_words(outcome.changed)} {change.done} before it stopped; run it again to go on")
        raise
    finally:
        # Not before: in the middle of the bar nobody could read it.
        for path, why in outcome.failed.items():
            render.remark(f"{path}: {why}")
    if settings.json:
        render.document(
            changed=outcome.changed, unchanged=outcome.unchanged, foreign=outcome.foreign, failed=list(outcome.failed)
        )
    else:
        told = [f"{_files_in_words(outcome.changed)} {change.done}"]
        if outcome.unchanged:
            told.append(f"{outcome.unchanged} needed no change")
        if outcome.foreign:
            told.append(f"{outcome.foreign} of other kinds left alone")
        if outcome.failed:
            told.append(f"{len(outcome.failed)} failed")
        render.text("; ".join(told))
    return EXIT_REFUSED if outcome.failed else EXIT_OK


def _each(
    found: Sequence[tuple[Path, bool]],
    change: Change,
    rewrap: Rewrap,
    outcome: _Outcome,
    count: Callable[[], None],
) -> None:
    from kms.client import files

    active: int | None = None
    for path, is_named in found:
        try:
            keks = files.keks_of(path)
            if keks is None and is_named:
                raise InputError(f"{path} is neither an MKE2 or MKE1 file nor a ciphertext")
            if keks is None:
                outcome.foreign += 1
            elif change.is_done(keks, active):
                outcome.unchanged += 1
            else:
                with opening(change.from_key):
                    rewrap(path, path, None)
                outcome.changed += 1
                after = files.keks_of(path) or []
                active = next((version for group, version in after if group == change.group), active)
        except _OF_ONE_FILE as error:
            outcome.failed[path] = str(error)
        count()


def _files_in_words(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"
