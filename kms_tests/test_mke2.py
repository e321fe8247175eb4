"""The container MKE2: its bytes, its recipients, and a stream of which no chunk can be moved, left out or added."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.client import files
from kms.client.protocol import DataKey
from kms.core import envelope, mke2
from kms.core.ciphertext import Purpose
from kms.core.envelope import ChunkOpener, ChunkSealer, EnvelopeKey
from kms.core.kek import Kek
from kms.core.mke2 import SEALED_CHUNK_BYTES, Header, Recipient
from kms.core.secret import Secret
from kms.errors import (
    AlteredFileError,
    CutOffError,
    DecryptionFailedError,
    InputError,
    ProtocolError,
    UnauthorizedError,
)
from kms.limits import MAX_RECIPIENTS, STREAM_CHUNK_BYTES
from kms_tests import keks

KEKS = {name: Kek(Secret(bytearray(name.encode().ljust(32, b"-")))) for name in ("default", "billing", "archive")}


class Client:
    """A server in memory, which may be told to refuse."""

    def __init__(self) -> None:
        self.refuses: dict[str, Exception] = {}
        self.asked: list[tuple[str, str | None]] = []

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        key = os.urandom(32)
        also = tuple(wrapped(key, name, aad) for name in also_key_ids)
        return DataKey(key, wrapped(key, key_id or "default", aad), also)

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        named = mke2.recipient(ciphertext)
        self.asked.append((named.group, source_key_id))
        if named.group in self.refuses:
            raise self.refuses[named.group]
        if named.group not in KEKS:
            raise DecryptionFailedError
        return keks.opened(KEKS[named.group], ciphertext, aad)

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return wrapped(self.decrypt(ciphertext, aad, source_key_id=source_key_id), key_id, aad, version=2)


def wrapped(key: bytes, group: str = "default", aad: bytes = b"", version: int = 1) -> bytes:
    return keks.sealed(KEKS[group], key, aad, group=group, version=version, purpose=Purpose.DATA_KEY)


CLIENT = Client()
CHUNK, SEALED = STREAM_CHUNK_BYTES, SEALED_CHUNK_BYTES


def sealed(plaintext: bytes, aad: bytes = b"", key_id: str = "default") -> bytes:
    output = io.BytesIO()
    files.encrypt_file(CLIENT, io.BytesIO(plaintext), output, aad=aad, key_id=key_id)
    return output.getvalue()


def opened(box: bytes, aad: bytes = b"", client: Client = CLIENT, *, source_key_id: str | None = None) -> bytes:
    output = io.BytesIO()
    files.decrypt_file(client, io.BytesIO(box), output, aad=aad, source_key_id=source_key_id)
    return output.getvalue()


def parts(box: bytes) -> tuple[bytes, list[bytes]]:
    """The header, and the chunks."""
    stream = io.BytesIO(box[4:])
    header = mke2.read_header(stream.read).encode()
    body = box[len(header) :]
    return header, [body[start : start + SEALED] for start in range(0, len(body), SEALED)]


def refused(box: bytes, tmp_path: Path, released: bytes = b"") -> None:
    """Refused into a path, where nothing is then; a stream has an authentic beginning."""
    with pytest.raises(AlteredFileError):
        files.decrypt_file(CLIENT, io.BytesIO(box), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    output = io.BytesIO()
    with pytest.raises(AlteredFileError) as refusal:
        files.decrypt_file(CLIENT, io.BytesIO(box), output)
    assert output.getvalue() == released
    assert isinstance(refusal.value, CutOffError) is bool(released)


def changed(
    change: Callable[..., None], box: bytes, client: Client = CLIENT, *, to_server: bool = True, **others: str
) -> bytes:
    output = io.BytesIO()
    arguments = (client,) if to_server else ()
    change(*arguments, io.BytesIO(box), output, **others)
    return output.getvalue()


def groups(box: bytes) -> list[tuple[str, int]]:
    return [one[1:] for one in mke2.read_header(io.BytesIO(box[4:]).read).recipients]


# Its bytes.


def test_the_bytes_are_those_of_the_contract() -> None:
    box = sealed(b"hello", b"aad")
    recipient_length = int.from_bytes(box[5:7], "big")
    assert box[:5] == b"MKE2\x01"
    assert len(box) == 5 + 2 + recipient_length + 32 + 32 + 5 + 16
    one = mke2.recipient(box[7 : 7 + recipient_length])
    assert one[1:] == ("default", 1)
    salt, commitment = box[7 + recipient_length :][:32], box[7 + recipient_length + 32 :][:32]
    with Secret(bytearray(keks.opened(KEKS["default"], one.wrapped, b"aad"))) as key:
        made, chunk_key = mke2.keys(key, salt, b"aad")
    assert made == commitment
    plaintext = bytearray(5)
    with chunk_key:
        ChunkOpener(chunk_key).open_into(memoryview(box[-21:]), memoryview(plaintext), is_last=True)
    assert plaintext == b"hello"


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 16 * CHUNK - 1, 16 * CHUNK, 16 * CHUNK + 1, 33 * CHUNK]
)
def test_a_chunk_is_64_KiB_and_only_an_empty_file_has_an_empty_one(size: int) -> None:
    content = os.urandom(size)
    box = sealed(content)
    _, chunks = parts(box)
    assert len(chunks) == max(1, -(-size // CHUNK))
    assert sum(map(len, chunks)) == size + 16 * len(chunks)
    assert opened(box) == content


# A stream of chunks.


def test_a_file_that_was_cut_off_is_refused_wherever_that_was(tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK + 100)
    header, chunks = parts(sealed(content))
    body = b"".join(chunks)
    for length in (0, 1, 15, 16, 17, SEALED - 1):
        refused(header + body[:length], tmp_path)
    for length in (SEALED, SEALED + 1, SEALED + 16, 2 * SEALED - 1):
        # At a boundary the last whole chunk says that it is not the last.
        released = content[: (length - 1) // SEALED * CHUNK]
        refused(header + body[:length], tmp_path, released)
    refused(header + body[:-1], tmp_path, content[: 2 * CHUNK])
    refused(header + body[: 2 * SEALED], tmp_path, content[:CHUNK])


def test_no_chunk_can_be_left_out_moved_repeated_or_added(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK + 7)
    header, chunks = parts(sealed(content))
    _, foreign = parts(sealed(content))
    first, second, third, last = chunks
    for order, whole in (
        ([second, third, last], 0),
        ([first, third, last], 1),
        ([second, first, third, last], 0),
        ([first, first, second, third, last], 1),
        ([first, second, third], 2),
        ([first, second, third, last, last], 3),
        ([first, second, third, last + b"\0"], 3),
        ([first, foreign[1], third, last], 1),
        ([first, second, third, foreign[3]], 3),
    ):
        refused(header + b"".join(order), tmp_path, content[: whole * CHUNK])


def test_an_empty_last_chunk_is_refused_but_in_an_empty_file(tmp_path: Path) -> None:
    header, _ = parts(sealed(b""))
    key = keks.opened(KEKS["default"], mke2.read_header(io.BytesIO(header[4:]).read).recipients[0].wrapped)
    with Secret(bytearray(key)) as data_key:
        _, chunk_key = mke2.keys(data_key, header[-64:-32], b"")
    with chunk_key:
        sealer = ChunkSealer(chunk_key)
    full, empty = bytearray(SEALED), bytearray(16)
    sealer.seal_into(memoryview(bytes(CHUNK)), memoryview(full), is_last=False)
    sealer.seal_into(memoryview(b""), memoryview(empty), is_last=True)
    refused(header + full + empty, tmp_path, bytes(CHUNK))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3 * CHUNK), st.integers(0, 7), st.data())
def test_no_flipped_bit_is_accepted_and_what_a_stream_got_is_a_beginning(size: int, bit: int, data: st.DataObject) -> None:
    content = os.urandom(size)
    box = bytearray(sealed(content))
    position = data.draw(st.integers(0, len(box) - 1))
    box[position] ^= 1 << bit
    output = io.BytesIO()
    with pytest.raises((InputError, DecryptionFailedError)):
        files.decrypt_file(CLIENT, io.BytesIO(box), output)
    assert content.startswith(output.getvalue())
    assert len(output.getvalue()) % CHUNK == 0


def test_a_stream_holds_so_many_chunks_and_none_after_its_last() -> None:
    with Secret(bytearray(32)) as key:
        sealer = ChunkSealer(key)
    out = memoryview(bytearray(16))
    with patch.object(envelope, "MAX_CHUNKS", 2):
        for chunk in (sealer, sealer):
            chunk.seal_into(memoryview(b""), out, is_last=False)
        with pytest.raises(InputError, match="more chunks"):
            sealer.seal_into(memoryview(b""), out, is_last=True)
    with Secret(bytearray(32)) as key:
        ended = ChunkSealer(key)
    ended.seal_into(memoryview(b""), out, is_last=True)
    with pytest.raises(InputError):
        ended.seal_into(memoryview(b""), out, is_last=True)


def test_the_aad_is_that_of_the_data_key_and_of_the_body() -> None:
    box = sealed(b"x", b"a")
    for other in (b"", b"b", b"a\0"):
        with pytest.raises(DecryptionFailedError) as refusal:
            opened(box, other)
        assert type(refusal.value) is DecryptionFailedError
    header = mke2.read_header(io.BytesIO(box[4:]).read)
    with Secret(bytearray(keks.opened(KEKS["default"], header.recipients[0].wrapped, b"a"))) as key:
        planted = Recipient(wrapped(bytes(key.view()), aad=b"b"), "default", 1)
    with pytest.raises(AlteredFileError):
        opened(header._replace(recipients=[planted]).encode() + parts(box)[1][0], b"b")


# Its header.


def _raw(*recipients: bytes, number: int | None = None) -> bytes:
    listed = b"".join(len(one).to_bytes(2, "big") + one for one in recipients)
    return b"MKE2" + bytes((len(recipients) if number is None else number,)) + listed + bytes(64) + bytes(16)


GOOD = wrapped(bytes(32))
BAD_HEADERS = {
    "no recipient": _raw(),
    "more recipients than there may be": _raw(*(wrapped(bytes(32), version=number + 1) for number in range(17))),
    "fewer than it says": _raw(GOOD, number=2),
    "an empty recipient": _raw(b""),
    "one that is too long": _raw(bytes(1025)),
    "one twice": _raw(GOOD, wrapped(bytes(32))),
    "what somebody encrypted": _raw(keks.sealed(KEKS["default"], bytes(32), group="default")),
    "what was moved from a ciphertext 02": _raw(keks.sealed(KEKS["default"], bytes(32), purpose=Purpose.UNKNOWN)),
    "a ciphertext 02": _raw(keks.sealed_earlier(EnvelopeKey(Secret(bytearray(32))), bytes(32))),
    "a shorter key": _raw(wrapped(bytes(31))),
    "a longer key": _raw(wrapped(bytes(33))),
    "no ciphertext": _raw(bytes(140)),
}


@pytest.mark.parametrize("box", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_breaks_a_rule_is_refused_before_the_server_is_asked(box: bytes) -> None:
    client = Client()
    uses: list[Callable[[], bytes]] = [
        lambda: opened(box, client=client),
        lambda: changed(files.reencrypt_file, box, client, key_id="billing"),
        lambda: changed(files.add_recipient, box, client, key_id="billing"),
        lambda: changed(files.drop_recipient, box, to_server=False, key_id="default"),
    ]
    for use in uses:
        with pytest.raises(InputError, match="MKE2 file"):
            use()
    assert client.asked == []


def test_a_header_that_is_cut_off_is_refused() -> None:
    header, _ = parts(sealed(b"x"))
    for length in range(4, len(header)):
        with pytest.raises(InputError, match="not a whole MKE2 file"):
            opened(header[:length])


def test_no_header_is_made_for_no_or_too_many_recipients() -> None:
    for number in (0, MAX_RECIPIENTS + 1):
        recipients = [mke2.recipient(wrapped(bytes(32), version=one + 1)) for one in range(number)]
        with pytest.raises(InputError, match="1 to 16 recipients"):
            Header(recipients, bytes(32), bytes(32)).encode()


# Its recipients.


def shared(*others: str, content: bytes = b"content") -> bytes:
    box = sealed(content)
    for other in others:
        box = changed(files.add_recipient, box, key_id=other)
    return box


def test_each_recipient_opens_it_and_its_body_stays_as_it_is() -> None:
    box = shared("billing", "archive")
    assert groups(box) == [("default", 1), ("billing", 2), ("archive", 2)]
    for name in KEKS:
        assert opened(box, source_key_id=name) == b"content"
    moved = changed(files.reencrypt_file, box, key_id="billing", source_key_id="archive")
    assert groups(moved) == [("default", 1), ("billing", 2)], "two of one version come to be one"
    left = changed(files.drop_recipient, box, to_server=False, key_id="default")
    assert groups(left) == [("billing", 2), ("archive", 2)]
    for other in (box, moved, left):
        assert other.endswith(parts(box)[0][-64:] + parts(box)[1][0])
        assert opened(other) == b"content"


def test_the_first_that_the_server_opens_is_taken_and_each_is_asked_for_by_its_group() -> None:
    box = shared("billing", "archive")
    client = Client()
    client.refuses = {"default": UnauthorizedError("no"), "billing": DecryptionFailedError()}
    assert opened(box, client=client) == b"content"
    assert client.asked == [("default", "default"), ("billing", "billing"), ("archive", "archive")]
    client.refuses["archive"] = DecryptionFailedError()
    with pytest.raises(UnauthorizedError):
        opened(box, client=client)
    client.refuses = {"default": ProtocolError("broken")}
    with pytest.raises(ProtocolError):
        opened(box, client=client)


def test_only_the_group_that_it_has_to_be_under_is_asked_for() -> None:
    client = Client()
    assert opened(shared("billing"), client=client, source_key_id="billing") == b"content"
    with pytest.raises(DecryptionFailedError):
        opened(shared("billing"), client=client, source_key_id="archive")
    assert client.asked == [("billing", "billing")]


def test_a_data_key_of_another_file_opens_nothing_and_the_next_recipient_is_not_tried() -> None:
    mine, other = shared("billing"), sealed(b"other")
    header = mke2.read_header(io.BytesIO(mine[4:]).read)
    planted = mke2.read_header(io.BytesIO(other[4:]).read).recipients[0]
    client = Client()
    with pytest.raises(AlteredFileError):
        opened(header._replace(recipients=[planted, header.recipients[1]]).encode() + parts(mine)[1][0], client=client)
    assert client.asked == [("default", "default")]


def test_of_several_groups_the_one_to_move_has_to_be_named() -> None:
    box = shared("billing")
    with pytest.raises(InputError, match=r"under several key groups \(billing, default\); name the one to move from"):
        changed(files.reencrypt_file, box, key_id="archive")
    assert groups(changed(files.reencrypt_file, box, key_id="default")) == [("default", 2), ("billing", 2)]
    assert groups(changed(files.reencrypt_file, box, key_id="archive", source_key_id="default")) == [
        ("archive", 2),
        ("billing", 2),
    ]
    with pytest.raises(DecryptionFailedError):
        changed(files.reencrypt_file, box, key_id="default", source_key_id="archive")


def test_the_last_recipient_stays_and_what_is_none_cannot_be_dropped() -> None:
    with pytest.raises(InputError, match="under the key group default alone; add another first"):
        changed(files.drop_recipient, sealed(b"x"), to_server=False, key_id="default")
    with pytest.raises(InputError, match="is not under the key group billing"):
        changed(files.drop_recipient, sealed(b"x"), to_server=False, key_id="billing")


def test_a_file_has_at_most_16_recipients() -> None:
    box = sealed(b"x")
    header = mke2.read_header(io.BytesIO(box[4:]).read)
    key = keks.opened(KEKS["default"], header.recipients[0].wrapped)
    many = [mke2.recipient(wrapped(key, version=number + 1)) for number in range(MAX_RECIPIENTS)]
    full = header._replace(recipients=many).encode() + parts(box)[1][0]
    assert opened(full) == b"x"
    with pytest.raises(InputError, match="1 to 16 recipients"):
        changed(files.add_recipient, full, key_id="billing")


@pytest.mark.parametrize("content", [b"MKE1" + bytes(200), b"text", b"", wrapped(bytes(32))])
def test_another_file_can_be_under_no_second_group(content: bytes) -> None:
    client = Client()
    uses: list[Callable[[], bytes]] = [
        lambda: changed(files.add_recipient, content, client, key_id="billing"),
        lambda: changed(files.drop_recipient, content, to_server=False, key_id="billing"),
    ]
    for use in uses:
        with pytest.raises(InputError, match="is not an MKE2 file; only those can be under several key groups"):
            use()
    assert client.asked == []


def test_a_server_that_wraps_keys_as_earlier_ones_did_is_told() -> None:
    class Earlier(Client):
        def generate_data_key(
            self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
        ) -> DataKey:
            return DataKey(bytes(32), keks.sealed_earlier(EnvelopeKey(Secret(bytearray(32))), bytes(32)))

    with pytest.raises(ProtocolError, match="write MKE1, or take a newer server"):
        files.encrypt_file(Earlier(), io.BytesIO(b"x"), io.BytesIO())
    output = io.BytesIO()
    files.encrypt_file(Earlier(), io.BytesIO(b"x"), output, file_format=files.FileFormat.MKE1)
    assert output.getvalue().startswith(b"MKE1")


def test_a_file_tells_which_keys_it_is_under(tmp_path: Path) -> None:
    for content, found in (
        (shared("billing"), [("default", 1), ("billing", 2)]),
        (b"MKE1" + len(GOOD).to_bytes(4, "big") + GOOD + bytes(40), [("default", 1)]),
        (GOOD, [("default", 1)]),
        (b"text", None),
        (b"", None),
        (bytes(4 << 20), None),
    ):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert files.keks_of(path) == found
    (tmp_path / "file").write_bytes(_raw())
    with pytest.raises(InputError):
        files.keks_of(tmp_path / "file")
