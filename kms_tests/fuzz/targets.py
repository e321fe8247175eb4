"""What is fuzzed: for each parser of bytes from outside, one function that takes any bytes and checks every promise.

A check passes silently, or raises: anything but the parser's declared error is a bug, and so is a `ForgedError` (it
opened or loaded something that nobody made) or an `IllegalError` (what it returned breaks the rules of its kind).
The checks have no state and their keys are the same in every process, so that one input always means the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
import unicodedata
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from unittest import mock

from kms import limits
from kms.client import files
from kms.client.protocol import DataKey
from kms.core import audit, derive, mke2
from kms.core import ciphertext as ciphertexts
from kms.core.ciphertext import Purpose
from kms.core.derive import KdfParameters
from kms.core.envelope import EnvelopeKey
from kms.core.kek import Kek
from kms.core.keyring import (
    EMPTY,
    Command,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    Keyring,
    KeySlot,
    NewKey,
    RotateGroup,
    apply,
)
from kms.core.keyring import VersionStatus as Status
from kms.core.policy import AllowAll, Operation
from kms.core.secret import Secret
from kms.core.usage import Operations, Refusals, TimedDisable
from kms.errors import ConfigError, DecryptionFailedError, InputError, KeystoreError, WrongPassphraseError
from kms.host.secret_input import read_passphrase
from kms.server.config import ENVIRONMENT, resolve
from kms.service.audit_settings import AuditSettings
from kms.service.authentication import Authenticator
from kms.service.handlers import Handlers
from kms.service.local_provider import LocalMasterKeyProvider
from kms.service.pipeline import RequestPipeline, Streamed
from kms.service.principals import parse as parse_principals
from kms.service.served import Peer
from kms.service.usage import Usage
from kms.storage import format2, format3, format4, formats, journal, usage_file
from kms.storage.root_keys import RootKeys
from kms.storage.stored import WRONG_PASSPHRASE, KdfHeader
from kms.wire import messages
from kms.wire.framing import Framer
from kms.wire.messages import UndecodableRequestError, decode_request
from kms_tests import earlier_keystore, java_keystore
from kms_tests.keks import earlier_header
from kms_tests.test_principals import EXAMPLE as PRINCIPALS

API, ADMIN = "api-token", "an admin token that no input has"
PASSPHRASE = "correct horse"
SALT = bytes(range(16))
AAD = b"context"
HEADER = KdfHeader(KdfParameters(8, 1, 1), SALT)
_PEER = Peer(1, "unix")
_MAX_KDF_MEMORY_KIB = 64
_MAX_KDF_ITERATIONS = 4

DECRYPTION_FAILED: Final = b'{"status":"error","errorCode":"DecryptionFailed","message":"decryption failed"}'


class ForgedError(AssertionError):
    """Something opened or loaded that nobody made."""


class IllegalError(AssertionError):
    """What was returned breaks the rules of its kind."""


def _require(promise: bool, what: str) -> None:
    if not promise:
        raise IllegalError(what)


def _secret(text: str) -> Secret:
    return Secret(bytearray(text.encode()))


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Nonces, salts and keys that are drawn within are the same in every process."""
    with mock.patch("os.urandom", random.Random(seed).randbytes):
        yield


@dataclass(frozen=True)
class World:
    """A keyring in every state, all that serves it, and everything that was ever made with it."""

    keyring: Keyring
    keys: RootKeys
    pipeline: RequestPipeline
    provider: LocalMasterKeyProvider
    ciphertexts: dict[bytes, bytes]
    """Each ciphertext that opens, and its plaintext."""
    closed: tuple[bytes, ...]
    """Ciphertexts of versions that are disabled or destroyed."""


@cache
def world() -> World:
    """The one world there is."""
    with _repeatable(1):
        return _made_world()


