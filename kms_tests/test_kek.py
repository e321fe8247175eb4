"""A key-encryption key: it seals ciphertext 03, and opens that and what earlier releases sealed."""

from __future__ import annotations

import pytest

from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.core.derive import sub_key
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.kek import Kek
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError
from kms_tests.keks import earlier_header, opened, sealed, sealed_earlier

BYTES = bytes(range(32))


def _secret(key: bytes = BYTES) -> Secret:
    return Secret(bytearray(key))


def test_what_it_seals_it_opens_and_so_does_the_same_key_elsewhere() -> None:
    blob = sealed(Kek(_secret()), b"plaintext", b"context")
    assert blob.startswith(b"\x03\x01\x07billing" + bytes(7) + b"\x01\x01\x02")
    assert opened(Kek(_secret()), blob, b"context") == b"plaintext"


def test_what_an_earlier_release_sealed_opens() -> None:
    blob = sealed_earlier(EnvelopeKey(_secret()), b"plaintext", b"context")
    assert opened(Kek(_secret()), blob, b"context") == b"plaintext"


def test_neither_kind_opens_as_the_other_whatever_is_written_in_front() -> None:
    kek, key = Kek(_secret()), EnvelopeKey(_secret())
    kek_id = ciphertext.kek_id("billing", 1)
    new = ciphertext.parse(sealed(kek, bytes(40))).envelope
    for blob in (
        earlier_header(kek_id) + b"\x01\x01" + new[2:],
        ciphertext.header(Purpose.ENCRYPT, kek_id) + b"\x01\x02" + sealed_earlier(key, bytes(99))[19:],
    ):
        with pytest.raises(DecryptionFailedError):
            opened(kek, blob)


def test_the_committing_envelope_is_under_a_sub_key_and_never_under_the_key_itself() -> None:
    blob = sealed(Kek(_secret()), b"plaintext")
    parsed = ciphertext.parse(blob)
    bound = ciphertext.bound(parsed.header, b"")
    with sub_key(_secret(), "mini-kms/v3/kek/xaes-256-gcm-kc") as derived:
        assert CommittingKey(derived).open(parsed.envelope, bound) == b"plaintext"
    with pytest.raises(DecryptionFailedError):
        CommittingKey(_secret()).open(parsed.envelope, bound)


@pytest.mark.parametrize(
    "changed",
    [{"purpose": Purpose.DATA_KEY}, {"purpose": Purpose.UNKNOWN}, {"group": "payroll"}, {"version": 2}],
    ids=["another purpose", "no purpose", "another group", "another version"],
)
def test_the_header_is_authenticated(changed: dict[str, object]) -> None:
    # One KEK for two groups: nothing but the header tells them apart.
    kek = Kek(_secret())
    envelope = ciphertext.parse(sealed(kek)).envelope
    other = ciphertext.parse(sealed(kek, **changed)).header  # type: ignore[arg-type]  # they are those of its parameters
    with pytest.raises(DecryptionFailedError):
        opened(kek, other + envelope)


def test_the_header_and_the_aad_cannot_be_shifted_into_each_other() -> None:
    kek = Kek(_secret())
    kek_id = ciphertext.kek_id("billing", 1)
    header = ciphertext.header(Purpose.ENCRYPT, kek_id)
    parsed = ciphertext.parse(kek.seal(b"x", header[1:] + b"aad", Purpose.ENCRYPT, kek_id))
    with pytest.raises(DecryptionFailedError):
        kek.open(parsed._replace(header=header + header[1:]), b"aad")


def test_a_wiped_one_neither_seals_nor_opens() -> None:
    kek, key = Kek(_secret()), EnvelopeKey(_secret())
    blobs = [sealed(kek), sealed_earlier(key, b"x")]
    kek.wipe()
    with pytest.raises(DecryptionFailedError):
        sealed(kek)
    for blob in blobs:
        with pytest.raises(DecryptionFailedError):
            opened(kek, blob)
