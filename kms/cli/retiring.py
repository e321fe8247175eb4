"""Retiring a version: what a person should know before it is destroyed, and waiting for who still needs it.

A version is destroyed for the word `yes` only when nobody has used it for a week and it was disabled first; when any of
that is not so, or is not known, the name of its group has to be typed. That it was not used counts from when it is
counted: a server that began to count today knows nothing of yesterday.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import prompt, render
from kms.cli.words import one_line
from kms.core.names import NO_SUCH_VERSION
from kms.errors import InternalError, InvalidRequestError, ProtocolError, ServerUnreachableError, UnauthorizedError
from kms.limits import MAX_TIMED_DISABLE_SECONDS

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient
    from kms.core.usage import TimedDisable, VersionUsage

Connect = Callable[[], "KmsClient"]

QUIET_SECONDS: Final = 7 * 24 * 3600
"""Without a use for so long, a version may be one that nobody needs."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
LATE_SECONDS: Final = 60.0
"""What the server may take to enable a version whose time is over, before somebody should look."""
_POLL_SECONDS: Final = 0.2


def duration(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """An option's callback: `30s`, `15m`, `2h` or `7d` as seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 1 <= seconds <= MAX_TIMED_DISABLE_SECONDS:
        longest = MAX_TIMED_DISABLE_SECONDS // _UNITS["d"]
        raise click.BadParameter(f"give a time such as 30s, 15m, 2h or 7d, from 1s to {longest}d")
    return seconds


def confirm_destruction(connect: Connect, key: str, version: int) -> None:
    """Tell how a version was used, and return when the answer is that it is to be destroyed; else `click.Abort`.

    Of one that is destroyed already nothing is asked. Raises `InvalidRequestError` for one that cannot be.
    """
    with connect() as client:
        about = _told(client, key, version)
    if about is None:
        return
    told, is_quiet = about
    question = one_line(
        f"Destroying version {version} of {key} can never be undone: everything encrypted under it, files and data keys "
        "too, is lost for good."
    )
    remedy = "give --yes to destroy without being asked"
    # Nothing is connected while it waits for a person: the server closes what idles.
    if is_quiet:
        prompt.confirm(f"{question}\n{one_line(told)}", remedy)
    else:
        prompt.confirm_by_name(f"{question}\n{one_line(told)}", key, one_line(f"the name of the key group, {key},"), remedy)


def _told(client: KmsClient, key: str, version: int) -> tuple[str, bool] | None:
    """What is told of a version's use, and whether it is what nobody would miss; None where it is destroyed already."""
    try:
        usage, status = _looked_up(client, key, version)
    except UnauthorizedError:
        return "Whether it is still used, you may not see (DescribeKeyGroup).", False
    except InvalidRequestError as error:
        if not str(error).startswith("type:"):
            raise
        return "Whether it is still used, the server is too old to know.", False
    if status == "ACTIVE":
        # Not left to the server: it could be rotated meanwhile, and then nobody would have been asked.
        raise InvalidRequestError("version: it is ACTIVE; rotate the key group first")
    if status == "DESTROYED":
        return None
    now = time.time()
    if usage.last_used_epoch_sec is None:
        told, quiet_since = f"Last used: {render.last_used(usage, now)}.", usage.since_epoch_sec
    else:
        told, quiet_since = f"Last used: {render.last_used(usage, now)}; {render.used(usage)}.", usage.last_used_epoch_sec
    if status != "DISABLED" and not _nobody_missed_it(usage):
        return f"{told} It was not disabled first, to see who needs it: disable-version --for", False
    if now - quiet_since >= QUIET_SECONDS:
        return told, True
    days = QUIET_SECONDS // _UNITS["d"]
    if usage.last_used_epoch_sec is None:
        return f"{told} That is less than {days} days, and who used it before nobody knows.", False
    return f"{told} That is less than {days} days ago.", False


def _looked_up(client: KmsClient, key: str, number: int) -> tuple[VersionUsage, str]:
    for version in client.describe_key_group(key).versions:
        if version.version == number:
            if version.usage is None:
                raise ProtocolError("the server describes a version without its use")
            return version.usage, version.status
    raise InvalidRequestError(NO_SUCH_VERSION)


def _nobody_missed_it(usage: VersionUsage) -> bool:
    trial = usage.timed_disable
    return trial is not None and trial.ended_epoch_sec is not None and not trial.refused


def wait_until_enabled(connect: Connect, key: str, version: int, trial: TimedDisable) -> tuple[TimedDisable, str]:
    """Wait for the end of `trial`, with a countdown on standard error when that is a terminal.

    Returns how it went and the version's state. Raises `KeyboardInterrupt` when somebody does not want to wait, and
    `ServerUnreachableError` or `InternalError` when the end does not come.
    """
    _count_down(f"{one_line(key)} v{version} is enabled", trial.until_epoch_sec)
    give_up_at = time.monotonic() + LATE_SECONDS
    while True:
        try:
            with connect() as client:
                usage, status = _looked_up(client, key, version)
        except ServerUnreachableError:
            # It may be starting again; then it does what was due meanwhile.
            if time.monotonic() >= give_up_at:
                raise
        else:
            if usage.timed_disable is not None and usage.timed_disable.ended_epoch_sec is not None:
                return usage.timed_disable, status
            if time.monotonic() >= give_up_at:
                raise InternalError(f"{key} v{version} is {status}, though its time is over")
        time.sleep(_POLL_SECONDS)


def _count_down(what: str, until: int) -> None:
    is_seen, shown = sys.stderr is not None and sys.stderr.isatty(), 0
    try:
        while (left := until - time.time()) > 0:
            if is_seen:
                clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
                # One that is wrapped would not be overwritten by the next.
                line = f"{clock} until {what} again; Ctrl-C: do not wait"[: shutil.get_terminal_size().columns - 2]
                click.echo(f"\r{line} \b", err=True, nl=False)
                shown = len(line)
            time.sleep(min(left, 1))
    finally:
        if shown:
            click.echo(f"\r{' ' * shown}\r", err=True, nl=False)


def currently(client: KmsClient, key: str, version: int) -> TimedDisable:
    """The timed disable of a version; raises `UnauthorizedError` for who may not see it."""
    trial = _looked_up(client, key, version)[0].timed_disable
    if trial is None:
        raise ProtocolError("the server does not know what it has just disabled for a time")
    return trial
