"""What a secret may be, whichever way it comes."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.secret import Passphrase, Secret
from kms.errors import FileAccessError, InputError, InputMissingError, SecretFileError
from kms.host import secret_input
from kms.host.descriptors import descriptor_named
from kms.host.secret_input import read_passphrase, read_token

WRONG = [
    (b"two\nlines", "control character"),
    (b"one\n\n", "control character"),
    (b"one\r", "control character"),
    (b"a\tb", "control character"),
    (b"a\x00b", "control character"),
    (b"a\x7fb", "control character"),
    ("a\u009bb".encode(), "control character"),
    ("a\u2028b".encode(), "control character"),
    (b"\xef\xbb\xbfpassphrase", "byte order mark"),
    ("passphrase".encode("utf-16"), "byte order mark"),
    (b"  ", "blank"),
    ("\u00a0\u3000".encode(), "blank"),
    (b"\xff\xee\xdd", "not UTF-8"),
    ("caf\u00e9".encode("latin-1"), "not UTF-8"),
]


def _bytes(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def _file(data: Path, content: bytes, mode: int = 0o600) -> Path:
    path = data / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def _passphrase(content: bytes, *, keeps_line_end: bool = False) -> Passphrase:
    return secret_input.passphrase(bytearray(content), len(content), "here", keeps_line_end=keeps_line_end)


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"hunter2", b"hunter2"),
        (b"hunter2\n", b"hunter2"),
        (b"hunter2\r\n", b"hunter2"),
        (b" hunter2 ", b" hunter2 "),
        (b"x" * 4096, b"x" * 4096),
        (b"x" * 4096 + b"\r\n", b"x" * 4096),
    ],
)
def test_a_secret_is_read_without_one_line_end(data: Path, content: bytes, secret: bytes) -> None:
    assert _bytes(read_token(_file(data, content))) == secret


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n"])
def test_an_empty_secret_is_refused(data: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="is empty"):
        read_token(_file(data, content))


def test_a_secret_of_more_than_4096_bytes_is_refused(data: Path) -> None:
    for content in (b"x" * 4097, b"x" * 4097 + b"\r\n", b"x" * 100_000):
        with pytest.raises(InputError, match="more than 4096 bytes"):
            read_token(_file(data, content))
        with pytest.raises(InputError, match="more than 4096 bytes"):
            read_passphrase(_file(data, content))


def test_a_read_that_fails_names_the_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path = _file(data, b"x")
    monkeypatch.setattr(os, "readv", fail)
    with pytest.raises(FileAccessError, match="Input/output error"):
        read_token(path)


def test_the_buffer_a_secret_was_read_into_is_wiped() -> None:
    buffer = bytearray(b"hunter2\n")
    assert _bytes(secret_input.token(buffer, 8, "here")) == b"hunter2"
    assert buffer == bytes(8)


def test_no_message_holds_the_secret(data: Path) -> None:
    with pytest.raises(SecretFileError) as caught:
        read_token(_file(data, b"hunter2", 0o644))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("content", "complaint"), WRONG)
def test_a_token_that_no_person_meant_is_refused(content: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        secret_input.token(bytearray(content), len(content), "here")
    assert str(caught.value).startswith("here ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("content", "complaint"), WRONG)
def test_a_passphrase_that_no_person_meant_is_kept_as_it_is_for_an_older_keystore(content: bytes, complaint: str) -> None:
    made = _passphrase(content)
    assert complaint in (made.complaint or "")
    assert _bytes(made) == content.removesuffix(b"\n")


def test_a_passphrase_is_in_normal_form_C_and_its_form_as_it_came_is_an_earlier_one() -> None:
    composed, decomposed = "caf\u00e9 \ud55c\uae00", unicodedata.normalize("NFD", "caf\u00e9 \ud55c\uae00")
    assert composed != decomposed
    made = _passphrase(decomposed.encode() + b"\n")
    assert _bytes(made) == composed.encode()
    assert list(map(_bytes, made.earlier_forms)) == [decomposed.encode()]
    assert not _passphrase(composed.encode()).earlier_forms
    assert not _passphrase(b"hunter2\n").earlier_forms


def test_what_came_from_the_environment_had_its_line_end_in_an_earlier_release() -> None:
    made = _passphrase(b"pw\n", keeps_line_end=True)
    assert (_bytes(made), list(map(_bytes, made.earlier_forms))) == (b"pw", [b"pw\n"])
    assert not _passphrase(b"pw", keeps_line_end=True).earlier_forms


@given(st.text(min_size=1, max_size=40))
def test_normal_form_C_piece_by_piece_is_that_of_the_whole(text: str) -> None:
    encoded = text.encode("utf-8", "ignore")
    try:
        made = _passphrase(encoded)
    except InputError:
        return
    if made.complaint is None:
        line = encoded.decode().removesuffix("\n").removesuffix("\r") if encoded.endswith(b"\n") else encoded.decode()
        assert _bytes(made) == unicodedata.normalize("NFC", line).encode()


def test_all_forms_of_a_passphrase_are_wiped_together() -> None:
    made = _passphrase("cafe\u0301\n".encode(), keeps_line_end=True)
    forms = (made, *made.earlier_forms)
    assert len(forms) == 3
    made.wipe()
    assert not any(any(_bytes(form)) for form in forms)


def test_a_secret_comes_from_a_descriptor_that_the_command_was_started_with() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"hunt")
        os.write(writer, b"er2\n")
        os.close(writer)
        with pytest.raises(InputError, match="no descriptor that this command was started with"):
            read_token(Path(f"/dev/fd/{reader}"))
        os.set_inheritable(reader, True)
        assert _bytes(read_token(Path(f"/dev/fd/{reader}"))) == b"hunter2"
    finally:
        os.close(reader)


def test_a_descriptor_of_another_process_is_not_taken_for_one_of_ours(data: Path) -> None:
    reader, writer = os.pipe()
    try:
        os.set_inheritable(reader, True)
        assert descriptor_named(Path(f"/proc/{os.getpid()}/fd/{reader}")) == reader
        assert descriptor_named(Path(f"/proc/{os.getppid()}/fd/{reader}")) is None
    finally:
        os.close(reader)
        os.close(writer)


def test_a_secret_is_found_by_its_path_where_the_working_directory_is_gone(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(data, b"hunter2")
    gone = data / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert _bytes(read_token(path)) == b"hunter2"
    with pytest.raises(InputMissingError):
        read_token(Path("secret"))