def _made_world() -> World:
    with HEADER.derive(_secret(PASSPHRASE)) as root:
        keys = RootKeys(root)

    def mint(slot: KeySlot) -> NewKey:
        with Secret(bytearray(os.urandom(limits.KEY_BYTES))) as kek:
            earlier[slot.group, slot.version] = EnvelopeKey(kek)
            return NewKey(Kek(kek), keys.wrap(slot, kek))

    earlier: dict[tuple[str, int], EnvelopeKey] = {}
    keyring = EMPTY
    create = [CreateGroup(name, uuid=os.urandom(limits.UUID_BYTES)) for name in ("default", "billing")]
    commands: list[Command] = [*create, *[RotateGroup("billing")] * 3]
    for command in commands:
        keyring = apply(keyring, command, now=1_700_000_000, mint=mint)
    holder = SimpleNamespace(current=keyring)
    provider = LocalMasterKeyProvider(holder)
    opens: dict[bytes, bytes] = {}
    for group in keyring.groups.values():
        for version in group.versions.values():
            assert version.key is not None
            plaintext = f"plaintext of {group.key_id} v{version.version}".encode()
            for purpose in Purpose:
                opens[version.key.seal(plaintext, AAD, purpose, version.kek_id)] = plaintext
            old = earlier[group.key_id, version.version]
            opens[old.seal(plaintext, AAD, earlier_header(version.kek_id))] = plaintext
    shut = [blob for blob in opens if ciphertexts.parse(blob)[:2] in (("billing", 1), ("billing", 2))]
    for change in (DestroyVersion("billing", 1), DisableVersion("billing", 2)):
        holder.current = keyring = apply(keyring, change, now=1_700_000_001, mint=mint)
    for blob in shut:
        del opens[blob]
    return World(keyring.next_generation(), keys, _pipeline(provider), provider, opens, tuple(shut))


def _pipeline(provider: LocalMasterKeyProvider) -> RequestPipeline:
    # Only the data plane is fuzzed through it, so there is nobody to change keys.
    nobody: Any = None
    handlers = Handlers(provider, nobody, nobody, random=lambda length: os.urandom(length))
    return RequestPipeline(handlers, Authenticator(_secret(API), _secret(ADMIN)), AllowAll())


def decrypt_line(blob: bytes, kind: str = "Decrypt", aad: bytes = AAD) -> bytes:
    """A request to open `blob`."""
    fields = {"type": kind, "token": API, "ciphertext": b64encode(blob).decode(), "aad": b64encode(aad).decode()}
    return json.dumps(fields).encode()


def check_stream(data: bytes) -> None:
    """Any bytes are frames, whole and in order however they arrive; each is a request or an `UndecodableRequestError`."""
    framer = Framer(limits.MAX_FRAME_BYTES)
    at = len(data) // 3
    frames = framer.feed(data[:at]) + framer.feed(data[at:]) + framer.finish()
    other = Framer(limits.MAX_FRAME_BYTES)
    _require(frames == other.feed(data) + other.finish(), "the frames depend on how the stream was cut")
    for frame in frames:
        _check_line(frame)


def _check_line(line: bytes) -> None:
    try:
        request = decode_request(line)
    except UndecodableRequestError as error:
        _require(bool(str(error.reason)), "a refusal without a reason")
        return
    _require(decode_request(messages.encode(request)) == request, "a request that does not survive its own encoding")
    for name in request.__struct_fields__:
        value = getattr(request, name)
        _require(type(value) in (str, bytes, int, bool, type(None)), f"{name} has an impossible type")
    if isinstance(request, messages.VersionRequest):
        _require(1 <= request.version <= limits.MAX_VERSION, "a version out of its range")
    if isinstance(request, messages.DisableVersion) and request.for_seconds is not None:
        _require(1 <= request.for_seconds <= limits.MAX_TIMED_DISABLE_SECONDS, "a time out of its range")


