"""Files under a data key: whole and authentic at their name, or not there at all."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kms.client import files
from kms.client.file_io import source_size
from kms.client.files import FileFormat, decrypt_file, reencrypt_file
from kms.client.protocol import DataKey
from kms.core import ciphertext as ciphertexts
from kms.core import mke1
from kms.core.ciphertext import Purpose
from kms.core.kek import Kek
from kms.core.secret import Secret
from kms.errors import (
    AlteredFileError,
    DecryptionFailedError,
    FileAccessError,
    InputError,
    InputMissingError,
    ProtocolError,
)
from kms.limits import FILE_CHUNK_BYTES, MAX_FRAME_BYTES, MAX_GCM_PLAINTEXT_BYTES
from kms_tests import keks

SIZES = [0, 1, 15, 16, 17, FILE_CHUNK_BYTES - 1, FILE_CHUNK_BYTES, FILE_CHUNK_BYTES + 1, 2 * FILE_CHUNK_BYTES + 5]


class FakeClient:
    """A server in memory: one KEK for each group name."""

    def __init__(self) -> None:
        self.calls = 0

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        plaintext = os.urandom(32)
        return DataKey(plaintext, self.encrypt(plaintext, key_id or "default", aad))

    def encrypt(self, plaintext: bytes, key_id: str, aad: bytes) -> bytes:
        self.calls += 1
        return keks.sealed(self._key(key_id), plaintext, aad, group=key_id, purpose=Purpose.DATA_KEY)

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        self.calls += 1
        parsed = ciphertexts.parse(ciphertext)
        if parsed.version != 1 or source_key_id not in (None, parsed.group):
            raise DecryptionFailedError
        return self._key(parsed.group).open(parsed, aad)

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return self.encrypt(self.decrypt(ciphertext, aad, source_key_id=source_key_id), key_id, aad)

    def _key(self, group: str) -> Kek:
        return Kek(Secret(bytearray(group.encode().ljust(32, b"-"))))


CLIENT = FakeClient()


class Written:
    """The container that is written in a test."""

    format = FileFormat.MKE2


@pytest.fixture(params=FileFormat, autouse=True)
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FileFormat:
    """Each test is run with either container."""
    form: FileFormat = request.param
    monkeypatch.setattr(Written, "format", form)
    return form


only_mke1 = pytest.mark.parametrize("written", [FileFormat.MKE1], indirect=True)


def encrypt_file(*arguments: Any, **others: Any) -> None:
    files.encrypt_file(*arguments, **others, file_format=Written.format)


def header_end(box: bytes) -> int:
    if box[:4] == b"MKE1":
        return 8 + int.from_bytes(box[4:8], "big")
    end = 5
    for _ in range(box[4]):
        end += 2 + int.from_bytes(box[end : end + 2], "big")
    return end + 64


def sealed(plaintext: bytes, aad: bytes = b"") -> bytes:
    output = io.BytesIO()
    encrypt_file(CLIENT, io.BytesIO(plaintext), output, aad=aad)
    return output.getvalue()


def opened(box: bytes, aad: bytes = b"") -> bytes:
    output = io.BytesIO()
    decrypt_file(CLIENT, io.BytesIO(box), output, aad=aad)
    return output.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_comes_back_and_progress_adds_up_to_it(tmp_path: Path, size: int) -> None:
    plain, box, back = tmp_path / "plain", tmp_path / "box", tmp_path / "back"
    plain.write_bytes(os.urandom(size))
    done: list[int] = []
    encrypt_file(CLIENT, plain, box, key_id="g", aad=b"a", progress=done.append)
    assert sum(done) == size
    done.clear()
    decrypt_file(CLIENT, box, back, aad=b"a", progress=done.append)
    assert sum(done) == source_size(box)
    assert back.read_bytes() == plain.read_bytes()
    assert back.stat().st_mode & 0o777 == 0o600
    assert opened(box.read_bytes(), b"a") == plain.read_bytes()
    assert sorted(tmp_path.iterdir()) == [back, box, plain]


def test_standard_input_and_output_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    encrypt_file(CLIENT, None, None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(capfdbinary.readouterr().out)))
    decrypt_file(CLIENT, None, None)
    assert capfdbinary.readouterr().out == b"hello"


def test_a_pipe_that_gives_a_few_bytes_at_a_time_is_read_to_its_end(tmp_path: Path) -> None:
    box = sealed(b"x" * 3000)
    read_end, write_end = os.pipe()

    def feed() -> None:
        for start in range(0, len(box), 7):
            os.write(write_end, box[start : start + 7])
        os.close(write_end)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(read_end, "rb", buffering=0) as source:
        decrypt_file(CLIENT, source, tmp_path / "out")
    thread.join()
    assert (tmp_path / "out").read_bytes() == b"x" * 3000


def test_an_output_that_takes_only_a_part_of_each_write_gets_all() -> None:
    class Slow(io.BytesIO):
        def write(self, data: object) -> int:
            return super().write(bytes(data)[:5])  # type: ignore[call-overload]

    output = Slow()
    decrypt_file(CLIENT, io.BytesIO(sealed(b"0123456789abc")), output)
    assert output.getvalue() == b"0123456789abc"


def test_a_container_cut_off_anywhere_is_refused_and_releases_nothing(tmp_path: Path) -> None:
    box = sealed(b"some plaintext")
    existing = tmp_path / "out"
    existing.write_bytes(b"as it was")
    for length in range(len(box)):
        error = InputError if length < header_end(box) else DecryptionFailedError
        output = io.BytesIO()
        for target in (output, existing):
            with pytest.raises(error):
                decrypt_file(CLIENT, io.BytesIO(box[:length]), target)
        assert output.getvalue() == b""
    assert existing.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [existing]


def test_a_flipped_bit_anywhere_is_refused_and_releases_nothing(tmp_path: Path) -> None:
    box = bytearray(sealed(b"some plaintext"))
    for position in range(len(box)):
        for bit in (0, 7):
            box[position] ^= 1 << bit
            output = io.BytesIO()
            for target in (output, tmp_path / "out"):
                with pytest.raises((InputError, DecryptionFailedError)):
                    decrypt_file(CLIENT, io.BytesIO(box), target)
            assert output.getvalue() == b""
            box[position] ^= 1 << bit
    assert list(tmp_path.iterdir()) == []


def test_bytes_added_at_the_end_or_another_aad_are_refused() -> None:
    for box, aad in ((sealed(b"x") + b"y", b""), (sealed(b"x", b"a"), b"b"), (sealed(b"x", b"a"), b"")):
        with pytest.raises(DecryptionFailedError):
            opened(box, aad)


def test_a_file_that_is_no_container_is_refused_before_the_server_is_asked() -> None:
    client = FakeClient()
    for content in (b"", b"MKE", b"MKE2" + bytes(100), b"MKE1" + b"\xff" * 100, b"plain text of some length"):
        with pytest.raises(InputError):
            decrypt_file(client, io.BytesIO(content), io.BytesIO())
    assert client.calls == 0


def test_a_data_key_of_another_length_is_a_protocol_error(tmp_path: Path) -> None:
    class Odd(FakeClient):
        def generate_data_key(
            self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
        ) -> DataKey:
            return DataKey(b"short", b"w")

    with pytest.raises(ProtocolError):
        encrypt_file(Odd(), io.BytesIO(b"x"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@only_mke1
def test_a_container_around_something_else_than_a_data_key_is_refused() -> None:
    wrapped = CLIENT.encrypt(b"a short secret", "default", b"")
    with pytest.raises(InputError, match="something else"):
        opened(mke1.header(wrapped) + bytes(60))


@only_mke1
def test_a_secret_in_the_place_of_a_data_key_is_moved_nowhere() -> None:
    # Of another group, put into a header by somebody who may read the one that files are moved to.
    for secret in (b"", b"four", b"payroll " * 5, bytes(31), bytes(33)):
        client = FakeClient()
        planted = b"MKE1" + len(client.encrypt(secret, "payroll", b"")).to_bytes(4, "big")
        planted += client.encrypt(secret, "payroll", b"") + b"\x01\x01" + bytes(200)
        calls = client.calls
        target = io.BytesIO()
        with pytest.raises(InputError, match="something else"):
            reencrypt_file(client, io.BytesIO(planted), target, key_id="shared")
        with pytest.raises(InputError, match="something else"):
            decrypt_file(client, io.BytesIO(planted), target)
        assert (client.calls, target.getvalue()) == (calls, b"")


def test_a_file_under_another_group_than_the_one_it_has_to_be_under_does_not_open(tmp_path: Path) -> None:
    whole = sealed(b"plaintext")
    blob = CLIENT.encrypt(b"secret", "default", b"")
    out = io.BytesIO()
    decrypt_file(CLIENT, io.BytesIO(whole), out, source_key_id="default")
    assert out.getvalue() == b"plaintext"
    reencrypt_file(CLIENT, io.BytesIO(whole), tmp_path / "out", key_id="x", source_key_id="default")
    reencrypt_file(CLIENT, io.BytesIO(blob), tmp_path / "out", key_id="x", source_key_id="default")
    for source in (whole, blob):
        for target in (tmp_path / "none", io.BytesIO()):
            with pytest.raises(DecryptionFailedError):
                reencrypt_file(CLIENT, io.BytesIO(source), target, key_id="x", source_key_id="other")
    with pytest.raises(DecryptionFailedError):
        decrypt_file(CLIENT, io.BytesIO(whole), tmp_path / "none", source_key_id="other")
    assert not (tmp_path / "none").exists()


def test_a_source_that_cannot_be_read_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no file"):
        encrypt_file(CLIENT, tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError, match="directory"):
        encrypt_file(CLIENT, tmp_path, tmp_path / "out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileAccessError, match="cannot read"):
        encrypt_file(CLIENT, tmp_path / "loop", tmp_path / "out")
    assert source_size(tmp_path) is None
    assert source_size(tmp_path / "none") is None
    assert source_size(None) is None


@only_mke1
def test_a_source_larger_than_gcm_allows_is_refused_before_any_work(tmp_path: Path) -> None:
    source = tmp_path / "huge"
    with source.open("wb") as file:
        file.truncate(MAX_GCM_PLAINTEXT_BYTES + 1)
    client = FakeClient()
    with pytest.raises(InputError, match="64 GiB"):
        encrypt_file(client, source, tmp_path / "out")
    assert client.calls == 0


def test_a_target_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    client = FakeClient()
    with pytest.raises(InputError, match="use - for standard output"):
        encrypt_file(client, io.BytesIO(b"x"), tmp_path)
    assert client.calls == 0


def test_a_pipe_is_written_to_once_all_is_verified_and_stays_one(tmp_path: Path) -> None:
    fifo, source = tmp_path / "fifo", tmp_path / "source"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    source.write_bytes(sealed(b"plaintext"))
    decrypt_file(CLIENT, source, fifo)
    assert os.read(reader, 100) == b"plaintext"
    altered = bytearray(source.read_bytes())
    altered[-1] ^= 1
    source.write_bytes(altered)
    with pytest.raises(DecryptionFailedError):
        decrypt_file(CLIENT, source, fifo)
    with pytest.raises(BlockingIOError):
        os.read(reader, 100)
    os.close(reader)
    assert fifo.is_fifo()


def test_a_target_in_no_directory_or_a_loop_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="make its directory first"):
        encrypt_file(CLIENT, io.BytesIO(b"x"), tmp_path / "none" / "out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileAccessError, match="cannot write"):
        encrypt_file(CLIENT, io.BytesIO(b"x"), tmp_path / "loop")


def test_a_symbolic_link_to_the_target_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to("real")
    decrypt_file(CLIENT, io.BytesIO(sealed(b"new")), link)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_a_file_may_be_encrypted_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"plain")
    encrypt_file(CLIENT, path, path)
    assert opened(path.read_bytes()) == b"plain"


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"as it was")
    box = sealed(b"x")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        works: list[Callable[[], None]] = [
            lambda: encrypt_file(CLIENT, io.BytesIO(b"x"), target),
            lambda: decrypt_file(CLIENT, io.BytesIO(box), target),
            lambda: reencrypt_file(CLIENT, io.BytesIO(box), target, key_id="g"),
        ]
        for work in works:
            with pytest.raises(FileAccessError, match="No space left on device; free some space"):
                work()
    assert target.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_says_that_the_outcome_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(FileAccessError, match="either the old or the new"):
        encrypt_file(CLIENT, io.BytesIO(b"x"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", ["readinto", "write", "flush"])
def test_a_failing_stream_is_a_file_access_error(failure: str) -> None:
    class Failing(io.BytesIO):
        def fail(self, *_: object) -> int:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    stream = Failing(b"x")
    setattr(stream, failure, stream.fail)
    with pytest.raises(FileAccessError, match="Broken pipe"):
        encrypt_file(CLIENT, stream, stream)


@only_mke1
def test_no_room_for_the_temporary_file_names_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    box = sealed(b"x")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(FileAccessError, match="temporary file in"):
        opened(box)


def _open_in(directory: Path) -> list[Path]:
    """What this process has open in `directory`, also what has no name there."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(entry.readlink())
    return [path for path in found if path.parent == directory]


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    plaintext = bytes(2 * FILE_CHUNK_BYTES)

    def interrupt(_: int) -> None:
        # The header is read before the output is made.
        if any("/#" in str(link) or link.name.startswith(".kms") for link in _open_in(tmp_path)):
            raise KeyboardInterrupt

    box = sealed(plaintext)
    works: list[Callable[[], None]] = [
        lambda: encrypt_file(CLIENT, io.BytesIO(plaintext), tmp_path / "out", progress=interrupt),
        lambda: decrypt_file(CLIENT, io.BytesIO(box), tmp_path / "out", progress=interrupt),
        lambda: reencrypt_file(CLIENT, io.BytesIO(box), tmp_path / "out", key_id="g", progress=interrupt),
    ]
    for work in works:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert list(tmp_path.iterdir()) == []


