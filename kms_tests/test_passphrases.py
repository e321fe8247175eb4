"""Which form of a passphrase a keystore is under."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms.errors import InputError, WrongPassphraseError
from kms.host import secret_input
from kms.storage import file
from kms.storage.lock import KeystoreLock
from kms.storage.passphrases import opening_form

COMPOSED = "café au lait".encode()
DECOMPOSED = unicodedata.normalize("NFD", "café au lait").encode()


def _made(data: Path, tiny: KdfParameters, passphrase: bytes) -> Path:
    path = data / "keystore.json"
    with KeystoreLock(path) as lock:
        file.initialise(lock, Secret(bytearray(passphrase)), now=1_700_000_000, parameters=tiny)
    return path


def _form(path: Path, given: bytes, *, keeps_line_end: bool = False) -> bytes:
    passphrase = secret_input.passphrase(bytearray(given), len(given), "here", keeps_line_end=keeps_line_end)
    with passphrase, opening_form(path, passphrase).view() as view:
        return bytes(view)


@pytest.mark.parametrize("made_of", [COMPOSED, DECOMPOSED])
def test_a_keystore_opens_with_either_form_of_its_letters_where_it_is_under_the_usual_one(
    made_of: bytes, data: Path, tiny: KdfParameters
) -> None:
    path = _made(data, tiny, COMPOSED)
    assert _form(path, made_of) == COMPOSED


def test_a_keystore_that_an_earlier_release_made_of_what_it_was_given_opens_with_that(
    data: Path, tiny: KdfParameters
) -> None:
    assert _form(_made(data, tiny, DECOMPOSED), DECOMPOSED) == DECOMPOSED


@pytest.mark.parametrize("older", [b"two\nlines", b"\xef\xbb\xbfbom", b"  ", b"\xff\x00\x01", b"pw\n\n"])
def test_so_does_one_whose_passphrase_none_may_be_today(older: bytes, data: Path, tiny: KdfParameters) -> None:
    assert _form(_made(data, tiny, older), older + b"\n") == older


def test_so_does_one_whose_passphrase_had_the_line_end_of_the_environment(data: Path, tiny: KdfParameters) -> None:
    assert _form(_made(data, tiny, b"pw\n"), b"pw\n", keeps_line_end=True) == b"pw\n"


def test_what_opens_nothing_and_could_be_no_passphrase_is_told_so(data: Path, tiny: KdfParameters) -> None:
    path = _made(data, tiny, b"bom")
    with pytest.raises(InputError, match="byte order mark"):
        _form(path, b"\xef\xbb\xbfbom")


def test_a_wrong_passphrase_of_one_form_costs_no_key_derivation_more(
    data: Path, tiny: KdfParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _made(data, tiny, COMPOSED)
    monkeypatch.setattr("kms.storage.passphrases.check", lambda *_: pytest.fail("it was derived"))
    assert _form(path, b"wrong\n") == b"wrong"
    monkeypatch.undo()
    with pytest.raises(WrongPassphraseError), KeystoreLock(path) as lock:
        file.load(lock, Secret(bytearray(b"wrong")))
