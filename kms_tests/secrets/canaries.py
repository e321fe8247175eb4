"""Secrets of a test, and every form in which one could slip out: raw, escaped, in hex, in base64 at each alignment."""

from __future__ import annotations

import secrets
from base64 import b64encode
from collections.abc import Iterator, Mapping

_SHORTEST = 12
"""Bytes of which a canary has at least so many that no form of it occurs by chance."""


def forms(secret: bytes) -> Iterator[bytes]:
    """`secret` raw, as `repr` escapes it, in hex, and within base64 after 0, 1 or 2 other bytes, in both alphabets."""
    assert len(secret) >= _SHORTEST, "found by chance"
    yield secret
    yield repr(secret)[2:-1].encode()
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for before in range(3):
        encoded = b64encode(bytes(before) + secret)
        # The characters at either end are shared with what stands there.
        start = (before * 8 + 5) // 6
        end = (before + len(secret)) * 8 // 6
        inner = encoded[start:end]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


def leaked(canaries: Mapping[str, bytes], places: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """Which canary is where, in any form."""
    return {
        (name, where)
        for name, secret in canaries.items()
        for form in set(forms(secret))
        for where, content in places.items()
        if form in content
    }


def text(name: str) -> str:
    """A canary that can be typed; no two are alike."""
    return f"canary-{name}-{secrets.token_hex(12)}"
