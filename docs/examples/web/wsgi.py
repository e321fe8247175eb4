"""A WSGI program whose client is made once, before gunicorn forks its workers.

    gunicorn --preload --workers 4 wsgi:app

Each worker has connections of its own; what it is asked comes back, having been encrypted and decrypted meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

from kms import KmsClient

kms = KmsClient.from_env()


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """`GET /?TEXT` answers TEXT."""
    text = unquote_to_bytes(environ["QUERY_STRING"])
    sealed = kms.encrypt(text, aad=b"wsgi")
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [kms.decrypt(sealed, aad=b"wsgi")]