def stretch(data: bytes, size: int = limits.MAX_FRAME_BYTES) -> bytes:
    """From `before FF unit FF after` a line of at most `size` bytes, with `unit` repeated in its middle, whole."""
    before, _, rest = data.partition(b"\xff")
    unit, _, after = rest.partition(b"\xff")
    room = size - len(before) - len(after)
    unit = unit or b" "
    return before + unit * (room // len(unit)) + after


def check_long_line(data: bytes) -> None:
    """The same for a line of a whole megabyte, which a short input describes: where slow algorithms show."""
    _check_line(stretch(data).replace(b"\n", b" "))


def _at_once(answer: Awaitable[bytes | Streamed]) -> bytes:
    """The answer of the control plane to someone without its token, which waits for nothing."""
    step = answer.__await__()
    try:
        next(step)
    except StopIteration as stop:
        _require(isinstance(stop.value, bytes), "a stranger is shown a list")
        return bytes(stop.value)
    raise IllegalError("a stranger's request waits for the disk")


def check_request(data: bytes) -> None:
    """Whatever one line asks, the server answers it with one line of JSON, and never with its own fault."""
    line = data.replace(b"\n", b" ")
    answer = world().pipeline.session(_PEER).serve(line)
    if not isinstance(answer, bytes):
        answer = _at_once(answer())
    reply = json.loads(answer)
    _require(b"\n" not in answer, "an answer of more than one line")
    _require(reply["status"] == "ok" or reply["errorCode"] != "InternalError", f"the server's own fault: {reply}")


def check_ciphertext(data: bytes) -> None:
    """A blob opens only if it was made, to what it was made of; else there is one and the same reply."""
    known = world().ciphertexts.get(data)
    for kind, wanted in (("Decrypt", b"plaintext"), ("ReEncrypt", b"ciphertext")):
        answer = world().pipeline.session(_PEER).serve(decrypt_line(data, kind))
        assert isinstance(answer, bytes)
        if known is None:
            if answer.startswith(b'{"status":"ok"'):
                raise ForgedError(f"{kind} took a ciphertext that nobody made")
            _require(answer == DECRYPTION_FAILED, f"another error than the one: {answer!r}")
        else:
            _require(answer.startswith(b'{"status":"ok","' + wanted), f"a ciphertext that was made is refused: {answer!r}")


def check_edited_ciphertext(data: bytes) -> None:
    """The same for a ciphertext that was made, with edits: which one, then where, and which bits, of each.

    By chance nearly all that is made of one is altered in several places, of which any makes it fail.
    """
    which, *edits = data or b"\0"
    made = list(world().ciphertexts)
    blob = bytearray(made[which % len(made)])
    for at, bits in zip(edits[::2], edits[1::2], strict=False):
        blob[at % len(blob)] ^= bits
    check_ciphertext(bytes(blob))


class _LocalClient:
    """What the file functions need of a client, without a server."""

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        key = os.urandom(limits.KEY_BYTES)
        return DataKey(key, world().provider.seal(key_id or "default", key, aad, Purpose.DATA_KEY))

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return world().provider.open(ciphertexts.parse(ciphertext), aad, source_key_id)

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        plaintext = self.decrypt(ciphertext, aad, source_key_id=source_key_id)
        return world().provider.seal(key_id, plaintext, aad, ciphertexts.parse(ciphertext).purpose)


@cache
def containers() -> dict[bytes, bytes]:
    """Each container that was made, and its file."""
    made = {}
    for content in (b"", b"x", bytes(range(256)) * 5):
        for form in files.FileFormat:
            target = BytesIO()
            with _repeatable(2 + len(content)):
                files.encrypt_file(_LocalClient(), BytesIO(content), target, aad=AAD, file_format=form)
            made[target.getvalue()] = content
    return made


def check_container(data: bytes) -> None:
    """A container decrypts only if it was made, and nothing is written before that is sure."""
    known = containers().get(data)
    target = BytesIO()
    try:
        files.decrypt_file(_LocalClient(), BytesIO(data), target, aad=AAD)
    except (InputError, DecryptionFailedError):
        _require(known is None, "a container that was made is refused")
        _require(target.getvalue() == b"", "plaintext was written that is not authentic")
        return
    if target.getvalue() != known:
        raise ForgedError("a container decrypted that nobody made")


def _recipients(box: bytes) -> Iterable[mke2.Recipient]:
    return mke2.read_header(BytesIO(box[4:]).read).recipients if box.startswith(b"MKE2") else ()


def check_reencrypt(data: bytes) -> None:
    """What is re-encrypted has a key or a ciphertext in it that was made; a container's body stays as it was."""
    target = BytesIO()
    try:
        files.reencrypt_file(_LocalClient(), BytesIO(data), target, key_id="billing", aad=AAD)
    except (InputError, DecryptionFailedError):
        return
    if data.startswith(b"MKE2"):
        header = mke2.read_header(BytesIO(data[4:]).read)
        wrapped = {one.wrapped for one in header.recipients}
        made = {one.wrapped for box in containers() for one in _recipients(box)}
        if not wrapped & made:
            raise ForgedError("a file with a data key that nobody wrapped was re-encrypted")
        _require(target.getvalue().endswith(data[len(header.encode()) - 64 :]), "the body of a file was changed")
    elif data.startswith(b"MKE1"):
        wrapped_end = 8 + int.from_bytes(data[4:8], "big")
        ours = {box[8 : 8 + int.from_bytes(box[4:8], "big")] for box in containers() if box.startswith(b"MKE1")}
        if data[8:wrapped_end] not in ours:
            raise ForgedError("a container with a data key that nobody wrapped was re-encrypted")
        _require(target.getvalue().endswith(data[wrapped_end:]), "the body of a container was changed")
    elif not any(blob in data or b64encode(blob) in b"".join(data.split()) for blob in world().ciphertexts):
        raise ForgedError("a ciphertext was re-encrypted that nobody made")


def encode4() -> bytes:
    """The world's keyring in format 4."""
    return bytes(format4.Encoder().encode(world().keyring, _front(), world().keys))


@cache
def _front() -> format4.Front:
    with _repeatable(2):
        return format4.Front(HEADER, world().keys.seal_check())


@cache
def root2() -> bytes:
    return java_keystore.root_key(PASSPHRASE, SALT)


@cache
def tree2() -> dict[str, Any]:
    """A keyring in every state in format 2."""
    with _repeatable(3):
        statuses = ("DESTROYED", "DISABLED", "ENABLED", "ACTIVE")
        versions = [java_keystore.Version(number, status) for number, status in enumerate(statuses, 1)]
        groups = [
            java_keystore.Group("default", 1, [java_keystore.Version(1, "ACTIVE")]),
            java_keystore.Group("Schlüssel 1", 4, versions),
        ]
        return java_keystore.tree(groups, root2(), SALT)


def encode2() -> bytes:
    return java_keystore.encode(tree2())


def open4(raw: bytes) -> Keyring:
    """The keyring of a format 4 file; a key derivation that costs more than the fuzzer has counts as a wrong passphrase."""
    sealed = format4.Sealed(raw, None)
    with _derive(sealed.header) as root:
        return sealed.open(root)


def encode3() -> bytes:
    """A keyring in every state in format 3."""
    return earlier_keystore.sealed(tree3(), _derive(HEADER))


@cache
def tree3() -> dict[str, Any]:
    statuses = ("DESTROYED", "DISABLED", "ENABLED", "ACTIVE")
    groups = [earlier_keystore.Group("default"), earlier_keystore.Group("billing", statuses)]
    with _repeatable(4):
        return earlier_keystore.tree(groups, _derive(HEADER), HEADER)


def open3(raw: bytes) -> Keyring:
    """The same of a format 3 file."""
    sealed = format3.Sealed(raw)
    with _derive(sealed.header) as root, _repeatable(5):
        return sealed.open(root, lambda _slot, _key: b"rewrapped")


def reseal3(tree: dict[str, Any]) -> bytes:
    """The tree with a right MAC, as only someone who knows the passphrase could make it."""
    body = _compact({name: value for name, value in tree.items() if name != "mac"})
    with format3.Keys(_derive(HEADER)) as keys:
        return body[:-1] + b',"mac":"' + b64encode(keys.mac(body)) + b'"}'


@cache
def journal_parts() -> tuple[bytes, bytes, tuple[bytes, ...], tuple[Keyring, ...]]:
    """A format 4 file, its journal, the lines of that, and the keyring with none of them, with one, and so on."""
    with _repeatable(6):
        keys, encoder, keyring = world().keys, format4.Encoder(), world().keyring
        name = "00112233-4455-4677-8899-aabbccddeeff"
        front = replace(_front(), journal=name)
        file = bytes(encoder.encode(keyring, front, keys))
        lines = [journal.header(name, keyring.generation, keys.journal_mac)]
        states = [keyring]

        def mint(slot: KeySlot) -> NewKey:
            with Secret(bytearray(os.urandom(limits.KEY_BYTES))) as kek:
                return NewKey(Kek(kek), keys.wrap(slot, kek))

        create = CreateGroup("later", uuid=os.urandom(limits.UUID_BYTES))
        for command in (RotateGroup("default"), create, DisableVersion("default", 1)):
            keyring = apply(keyring, command, now=1_700_000_002, mint=mint).next_generation()
            group = encoder.group(keyring.groups[command.group])
            lines.append(journal.record(keyring.generation, journal.mac_of(lines[-1]), [group], keys.journal_mac))
            states.append(keyring)
    return file, b"".join(lines), tuple(lines), tuple(states)


def open_journal(raw: bytes) -> Keyring:
    """The keyring of the format 4 file of `journal_parts` with another journal."""
    with _derive(HEADER) as root:
        return format4.Sealed(journal_parts()[0], raw).open(root)


def check_journal(data: bytes) -> None:
    """What is read of whatever is beside a keystore are the first of its own lines: all, or all but a torn end."""
    _, _, lines, states = journal_parts()
    try:
        keyring = open_journal(data)
    except KeystoreError:
        _require(data != b"".join(lines), "a journal that was made is refused")
        return
    count = next((n for n in range(len(lines), 0, -1) if data.startswith(b"".join(lines[:n]))), 0)
    if not count or keyring != states[count - 1]:
        raise ForgedError("a journal was read that nobody wrote")
    for line in lines[count:]:
        _require(line not in data, "what was answered is gone, and what came after it was there")


def open2(raw: bytes) -> Keyring:
    """The same of a format 2 file."""
    sealed = format2.Sealed(raw)
    root = Secret(bytearray(root2())) if sealed.header == HEADER else _derive(sealed.header)
    with _repeatable(5):
        return sealed.open(root, lambda _slot, _key: b"rewrapped")


def _derive(header: KdfHeader) -> Secret:
    costs = header.parameters
    if costs.memory_kib > _MAX_KDF_MEMORY_KIB or costs.iterations > _MAX_KDF_ITERATIONS:
        raise WrongPassphraseError(WRONG_PASSPHRASE)
    return derive.root_key(_secret(PASSPHRASE), header.salt, costs)


def _check_keystore(data: bytes, open_: Callable[[bytes], Keyring], made: bytes) -> None:
    try:
        formats.version_of(data)
        keyring = open_(data)
    except (KeystoreError, WrongPassphraseError):
        _require(data != made, "a keystore that was made is refused")
        return
    if keyring != open_(made):
        raise ForgedError("a keystore loaded that nobody made")


class KeystoreFormat(NamedTuple):
    """How a keystore of one format is made, made anew from its tree under a right MAC, and opened."""

    encode: Callable[[], bytes]
    reseal: Callable[[dict[str, Any]], bytes]
    open: Callable[[bytes], Keyring]
    name: str
    """The field that has the name of a group."""


def check_keystore4(data: bytes) -> None:
    """A format 4 file loads only as the keyring that was saved."""
    _check_keystore(data, open4, encode4())


def check_keystore3(data: bytes) -> None:
    """A format 3 file loads only as the keyring that was saved."""
    _check_keystore(data, open3, encode3())


def check_keystore2(data: bytes) -> None:
    """A format 2 file loads only as the keyring that was saved."""
    _check_keystore(data, open2, encode2())


def reseal4(tree: dict[str, Any]) -> bytes:
    """The tree with a right MAC, as only someone who knows the passphrase could make it."""
    body = {name: value for name, value in tree.items() if name != "mac"}
    message = _compact(body)
    return message[:-1] + b',"mac":"' + b64encode(world().keys.mac(message)) + b'"}'


def _compact(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def reseal2(tree: dict[str, Any]) -> bytes:
    """The same of format 2. A tree that its MAC cannot even be computed over keeps the one it has."""
    try:
        return _compact({**tree, "macBase64": java_keystore.mac(root2(), tree)})
    except Exception:  # whatever the independent writer cannot express
        return _compact(tree)


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(data)
        _compact(tree)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def check_resealed4(data: bytes) -> None:
    """Any tree under a right MAC is refused, or a legal keyring that can be saved and loaded."""
    tree = _parsed(data)
    if tree is not None:
        check_legal(reseal4(tree), open4)


def check_resealed3(data: bytes) -> None:
    """The same of format 3."""
    tree = _parsed(data)
    if tree is not None:
        check_legal(reseal3(tree), open3)


def check_resealed2(data: bytes) -> None:
    """The same of format 2."""
    tree = _parsed(data)
    if tree is not None:
        check_legal(reseal2(tree), open2)


def check_legal(raw: bytes, open_: Callable[[bytes], Keyring]) -> Keyring | None:
    """The keyring of a keystore that an insider may have made, if it loads: then it must keep every rule."""
    try:
        keyring = open_(raw)
    except (KeystoreError, WrongPassphraseError):
        return None
    for name, group in keyring.groups.items():
        _require(name == group.key_id and 1 <= len(name.encode()) <= limits.MAX_GROUP_NAME_BYTES, "an impossible name")
        _require(bool(name.strip()), "a blank name")
        _require(list(group.versions) == sorted(group.versions), "versions out of order")
        active = [v for v in group.versions.values() if v.status is Status.ACTIVE]
        _require(active == [group.active], "not exactly one active version")
        for number, version in group.versions.items():
            _require(number == version.version and 1 <= number <= limits.MAX_VERSION, "an impossible version")
            destroyed = version.status is Status.DESTROYED
            _require((version.key is None) is destroyed and (version.wrapped is None) is destroyed, "a key out of place")
    if open_ is open4:
        saved = bytes(format4.Encoder().encode(keyring, _front(), world().keys))
        _require(open4(saved) == keyring, "a keyring that does not survive a save")
    return keyring


def check_config(data: bytes) -> None:
    """Any flags and environment give a configuration within its bounds, or a `ConfigError`."""
    flags: dict[str, Any] = {}
    environ: dict[str, str] = {"HOME": "/nonexistent"}
    for line in data.replace(b"\0", b"").split(b"\n"):
        name, _, value = os.fsdecode(line).partition("=")
        if name in ENVIRONMENT:
            flags[name] = value
        elif name in ("no_tcp", "no_unix"):
            flags[name] = True
        elif name:
            environ[name] = value
    try:
        config = resolve(flags, environ)
    except ConfigError as error:
        _require(bool(str(error)), "a refusal without a reason")
        return
    _require(config.tcp_port is not None or config.unix_socket is not None, "no way in")
    _require(config.tcp_port is None or 0 <= config.tcp_port <= 65535, "an impossible port")
    _require(limits.MIN_FRAME_BYTES <= config.max_frame_bytes <= limits.MAX_FRAME_BYTES_CEILING, "an impossible frame")
    _require(1 <= config.max_connections <= limits.MAX_CONNECTIONS_CEILING, "impossible connections")
    _require(0 < config.idle_timeout <= 24 * 3600, "an impossible timeout")
    for settings in (config, config.audit):
        for field in fields(settings):
            value = getattr(settings, field.name)
            known = type(value) in (int, float, bool, type(None)) or isinstance(value, Path | Enum | AuditSettings)
            _require(known, f"{field.name} has an impossible type")


def check_usage_file(data: bytes) -> None:
    """A usage file is one that reads the same once written, and that a server can go on with; or an `InputError`."""
    try:
        parsed = usage_file.decode(data)
    except InputError:
        return
    again = usage_file.encode(parsed.since_epoch_sec, map(usage_file.encode_record, parsed.versions))
    _require(usage_file.decode(again) == parsed, "a file that reads otherwise once written")
    usage = Usage(world().keyring, parsed, Path("/nonexistent"), lambda: 0.0)
    for group in world().keyring.groups.values():
        for version in group.versions.values():
            usage.of(version)


@cache
def audit_log() -> tuple[audit.AuditKeys, bytes, frozenset[tuple[int, bytes]]]:
    """The keys of a log, the log, and where each of its records leaves the chain."""
    keys = audit.AuditKeys(Secret(bytearray(range(64))))
    records: list[audit.Record] = [audit.EventRecord(event="Start", previous="", generation=1)]
    records += [
        audit.OperationRecord(connection=1, request=number, operation="Encrypt", outcome="ok", generation=1)
        for number in (1, 2, 3)
    ]
    chain, log, ends = audit.NEW_CHAIN, b"", set()
    for record in records:
        line, chain = audit.seal([record], chain, keys)
        log += line
        ends.add((chain.seq, chain.mac))
    return keys, log, frozenset(ends)


def check_audit_tail(data: bytes) -> None:
    """The end of an audit log is one of ours, or none, or a `DecryptionFailedError`."""
    keys, _, ends = audit_log()
    try:
        tail = audit.read_tail(data, keys)
    except DecryptionFailedError:
        return
    if tail is not None and (tail.chain.seq, tail.chain.mac) not in ends:
        raise ForgedError("an audit log ends with a record that nobody wrote")


def _usage_seeds() -> list[bytes]:
    refused = {"api": Refusals(3, 9)}
    trial = TimedDisable("admin", 1, 2, refused, 3)
    records = [
        usage_file.Record("default", 1, Operations(1, 2, 3, 4, 5), 7, "api", trial),
        usage_file.Record("default", 2, Operations()),
    ]
    return [usage_file.encode(5, map(usage_file.encode_record, records))]


def check_principals(data: bytes) -> None:
    """A file of principals is one within its bounds, or a `ConfigError` of one line."""
    try:
        principals = parse_principals(data, Path("principals.toml"))
    except ConfigError as error:
        _require(str(error).isprintable(), "a refusal of more than one line")
        return
    _require(len(principals.members) <= limits.MAX_PRINCIPALS, "too many principals")
    digests = [token.digest for member in principals.members.values() for token in member.tokens]
    _require(len(digests) == len(set(digests)), "a token of two")
    _require(all(len(digest) == 32 for digest in digests), "an impossible digest")
    for ids in ("uids", "gids"):
        listed = [one for member in principals.members.values() for one in getattr(member, ids)]
        _require(len(listed) == len(set(listed)), "an id of two")
        _require(all(0 <= one <= limits.MAX_UNIX_ID for one in listed), "an impossible id")
    for member in principals.members.values():
        allowed = member.grants.allows(Operation.ENCRYPT, "billing", b"invoice/")
        _require(member.grants.explain(Operation.ENCRYPT, "billing", b"invoice/").allowed is allowed, "explained wrongly")


def check_secret_file(data: bytes) -> None:
    """A file is the passphrase in it without one line end, in normal form C; or one as it is, and what is wrong with it."""
    stripped = data[:-2] if data.endswith(b"\r\n") else data[:-1] if data.endswith(b"\n") else data
    with tempfile.NamedTemporaryFile(delete=True) as file:
        file.write(data)
        file.flush()
        try:
            secret = read_passphrase(Path(file.name))
        except InputError:
            _require(not 1 <= len(stripped) <= limits.MAX_SECRET_BYTES, "a secret that is one is refused")
            return
    text = stripped.decode("utf-8", "replace")
    is_text = text.encode() == stripped and not text.isspace() and not text.startswith("\ufeff") and "\ufffd" not in text
    is_right = is_text and not any(unicodedata.category(one) in ("Cc", "Zl", "Zp") for one in text)
    _require((secret.complaint is None) == is_right, "complained of wrongly")
    with secret.view() as view:
        usual = unicodedata.normalize("NFC", text).encode() if is_right else stripped
        _require(bytes(view) == usual, "not the secret that is in the file")


@dataclass(frozen=True)
class Target:
    """One parser: the check, valid inputs to start from, and the longest input worth trying."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    max_bytes: int


_REQUESTS: Final = [
    b'{"type":"Health","token":"api-token"}',
    b'{"type":"Ping","token":"\\ud83d\\ude00"}',
    b'{"type":"GenerateDataKey","token":"api-token","keyId":"billing","aad":"QQ=="}',
    b'{"type":"Encrypt","token":"api-token","plaintext":"QUI=","keyId":null,"aad":null}',
    b'{"type":"Encrypt","token":"api-token","plaintext":"\\u0051R=="}',
    b'{"type":"Decrypt","token":"api-token","ciphertext":"AgdkZWZhdWx0"}',
    b'{"type":"ReEncrypt","token":"api-token","ciphertext":"QQ==","keyId":" "}',
    b'{"type":"CreateKeyGroup","token":"admin-token","keyId":"a"}',
    b'{"type":"RotateKeyGroup","keyId":"a"}',
    b'{"type":"ListKeyGroups","token":null}',
    b'{"type":"DestroyVersion","keyId":"a","version":9223372036854775807}',
    b'{"type":"EnableVersion","keyId":"a","version":1.0}',
    b'{"type":"DisableVersion","keyId":"a","version":true,"x":[[{"y":[1e999,-0]}]]}',
]
LONG_LINES: Final = [
    b'{"type":"Health","x":\xff9\xff}',
    b'{"type":"Health","x":0.\xff0\xff1}',
    b'{"type":"DestroyVersion","keyId":"a","version":\xff9\xff}',
    b'{"type":"Health","token":\xff9\xff}',
    b'{"type":"Health","token":[\xff1.5,\xff1]}',
    b'{"type":"Health","token":{\xff"a":1,\xff"b":1}}',
    b'{"type":"Health"\xff,"x":1\xff}',
    b'{"type":"Health"\xff,"type":"Ping"\xff}',
    b'{"type":"Encrypt"\xff,"plaintext":"QQ=="\xff}',
    b'{"type":"Encrypt","plaintext":""\xff,"aad":"Q\\u0051=="\xff}',
    b'{"type":"Encrypt","plaintext":"\xffAAAA\xffQQ=="}',
    b'{"type":"Encrypt","plaintext":"\xffAAAA\xffQR=="}',
    b'{"type":"Encrypt","plaintext":"QQ==","x":"\xffx==\xff"}',
    b'{"type":"Encrypt","plaintext":"\xff=\xff',
    b'{"type":"Health","x":"\xff\\\\\xff"}',
    b'{"type":"Health","x":[\xff[],\xff1]}',
    b'{"type":"Health","x":[\xff"[",\xff1]}',
    b'{"type":"Health","x":[\xff"\\"[",\xff1]}',
    b'{"type":"Health","x":\xff[\xff',
    b'{"type":"Health","x":\xff{\xff',
    b'{"type":"Health","x":\xff[]\xff',
    b'{"type":"Health","token":"\xff\\ud83d\\ude00\xff"}',
    b'{"type":"\xffa\xff"}',
    b'{"\xffa\xff":1}',
    b'{"type":"Health"\xff \xff}',
    b'{"type":"Health","x":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\xff"\\\xff',
    b'{"type":"Health","x":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\xff\\"\xff',
    b'{"type":"Encrypt","plaintext":"\xff[\xff',
    b'{"type":"Health","token":[\xff2.2250738585072011e-308,\xff1]}',
    b'{"type":[\xff2.2250738585072011e-308,\xff1]}',
    b'{"type":"Health","x":\xff[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\xff',
]
"""Lines of a megabyte, each with what is in front, what is repeated, and what ends it."""


def _config_seeds() -> list[bytes]:
    everything = "\n".join(f"{variable}=1024" for variable in ENVIRONMENT.values())
    return [
        b"",
        everything.encode(),
        b"tcp_port=0\nno_unix=",
        b"XDG_DATA_HOME=/tmp\nCREDENTIALS_DIRECTORY=/tmp",
        b"HOME=",
        b"XDG_DATA_HOME=/" + b"x" * 300,
    ]


def _ciphertext_seeds() -> list[bytes]:
    return [*world().ciphertexts, *world().closed]


KEYSTORES: Final = {
    4: KeystoreFormat(encode4, reseal4, open4, "keyId"),
    3: KeystoreFormat(encode3, reseal3, open3, "keyId"),
    2: KeystoreFormat(encode2, reseal2, open2, "id"),
}
"""Every format that is read, by its number."""

TARGETS: Final = {
    "stream": Target(check_stream, lambda: [*_REQUESTS, b"\r\n".join(_REQUESTS), b"\n \n{}\r\n\r"], 1 << 12),
    "long-line": Target(check_long_line, lambda: list(LONG_LINES), 1 << 8),
    "request": Target(check_request, lambda: [*_REQUESTS, *map(decrypt_line, _ciphertext_seeds())], 1 << 12),
    "ciphertext": Target(check_ciphertext, _ciphertext_seeds, 1 << 9),
    "edited-ciphertext": Target(check_edited_ciphertext, lambda: [b"\0", b"\1\2\3", bytes(9)], 1 << 4),
    "container": Target(check_container, lambda: list(containers()), 1 << 11),
    "reencrypt": Target(check_reencrypt, lambda: [*containers(), *world().ciphertexts], 1 << 11),
    "keystore-4": Target(check_keystore4, lambda: [encode4()], 1 << 12),
    "keystore-3": Target(check_keystore3, lambda: [encode3()], 1 << 12),
    "journal": Target(check_journal, lambda: [journal_parts()[1], journal_parts()[2][0]], 1 << 12),
    "keystore-2": Target(check_keystore2, lambda: [encode2()], 1 << 12),
    "keystore-4-resealed": Target(check_resealed4, lambda: [encode4()], 1 << 12),
    "keystore-3-resealed": Target(check_resealed3, lambda: [encode3()], 1 << 12),
    "keystore-2-resealed": Target(check_resealed2, lambda: [encode2()], 1 << 12),
    "config": Target(check_config, _config_seeds, 1 << 13),
    "usage-file": Target(check_usage_file, _usage_seeds, 1 << 12),
    "audit-tail": Target(check_audit_tail, lambda: [audit_log()[1]], 1 << 12),
    "principals": Target(check_principals, lambda: [PRINCIPALS.encode()], 1 << 12),
    "secret-file": Target(check_secret_file, lambda: [b"hunter2\n", b"x\r\n", b"\n", b"x" * 4096], 5000),
}
