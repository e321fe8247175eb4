"""What SIGHUP asks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Final

from kms.errors import KmsError
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

    async def __call__(self) -> None:
        self.service.keeper.reopen()
        try:
            access = await in_thread(partial(self.source.load, needs_file=self.service.access.is_from_file))
            await self.service.admit(access)
        except KmsError as error:
            log.error("principals not reloaded, all stays as it was: %s", error)  # noqa: TRY400 - the message says it all
        except Exception as error:  # a bug must cost the reload, not the server
            log_bug("principals not reloaded, all stays as it was", error)
        else:
            log.info("reloaded: %s", access.origin)
