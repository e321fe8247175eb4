"""The key group that somebody may have meant who named one that there is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Final

from kms.core.names import NO_SUCH_GROUP, shown
from kms.errors import InvalidRequestError, KmsError
from kms.limits import DEFAULT_KEY_GROUP

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient

_MOST_NAMES: Final = 10_000
"""Compared in a tenth of a second."""
_SIMILAR: Final = 0.6


@contextlib.contextmanager
def naming(name: str | None, connect: Callable[[], KmsClient] | None = None) -> Iterator[None]:
    """When what is done inside is refused since there is no such group, say that it is `name` (None: the default one).

    With `connect`, which asks for the list, the nearest one is named, too.
    """
    try:
        yield
    except InvalidRequestError as error:
        if str(error) != NO_SUCH_GROUP:
            raise
        name = DEFAULT_KEY_GROUP if name is None else name
        nearest = None if connect is None else _nearest(connect, name)
        meant = "" if nearest is None else f"; did you mean {shown(nearest)}?"
        raise InvalidRequestError(f"there is no key group {shown(name)}{meant}") from None


def _nearest(connect: Callable[[], KmsClient], name: str) -> str | None:
    try:
        with connect() as client:
            names = [group.key_id for group in islice(client.iter_key_groups(), _MOST_NAMES)]
    except KmsError:
        # Who may not see the list gets the refusal as it is.
        return None
    by_case = {one.casefold(): one for one in names}
    found = get_close_matches(name.casefold(), by_case, n=1, cutoff=_SIMILAR)
    return by_case[found[0]] if found else None
