"""The usage file: what is written is read again, and what was not written by us is refused and never believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.usage import Operations, Refusals, TimedDisable
from kms.errors import InputError, InputMissingError, SecretFileError
from kms.limits import MAX_VERSION
from kms.storage import usage_file
from kms.storage.usage_file import Record

MOST = (1 << 63) - 1
counts = st.integers(0, MOST)
seconds = st.integers(-MOST, MOST)
names = st.text(min_size=1, max_size=64)
operations = st.builds(Operations, counts, counts, counts, counts, counts)
trials = st.builds(
    TimedDisable,
    names,
    seconds,
    seconds,
    st.dictionaries(names, st.builds(Refusals, counts, seconds), max_size=3),
    st.none() | seconds,
)
records = st.builds(
    Record,
    st.text(),
    st.integers(1, MAX_VERSION),
    operations,
    st.none() | seconds,
    st.none() | names,
    st.none() | trials,
)


@pytest.fixture
def path(data: Path) -> Path:
    return data / "keystore.json.usage"


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@given(since=seconds, written=st.lists(records, max_size=5))
def test_what_is_encoded_is_decoded_again(since: int, written: list[Record]) -> None:
    # A name that is no UTF-8 is none that any key group or principal has.
    raw = usage_file.encode(since, map(usage_file.encode_record, written))
    document = usage_file.decode(raw)
    assert (document.since_epoch_sec, document.versions) == (since, written)


def test_it_is_private_and_beside_its_keystore(path: Path) -> None:
    assert usage_file.path_of(path.with_name("keystore.json")) == path
    usage_file.write(path, 7, [usage_file.encode_record(Record("default", 1, Operations(encrypt=3)))])
    assert path.stat().st_mode & 0o777 == 0o600
    assert usage_file.read(path).versions == [Record("default", 1, Operations(encrypt=3))]


def test_one_that_is_not_there_is_told_from_one_that_cannot_be_used(path: Path) -> None:
    with pytest.raises(InputMissingError):
        usage_file.read(path)


WHOLE = usage_file.encode(7, [usage_file.encode_record(Record("default", 1, Operations(encrypt=3)))])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        WHOLE[:-3],
        b"\xff" + WHOLE,
        WHOLE.replace(b'"formatVersion":1', b'"formatVersion":2'),
        WHOLE.replace(b'"version":1', b'"version":0'),
        WHOLE.replace(b'"Encrypt":3', b'"Encrypt":-1'),
        WHOLE.replace(b'"Encrypt":3', b'"Encrypt":%d' % (MOST + 1)),
        WHOLE.replace(b'"Encrypt":3', b'"Encrypt":1e400'),
        b"[" * 100_000,
        b"{}",
    ],
)
def test_one_that_is_damaged_or_of_another_format_is_refused(path: Path, raw: bytes) -> None:
    assert raw != WHOLE
    with pytest.raises(InputError, match="damaged, or of another version") as caught:
        usage_file.read(put(path, raw))
    assert caught.value.__cause__ is None, "what is wrong with it may quote it"


def test_one_that_is_larger_than_any_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_file, "MAX_USAGE_BYTES", len(WHOLE) - 1)
    with pytest.raises(InputError, match="larger"):
        usage_file.read(put(path, WHOLE))


def test_one_that_others_may_read_or_that_is_a_link_is_refused(path: Path) -> None:
    put(path, WHOLE).chmod(0o644)
    with pytest.raises(SecretFileError):
        usage_file.read(path)
    path.chmod(0o600)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(SecretFileError):
        usage_file.read(link)
