from __future__ import annotations

import pytest

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.kek import Kek
from kms.core.keyring import (
    EMPTY,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    Keyring,
    RotateGroup,
    apply,
)
from kms.errors import DecryptionFailedError
from kms.service.local_provider import LocalMasterKeyProvider
from kms_tests.in_memory import mint
from kms_tests.keks import forged


class Holder:
    current: Keyring = EMPTY


@pytest.fixture
def holder() -> Holder:
    holder = Holder()
    for change in (CreateGroup("a"), CreateGroup("b"), RotateGroup("a"), RotateGroup("a")):
        holder.current = apply(holder.current, change, now=0, mint=mint)
    return holder


def refused(provider: LocalMasterKeyProvider, blob: bytes, only_of: str | None = None) -> None:
    with pytest.raises(DecryptionFailedError):
        provider.open(ciphertext.parse(blob), b"", only_of)


def test_a_ciphertext_of_another_group_than_the_one_it_has_to_be_of_does_not_open(holder: Holder) -> None:
    provider = LocalMasterKeyProvider(holder)
    blob = provider.seal("a", b"secret", b"", Purpose.ENCRYPT)
    assert provider.open(ciphertext.parse(blob), b"", "a") == b"secret"
    refused(provider, blob, "b")


def test_each_refusal_costs_one_decryption_of_the_whole(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long it takes must not tell an unknown, disabled or destroyed version, or another group, from a wrong tag.
    provider = LocalMasterKeyProvider(holder)
    blob = provider.seal("a", bytes(1000), b"", Purpose.ENCRYPT)
    size = len(ciphertext.parse(blob).envelope)
    holder.current = apply(holder.current, RotateGroup("a"), now=0, mint=mint)
    opened: list[int] = []
    real = Kek.open

    def counted(self: Kek, sealed: Ciphertext, aad: bytes) -> bytes:
        opened.append(len(sealed.envelope))
        return real(self, sealed, aad)

    monkeypatch.setattr(Kek, "open", counted)
    refused(provider, blob[:-1] + bytes((blob[-1] ^ 1,)))
    refused(provider, forged("nobody", 1, size=1000))
    refused(provider, forged("a", 99, size=1000))
    refused(provider, blob, "b")
    holder.current = apply(holder.current, DisableVersion("a", 3), now=0, mint=mint)
    refused(provider, blob)
    holder.current = apply(holder.current, DestroyVersion("a", 3), now=0, mint=mint)
    refused(provider, blob)
    assert opened == [size] * 6


def test_what_stands_in_for_a_key_that_is_not_there_opens_nothing(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = LocalMasterKeyProvider(holder)
    monkeypatch.setattr(Kek, "open", lambda *_: b"opened")
    refused(provider, forged("nobody", 1))