def test_reencrypting_a_container_changes_its_header_only(tmp_path: Path) -> None:
    box = sealed(b"x" * (FILE_CHUNK_BYTES + 9), b"a")
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(box)
    done: list[int] = []
    reencrypt_file(CLIENT, old, new, key_id="other", aad=b"a", progress=done.append)
    moved = new.read_bytes()
    # Salt and commitment of MKE2 stay, too.
    rest = 64 if Written.format is FileFormat.MKE2 else 0
    assert moved[header_end(moved) - rest :] == box[header_end(box) - rest :]
    assert files.keks_of(old) == [("default", 1)]
    assert files.keks_of(new) == [("other", 1)]
    assert opened(moved, b"a") == b"x" * (FILE_CHUNK_BYTES + 9)
    assert sum(done) == len(box)


@pytest.mark.parametrize("length", [4, 7, 8, 20])
def test_reencrypting_a_container_cut_off_in_its_header_is_an_input_error(length: int) -> None:
    client = FakeClient()
    with pytest.raises(InputError):
        reencrypt_file(client, io.BytesIO(sealed(b"x")[:length]), io.BytesIO(), key_id="g")
    assert client.calls == 0


def test_reencrypting_one_ciphertext_answers_in_the_same_form() -> None:
    raw = CLIENT.encrypt(b"secret" * 30, "default", b"a")
    forms: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
        "raw": (raw, lambda output: output),
        "base64": (base64.b64encode(raw), lambda output: base64.b64decode(output, validate=True)),
        "line": (base64.b64encode(raw) + b"\n", lambda output: base64.b64decode(output.removesuffix(b"\n"), validate=True)),
        "lines": (base64.encodebytes(raw), lambda output: base64.b64decode(output[:-1], validate=True)),
    }
    for content, decode in forms.values():
        output = io.BytesIO()
        reencrypt_file(CLIENT, io.BytesIO(content), output, key_id="other", aad=b"a")
        blob = decode(output.getvalue())
        assert ciphertexts.parse(blob).group == "other"
        assert CLIENT.decrypt(blob, b"a") == b"secret" * 30


