"""What a server refused, in the words of whoever typed the command.

A server names the field of a request that it refuses, and never repeats what was sent. Who typed a command knows no fields,
but a key group, a version and options; and may have meant the name that is nearest to what was typed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from kms.cli.words import closest
from kms.core.names import NO_SUCH_GROUP, NO_SUCH_VERSION, shown
from kms.errors import InvalidRequestError, KmsError
from kms.limits import DEFAULT_KEY_GROUP

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient

_MOST_NAMES: Final = 10_000
"""Compared in a tenth of a second."""

_COMPLAINT: Final = re.compile(r"(\w+): (.+)")
_SENTENCE: Final = re.compile(r"(?:it|the key group) ((?:is|has|exists)\b.*)")
"""One of which a name can be the subject."""
_TYPED: Final = {
    "aad": "--aad",
    "ciphertext": "the input",
    "forSeconds": "--for",
    "plaintext": "the input",
    "requestId": "--request-id",
    "sourceKeyId": "--from-key",
}
"""What was typed for a field of a request."""


@contextlib.contextmanager
def naming(
    name: str | None = None, connect: Callable[[], KmsClient] | None = None, version: int | None = None
) -> Iterator[None]:
    """When what is done inside is refused, say what of: the key group `name` (None: the default one), or its `version`.

    With `connect`, which asks for the list, the nearest name is told of a group that there is not.
    """
    try:
        yield
    except InvalidRequestError as error:
        group = shown(DEFAULT_KEY_GROUP if name is None else name)
        raise InvalidRequestError(_in_words(str(error), group, version, connect)) from None


def _in_words(complaint: str, group: str, version: int | None, connect: Callable[[], KmsClient] | None) -> str:
    if complaint == NO_SUCH_GROUP:
        nearest = None if connect is None else _nearest(connect, group)
        remedy = "kms-admin list-keys shows those there are" if nearest is None else f"did you mean {shown(nearest)}?"
        return f"there is no key group {group}; {remedy}"
    if complaint == NO_SUCH_VERSION:
        return f"{group} has no version {version}; kms-admin describe-key {group} shows those it has"
    found = _COMPLAINT.fullmatch(complaint)
    if found is None:
        return complaint
    field, what = found.groups()
    typed = {"keyId": f"key group {group}", "version": f"{group} v{version}", **_TYPED}
    if field not in typed:
        return complaint
    sentence = _SENTENCE.fullmatch(what)
    return f"{typed[field]}: {what}" if sentence is None else f"{typed[field]} {sentence[1]}"


def _nearest(connect: Callable[[], KmsClient], name: str) -> str | None:
    try:
        with connect() as client:
            names = [group.key_id for group in islice(client.iter_key_groups(), _MOST_NAMES)]
    except KmsError:
        # Who may not see the list gets the refusal as it is.
        return None
    by_case = {one.casefold(): one for one in names}
    found = closest(name.casefold(), by_case)
    return None if found is None else by_case[found]
