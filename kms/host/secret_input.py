"""A secret as people give it: in a file, on a descriptor, in a variable, or typed. One rule for all of them.

One line end at its end is none of it. What is left has 1 to 4096 bytes, is not blank, and holds no control character and
no byte order mark: those come from an editor or a shell, not from a person, and the next way to give the same secret would
not have them. A passphrase is used in Unicode's normal form C (UAX #15), since the same letters come in two forms from two
keyboards. A keystore may be under one that an earlier release took as it came; that opens it still.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kms.core.secret import Passphrase, Secret
from kms.errors import FileAccessError, InputError
from kms.host.descriptors import descriptor_named, duplicate
from kms.host.private import open_private
from kms.limits import MAX_SECRET_BYTES

_LINE_ENDS: Final = (b"\r\n", b"\n")
_LONGEST_INPUT: Final = MAX_SECRET_BYTES + 2
_BYTE_ORDER_MARKS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_NOT_UTF_8: Final = "�"
_DELETE: Final = 0x7F
_BEGINS_LONGER: Final = ((0xF0, 4), (0xE0, 3), (0xC2, 2))


def read_token(path: Path, *, allow_group: bool = False) -> Secret:
    """The token in `path`, or on the descriptor that it names; it is read into a buffer that can be wiped.

    Raises `InputError` for what breaks the rule, and what `open_private` raises, which says what `allow_group` allows.
    """
    return token(*_read(path, allow_group=allow_group), str(path))


def read_passphrase(path: Path, *, allow_group: bool = False) -> Passphrase:
    """The passphrase in `path`; raises what `read_token` raises but for what `passphrase` leaves to its reader."""
    return passphrase(*_read(path, allow_group=allow_group), str(path))


def token(buffer: bytearray, length: int, origin: str) -> Secret:
    """The first `length` bytes of `buffer`, which is wiped, as a token. Raises `InputError`, naming `origin`."""
    secret = _without_line_end(buffer, length)
    complaint = _complaint(secret, origin)
    if complaint is not None:
        secret.wipe()
        raise InputError(complaint)
    return secret


def passphrase(buffer: bytearray, length: int, origin: str, *, keeps_line_end: bool = False) -> Passphrase:
    """The first `length` bytes of `buffer`, which is wiped, as a passphrase. Raises `InputError`, naming `origin`.

    Where it breaks the rule otherwise than by being empty or too long, an older keystore may be under it all the same:
    then it has that as its `complaint`. `keeps_line_end`: earlier releases kept it, of what came by this way.
    """
    whole = Secret(bytearray(buffer[:length])) if keeps_line_end else None
    given = _without_line_end(buffer, length)
    complaint = _complaint(given, origin)
    if not len(given) or len(given) > MAX_SECRET_BYTES:
        given.wipe()
        raise InputError(complaint or "")
    earlier = []
    if whole is not None and len(whole) != len(given):
        earlier.append(whole)
    if complaint is not None:
        return Passphrase(given.take(), earlier, complaint)
    normal = _normal(given)
    if normal.is_same(given):
        given.wipe()
    else:
        earlier.insert(0, given)
    return Passphrase(normal.take(), earlier)


def characters(secret: Secret) -> Iterator[str]:
    """The characters of `secret` one by one, so that it is never a string; U+FFFD for what is not UTF-8."""
    with secret.view() as view:
        position = 0
        while position < len(view):
            first = view[position]
            size = next((size for least, size in _BEGINS_LONGER if first >= least), 1)
            character = str(view[position : position + size], "utf-8", "replace")
            if _NOT_UTF_8 in character:
                character, size = _NOT_UTF_8, 1
            yield character
            position += size


def _read(path: Path, *, allow_group: bool) -> tuple[bytearray, int]:
    number = descriptor_named(path)
    descriptor = open_private(path, allow_group=allow_group) if number is None else duplicate(number, path)
    buffer = bytearray(_LONGEST_INPUT + 1)
    length = 0
    try:
        with memoryview(buffer) as view:
            while length < len(buffer) and (count := os.readv(descriptor, [view[length:]])):
                length += count
    except OSError as error:
        Secret(buffer).wipe()
        raise FileAccessError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return buffer, length


def _without_line_end(buffer: bytearray, length: int) -> Secret:
    end = next((end for end in _LINE_ENDS if buffer.endswith(end, 0, length)), b"")
    secret = Secret(buffer[: length - len(end)])
    Secret(buffer).wipe()
    return secret


def _complaint(secret: Secret, origin: str) -> str | None:
    """What is wrong with it, if anything is; never a part of it."""
    if not len(secret):
        return f"{origin} is empty; put the secret into it"
    if len(secret) > MAX_SECRET_BYTES:
        return f"{origin} holds more than {MAX_SECRET_BYTES} bytes; that is not a passphrase or token"
    with secret.view() as view:
        if bytes(view[:2]) in _BYTE_ORDER_MARKS or bytes(view[:3]) in _BYTE_ORDER_MARKS:
            return f"{origin} begins with a byte order mark; save it as UTF-8 without one"
    is_blank = True
    for character in characters(secret):
        if character == _NOT_UTF_8:
            return f"{origin} is not UTF-8 text; give the secret as text, binary data as its base64"
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            return f"{origin} holds a control character, such as a second line or a tab; give the secret alone, on one line"
        is_blank = is_blank and character.isspace()
    return f"{origin} is blank; put the secret into it" if is_blank else None


def _normal(secret: Secret) -> Secret:
    """Normal form C of `secret`, which is UTF-8.

    From one ASCII character to the next, since none of those joins what is before it: so most of what `unicodedata` makes
    immutable strings of is a letter or two.
    """
    normal = bytearray(4 * len(secret))
    length = 0

    def add(piece: str) -> None:
        nonlocal length
        encoded = unicodedata.normalize("NFC", piece).encode()
        normal[length : length + len(encoded)] = encoded
        length += len(encoded)

    piece = ""
    for character in characters(secret):
        if character.isascii():
            add(piece)
            piece = ""
        piece += character
    add(piece)
    made = Secret(normal[:length])
    Secret(normal).wipe()
    return made
