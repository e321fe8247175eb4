"""The journal: what was answered is read back, and nothing else is."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.derive import KdfParameters
from kms.core.keyring import CreateGroup, DestroyVersion, Keyring, RotateGroup, apply
from kms.core.secret import Secret
from kms.errors import KeystoreError, KeystoreReplacedError, SaveFailedError, SaveOutcomeUnknownError
from kms.storage import backup, file, mending
from kms.storage.file import Keystore
from kms.storage.lock import KeystoreLock, journal_path
from kms_tests import earlier_keystore
from kms_tests.commits import commit
from kms_tests.fuzz.targets import journal_parts, open_journal

NOW = 1_700_000_000
FILE, WHOLE, LINES, STATES = journal_parts()


def _secret(passphrase: bytes = b"correct horse") -> Secret:
    return Secret(bytearray(passphrase))


@pytest.fixture
def path(data: Path, tiny: KdfParameters, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A keystore that has a journal, however small it is."""
    monkeypatch.setattr(file, "JOURNAL_FROM_BYTES", 0)
    made = data / "keystore.json"
    with KeystoreLock(made) as lock:
        keystore, keyring = file.initialise(lock, _secret(), now=NOW, parameters=tiny)
        commit(keystore, _rotated(keystore, keyring))
    assert journal_path(made).exists()
    return made


