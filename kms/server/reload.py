"""What SIGHUP asks for, and the request Reload."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from kms.errors import InternalError, InvalidRequestError, KmsError, WireError
from kms.service.bugs import log_bug
from kms.service.service import Service
from kms.service.team import AccessSource
from kms.service.threads import in_thread

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reload:
    """Puts the file of principals in force as it is now, and goes on in a new file where the audit log was renamed.

    A file of principals that cannot be used leaves everything as it was.
    """

    service: Service
    source: AccessSource
    _turn: trio.Lock = field(default_factory=trio.Lock)

    async def __call__(self) -> str:
        """What came of it, in words, which the log has, too. Raises the `WireError` that says what went wrong."""
        # One after the other: of two files that were read at once, the older could come into force last.
        async with self._turn:
            return await self._reload()

    async def _reload(self) -> str:
        trouble = self.service.keeper.reopen()
        try:
            access = await in_thread(partial(self.source.load, needs_file=self.service.access.is_from_file))
            await self.service.admit(access)
        except KmsError as error:
            message = f"principals not reloaded, all stays as it was: {error}"
            log.error("%s", message)  # noqa: TRY400 - the message says it all
            raise InvalidRequestError(message) from None
        except Exception as error:  # a bug must cost the reload, not the server
            log_bug("principals not reloaded, all stays as it was", error)
            raise InternalError("principals not reloaded; the server's log has the details") from None
        done = f"reloaded: {access.origin}"
        log.info("%s", done)
        if trouble:
            raise InvalidRequestError(f"{done}, but {trouble}")
        return done

    async def on_hangup(self) -> None:
        """The same for who asks by a signal, and reads in the log what came of it."""
        with contextlib.suppress(WireError):
            await self()