@pytest.mark.parametrize(
    "content",
    [b"", b"MKE", b"some text", b"Axxx", b"\x01\x02\x03", b"\x02" + bytes(MAX_FRAME_BYTES), base64.b64encode(b"\x01" * 90)],
)
def test_reencrypting_what_is_no_ciphertext_or_too_large_is_an_input_error(content: bytes) -> None:
    client = FakeClient()
    with pytest.raises(InputError):
        reencrypt_file(client, io.BytesIO(content), io.BytesIO(), key_id="g")
    assert client.calls == 0


@only_mke1
def test_progress_counts_both_passes_of_what_is_verified_before_it_is_written(tmp_path: Path) -> None:
    plain, box = tmp_path / "plain", tmp_path / "box"
    plain.write_bytes(os.urandom(3 * FILE_CHUNK_BYTES + 5))
    encrypt_file(CLIENT, plain, box)
    done: list[int] = []

    class Output(io.BytesIO):
        at_first_byte = 0

        def write(self, data: object, /) -> int:
            self.at_first_byte = self.at_first_byte or sum(done)
            return len(memoryview(data))  # type: ignore[arg-type]

    output = Output()
    decrypt_file(CLIENT, box, output, progress=done.append)
    assert sum(done) in range(box.stat().st_size - 3, box.stat().st_size + 1)
    assert output.at_first_byte < 0.9 * box.stat().st_size, "not all is done before anything is written"


def test_a_damaged_file_is_not_taken_for_a_wrong_context(tmp_path: Path) -> None:
    plain, box = tmp_path / "plain", tmp_path / "box"
    plain.write_bytes(b"hello")
    encrypt_file(CLIENT, plain, box, aad=b"a")
    whole = box.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]):
        box.write_bytes(damaged)
        for target in (tmp_path / "back", io.BytesIO()):
            with pytest.raises(AlteredFileError, match=r"^decryption failed$"):
                decrypt_file(CLIENT, box, target, aad=b"a")
    box.write_bytes(whole)
    with pytest.raises(DecryptionFailedError) as refusal:
        decrypt_file(CLIENT, box, tmp_path / "back", aad=b"b")
    assert type(refusal.value) is DecryptionFailedError