class World:
    """A keystore that is open, and how its keyring is by now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = KeystoreLock(path)
        try:
            self.keystore, self.keyring = file.load(self.lock, _secret())
        except BaseException:
            self.lock.close()
            raise

    def rotate(self) -> None:
        after = _rotated(self.keystore, self.keyring)
        commit(self.keystore, after)
        self.keyring = after

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.keystore.wipe()
        self.lock.close()


def _rotated(keystore: Keystore, keyring: Keyring, group: str = "default") -> Keyring:
    return apply(keyring, RotateGroup(group), now=NOW, mint=keystore.mint).next_generation()


def _loaded(path: Path) -> Keyring:
    with World(path) as world:
        return world.keyring


def test_a_change_is_one_line_more_and_leaves_the_file_as_it_is(path: Path) -> None:
    before, journal = path.read_bytes(), journal_path(path)
    with World(path) as world:
        lines = journal.read_bytes().count(b"\n")
        world.rotate()
        world.rotate()
        assert journal.read_bytes().count(b"\n") == lines + 2
        assert path.read_bytes() == before
    assert _loaded(path) == world.keyring


def test_the_journal_is_private(path: Path) -> None:
    assert journal_path(path).stat().st_mode & 0o777 == 0o600


def test_groups_that_were_made_since_come_after_the_others_in_their_order(path: Path) -> None:
    with World(path) as world:
        for name in ("z", "a"):
            after = apply(world.keyring, CreateGroup(name), now=NOW, mint=world.keystore.mint).next_generation()
            commit(world.keystore, after)
            world.keyring = after
        after = _rotated(world.keystore, world.keyring, "z")
        commit(world.keystore, after)
    assert list(_loaded(path).groups) == ["default", "z", "a"]
    assert _loaded(path) == after


def test_it_is_folded_when_it_is_longer_than_it_may_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MIN_FOLD_BYTES", 2_000)
    journal = journal_path(path)
    with World(path) as world:
        lengths = []
        for _ in range(40):
            world.rotate()
            lengths.append(journal.stat().st_size)
        assert any(later < earlier for earlier, later in pairwise(lengths))
        assert max(lengths) <= max(2_000, path.stat().st_size)
    assert _loaded(path) == world.keyring


def test_a_small_keystore_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "JOURNAL_FROM_BYTES", 1 << 16)
    monkeypatch.setattr(file, "MIN_FOLD_BYTES", 0)
    with World(path) as world:
        for _ in range(10):
            world.rotate()
        assert not journal_path(path).exists()
        assert json.loads(path.read_bytes())["journal"] is None
    assert _loaded(path) == world.keyring


def test_a_key_that_is_destroyed_is_in_neither_file_any_more(path: Path) -> None:
    with World(path) as world:
        world.rotate()
        wrapped = [v.wrapped for v in world.keyring.groups["default"].versions.values()]
        after = apply(world.keyring, DestroyVersion("default", 2), now=NOW, mint=world.keystore.mint).next_generation()
        commit(world.keystore, after)
    texts = [b64encode(one) for one in wrapped if one is not None]
    kept = path.read_bytes() + journal_path(path).read_bytes()
    assert [text in kept for text in texts] == [True, False, True]
    assert _loaded(path) == after


def test_settling_leaves_one_file(path: Path) -> None:
    with World(path) as world:
        world.rotate()
        world.keystore.settle()
        assert not journal_path(path).exists()
        assert json.loads(path.read_bytes())["journal"] is None
    assert _loaded(path) == world.keyring


def test_settling_that_fails_is_no_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with World(path) as world:
        world.rotate()
        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", _fail)
            world.keystore.settle()
    assert _loaded(path) == world.keyring


def _fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("call", ["pwrite"])
def test_a_write_that_fails_changes_nothing_and_the_next_one_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with World(path) as world:
        world.rotate()
        before = journal_path(path).read_bytes()
        with monkeypatch.context() as broken:
            broken.setattr(os, call, _fail)
            with pytest.raises(SaveFailedError, match="nothing was changed"):
                commit(world.keystore, _rotated(world.keystore, world.keyring))
        assert journal_path(path).read_bytes() == before
        world.rotate()
    assert _loaded(path) == world.keyring


def test_a_write_that_was_cut_short_and_not_taken_back_is_overwritten_by_a_shorter_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with World(path) as world:
        real = os.pwrite

        def half(descriptor: int, data: bytes | memoryview, at: int) -> int:
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[: len(data) // 2], at)

        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", half)
            broken.setattr(os, "ftruncate", _fail)
            with pytest.raises(SaveFailedError):
                commit(world.keystore, _rotated(world.keystore, world.keyring))
        assert _loaded_beside(path) == world.keyring
        world.rotate()
    assert _loaded(path) == world.keyring


def _loaded_beside(path: Path) -> Keyring:
    """What a server that started now would find."""
    other = path.parent / "other"
    other.mkdir(mode=0o700)
    for name in (path, journal_path(path)):
        (other / name.name).write_bytes(name.read_bytes())
        (other / name.name).chmod(0o600)
    return _loaded(other / path.name)


def test_the_outcome_of_a_write_that_was_not_made_durable_is_unknown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with World(path) as world:
        monkeypatch.setattr(os, "fsync", _fail)
        with pytest.raises(SaveOutcomeUnknownError, match="check the disk"):
            commit(world.keystore, _rotated(world.keystore, world.keyring))
        monkeypatch.undo()


@pytest.mark.parametrize("how", ["removed", "exchanged", "longer", "keystore"])
def test_a_file_that_somebody_touched_is_not_written_over(path: Path, how: str) -> None:
    journal = journal_path(path)
    with World(path) as world:
        world.rotate()
        content = journal.read_bytes()
        if how == "longer":
            journal.write_bytes(content + b"x")
        elif how == "keystore":
            path.write_bytes(path.read_bytes() + b"\n")
        else:
            journal.rename(journal.with_name("moved"))
            if how == "exchanged":
                journal.write_bytes(content)
        with pytest.raises(KeystoreReplacedError, match="Nothing was saved"):
            world.rotate()


def test_it_is_made_durable_before_it_is_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with World(path) as world:
        world.rotate()
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _loaded(path)
    assert synced[-2:] == [str(path.parent), str(journal_path(path))]


# what is beside the file


def test_a_file_without_its_journal_is_refused_with_a_way_out(path: Path) -> None:
    journal_path(path).unlink()
    with pytest.raises(KeystoreError, match=r"its journal is missing.*kms-admin mend-keystore"):
        _loaded(path)


def test_a_journal_that_is_not_named_is_refused(path: Path) -> None:
    with World(path) as world:
        world.rotate()
        kept = journal_path(path).read_bytes()
        world.keystore.settle()
        world.keystore.write_whole()
    journal_path(path).write_bytes(kept)
    journal_path(path).chmod(0o600)
    with pytest.raises(KeystoreError, match="there is a journal beside it that it does not name"):
        _loaded(path)


def test_the_journal_of_another_life_of_the_same_keystore_is_refused(path: Path) -> None:
    first = (path.read_bytes(), journal_path(path).read_bytes())
    with World(path) as world:
        world.keystore.settle()
        world.rotate()
    journal_path(path).write_bytes(first[1])
    with pytest.raises(KeystoreError, match="is not its own"):
        _loaded(path)


def test_what_a_fold_left_behind_is_skipped_and_the_next_change_goes_on(path: Path) -> None:
    with World(path) as world:
        world.rotate()
        left = journal_path(path).read_bytes()
        world.keystore.settle()
    journal_path(path).write_bytes(left)
    journal_path(path).chmod(0o600)
    with World(path) as after:
        assert after.keyring == world.keyring
        after.rotate()
        after.rotate()
    assert _loaded(path) == after.keyring


# what is in it


def test_all_of_it_is_read() -> None:
    assert open_journal(WHOLE) == STATES[-1]


@pytest.mark.parametrize("kept", range(1, len(LINES)))
def test_a_last_line_that_was_cut_off_anywhere_is_not_there(kept: int) -> None:
    before, torn = b"".join(LINES[:kept]), LINES[kept]
    for length in range(len(torn)):
        assert open_journal(before + torn[:length]) == STATES[kept - 1]
        assert open_journal(before + torn[:length] + bytes(len(torn) - length)) == STATES[kept - 1]
        garbage = os.urandom(len(torn) - length).replace(b"\n", b"\xff")
        assert open_journal(before + torn[:length] + garbage) == STATES[kept - 1]


@pytest.mark.parametrize("number", range(len(LINES) - 1))
def test_a_line_with_any_bit_flipped_that_another_follows_is_refused(number: int) -> None:
    before, after = b"".join(LINES[:number]), b"".join(LINES[number + 1 :])
    for at in range(len(LINES[number])):
        line = bytearray(LINES[number])
        line[at] ^= 1 << at % 8
        with pytest.raises(KeystoreError):
            open_journal(before + bytes(line) + after)


def test_a_last_line_with_a_bit_flipped_is_refused_or_not_there() -> None:
    refused = 0
    for at in range(len(LINES[-1])):
        for bit in range(8):
            line = bytearray(LINES[-1])
            line[at] ^= 1 << bit
            try:
                assert open_journal(b"".join(LINES[:-1]) + bytes(line)) == STATES[-2]
            except KeystoreError:
                refused += 1
    assert refused > 7.9 * len(LINES[-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, lines[1]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[0], *lines[1:]],
        lambda lines: [b"\n", *lines],
        lambda lines: [lines[0], b"\n", *lines[1:]],
        lambda lines: [],
    ],
)
def test_lines_that_are_left_out_moved_or_repeated_are_refused(change: Callable[[list[bytes]], list[bytes]]) -> None:
    with pytest.raises(KeystoreError):
        open_journal(b"".join(change(list(LINES))))


@given(st.binary(max_size=300))
def test_what_is_no_journal_is_refused(raw: bytes) -> None:
    with pytest.raises(KeystoreError):
        open_journal(raw)


# backup and mending


def test_a_backup_is_one_file_and_opens_by_itself(path: Path, data: Path) -> None:
    with World(path) as world:
        world.rotate()
        backup.back_up(path, _secret(), data / "backup.json")
    other = data / "restored"
    other.mkdir(mode=0o700)
    (data / "backup.json").rename(other / "keystore.json")
    assert _loaded(other / "keystore.json") == world.keyring
    assert (other / "keystore.json").stat().st_mode & 0o777 == 0o600


def test_mending_takes_what_is_left_and_keeps_what_was_there(path: Path) -> None:
    with World(path) as world:
        world.rotate()
        half = world.keyring
        world.rotate()
        world.rotate()
    journal = journal_path(path)
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], lines[3].replace(b"default", b"defaulT"), *lines[4:]])
    journal.write_bytes(damaged)
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _loaded(path)
    with KeystoreLock(path) as lock:
        mended = mending.mend(lock, _secret())
    assert (mended.generation, mended.kept) == (half.generation, journal.with_name("keystore.json.journal.unread"))
    assert _loaded(path).groups == half.groups
    assert mended.kept is not None
    assert mended.kept.read_bytes() == damaged


def test_mending_goes_on_without_a_journal_that_is_lost(path: Path) -> None:
    saved = json.loads(path.read_bytes())["generation"]
    with World(path) as world:
        world.rotate()
    journal_path(path).unlink()
    with KeystoreLock(path) as lock:
        assert mending.mend(lock, _secret()) == mending.Mended(saved, None)
    assert _loaded(path).generation == saved + 1


def test_there_is_nothing_to_mend_where_all_is_well(path: Path) -> None:
    before = path.read_bytes()
    with KeystoreLock(path) as lock, pytest.raises(KeystoreError, match="nothing to mend"):
        mending.mend(lock, _secret())
    assert path.read_bytes() == before


# a change of the passphrase, and earlier formats


def test_a_change_of_passphrase_takes_all_of_the_journal_into_the_file(path: Path, tiny: KdfParameters) -> None:
    with World(path) as world:
        world.rotate()
    left = journal_path(path).read_bytes()
    with KeystoreLock(path) as lock:
        file.change_passphrase(lock, _secret(), _secret(b"another"), parameters=tiny)
    assert not journal_path(path).exists()
    # As if it had been ended before the journal was gone: the MACs in that are under the old key.
    journal_path(path).write_bytes(left)
    journal_path(path).chmod(0o600)
    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, _secret(b"another"))
        assert list(keyring.groups["default"].versions) == list(world.keyring.groups["default"].versions)
        commit(keystore, _rotated(keystore, keyring))
        keystore.wipe()


def test_a_keystore_of_format_3_beside_a_journal_with_changes_is_refused(path: Path) -> None:
    with World(path) as world:
        world.rotate()
    path.write_bytes(earlier_keystore.write([earlier_keystore.Group("default")], "correct horse"))
    with pytest.raises(KeystoreError, match="does not name"):
        _loaded(path)


def test_a_migration_that_was_ended_once_the_journal_was_begun_is_made_again(path: Path) -> None:
    begun = journal_path(path).read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(earlier_keystore.write([earlier_keystore.Group("default")], "correct horse"))
    journal_path(path).write_bytes(begun)
    with World(path) as world:
        world.keyring = world.keystore.migrate()
        world.rotate()
    assert _loaded(path) == world.keyring
    assert path.with_name("keystore.json.v3").exists()


def test_a_first_journal_that_the_keystore_was_not_saved_after_is_no_hindrance(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with World(path) as world:
        world.keystore.settle()
        real = os.rename

        def rename(source: str, target: Path, **more: object) -> None:
            if Path(target).name == "keystore.json":
                raise OSError(28, "No space left on device")
            real(source, target)

        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", rename)
            with pytest.raises(SaveFailedError):
                commit(world.keystore, _rotated(world.keystore, world.keyring))
        assert journal_path(path).exists()
        assert _loaded_beside(path) == world.keyring
        world.rotate()
        world.rotate()
    assert _loaded(path) == world.keyring
