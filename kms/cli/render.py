"""What a command says on standard output: tables for people, tab-separated text for pipes, JSON for programs.

What a command may not need, rich's drawing above all, is imported where it is used: scripts call these often.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from kms.cli.words import fitted, one_line
from kms.core.names import without_surrogates
from kms.core.spans import exact_length, length

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from kms.cli.options import Settings
    from kms.core.usage import TimedDisable, VersionUsage
    from kms.wire.messages import KeyGroupView

_READABLE: Final = "%Y-%m-%d %H:%M:%S UTC"


def document(**fields: Any) -> None:
    """`fields` as one JSON document on a line of its own; bytes become base64, structs objects, paths text.

    What is not printable is escaped: JSON has its own way for that, and a terminal obeys none of it.
    """
    import msgspec

    encoded = msgspec.json.encode(_encodable(fields)).decode()
    # As bytes: JSON is UTF-8, whatever the locale is.
    click.echo((encoded if encoded.isprintable() else "".join(map(_json_escaped, encoded))).encode())


def _encodable(value: Any) -> Any:
    """`value`, where the names of files in it may not be UTF-8: then they are escaped, as they are for people."""
    if isinstance(value, dict):
        return {name: _encodable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    if isinstance(value, (str, Path)):
        return without_surrogates(str(value))
    return value


def _json_escaped(character: str) -> str:
    # Of what the encoder leaves as it is, only in strings is anything not printable.
    return character if character.isprintable() else json.dumps(character)[1:-1]


def detail(settings: Settings, words: str) -> None:
    """What was done, in the server's words."""
    if settings.json:
        document(detail=words)
    else:
        text(words)


def text(line: str, indent: int | None = None) -> None:
    """One line of plain text; what does not fit goes on below it, indented by `indent` columns if that is given."""
    click.echo(fitted(one_line(line), 1, indent))


def to_copy(line: str, *, err: bool = False) -> None:
    """One line that is to be pasted as it is: it is never broken; on standard error with `err`."""
    click.echo(one_line(line), err=err)


def remark(line: str) -> None:
    """One line of plain text for whoever watches: standard output is for the result."""
    click.echo(fitted(one_line(line), 2), err=True)


def octets(line: memoryview) -> None:
    """`line` and a line end, as it is: a secret in a buffer does not become a string on its way out."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def key_group(group: KeyGroupView, now: float) -> None:
    """All that is known of one group; `now` is in epoch seconds."""
    text(f"{group.key_id}: version {group.active_version} is active")
    for version in group.versions:
        text("")
        text(f"version {version.version} is {version.status}")
        text(f"    created    {moment(version.created_at_epoch_sec, now)}")
        if version.usage is not None:
            text(f"    used       {used(version.usage)}")
            if version.usage.last_used_epoch_sec is not None:
                text(f"    last used  {last_used(version.usage, now)}")
            if version.usage.timed_disable is not None:
                for line in timed_disable(version.usage.timed_disable, version.status, now):
                    text(f"    {line}")


def used(usage: VersionUsage) -> str:
    """How often, by kind, and counted since when."""
    uses = ", ".join(f"{count} {kind}" for kind, count in counts(usage).items())
    return f"{uses} since {exact(usage.since_epoch_sec, _READABLE)}" if uses else _unused(usage)


def last_used(usage: VersionUsage, now: float) -> str:
    """When, and by whom."""
    if usage.last_used_epoch_sec is None:
        return _unused(usage)
    return f"{moment(usage.last_used_epoch_sec, now)} by {usage.last_used_by}"


def _unused(usage: VersionUsage) -> str:
    # Of what was before nobody knows.
    return f"never (counted since {exact(usage.since_epoch_sec, _READABLE)})"


def timed_disable(trial: TimedDisable, state: str, now: float) -> list[str]:
    """When it was disabled and by whom, until when, and who was refused meanwhile; `state` is what the version is now."""
    lines = [f"disabled   for a time, {moment(trial.since_epoch_sec, now)} by {trial.by}"]
    if trial.ended_epoch_sec is None:
        lines.append(f"enabled    {moment(trial.until_epoch_sec, now)}")
    else:
        left = {"DISABLED": "; it is disabled for good", "DESTROYED": "; it is destroyed"}.get(state, "")
        lines.append(f"ended      {moment(trial.ended_epoch_sec, now)}{left}")
    return lines + [f"refused    {line}" for line in refusals(trial, now)]


def refusals(trial: TimedDisable, now: float) -> list[str]:
    """Who was refused, a line each, most often first."""
    most_first = sorted(trial.refused.items(), key=lambda item: (-item[1].requests, item[0]))
    return [
        f"{name}: {refused.requests} {'request' if refused.requests == 1 else 'requests'}, last "
        f"{moment(refused.last_epoch_sec, now)}"
        for name, refused in most_first
    ] or ["nobody"]


def moment(seconds: int, now: float) -> str:
    """A time as people think of it, and exactly: `3 hours ago (2026-11-25 04:00:00 UTC)`."""
    return f"{distance(seconds - now)} ({exact(seconds, _READABLE)})"


def distance(seconds: float) -> str:
    """How far off a time is: `3 hours ago`, `in 2 days 4 hours`. What is to come, somebody may be waiting for."""
    whole = int(abs(seconds))
    if not whole:
        return "now"
    return f"in {exact_length(whole)}" if seconds > 0 else f"{length(whole)} ago"


def counts(usage: VersionUsage) -> dict[str, int]:
    """How often a version was used, by operation, without those that it was not used for."""
    import msgspec

    found: dict[str, int] = msgspec.to_builtins(usage.operations)
    return found


def exact(seconds: int, form: str) -> str:
    """A time of UTC as strftime(3) has it, or `@` and the number for one that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        # A migrated keystore may hold any 64-bit number.
        return f"@{seconds}"


@contextlib.contextmanager
def progress(source: Path | None, target: Path | None) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on standard error, as the function that is told the bytes read since its last call.

    None, and no bar, unless standard error is a terminal that the output itself is not written to.
    """
    if not is_terminal(sys.stderr) or (target is None and is_terminal(sys.stdout)):
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    total = source.stat().st_size if source is not None and source.is_file() else None
    with _bar(DownloadColumn(binary_units=True), TransferSpeedColumn()) as bar:
        task = bar.add_task(one_line(source.name) if source is not None else "standard input", total=total)
        yield lambda read: bar.advance(task, read)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, as the function that is told of each one done; none where that is no terminal."""
    if not is_terminal(sys.stderr):
        yield lambda: None
        return
    from rich.progress import MofNCompleteColumn

    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _bar(*figures: ProgressColumn) -> Progress:
    """A bar on standard error that is gone in the end, with `figures` beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *figures,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def is_terminal(stream: Any) -> bool:
    """Whether `stream`, which may be None, is one that a person looks at."""
    return stream is not None and bool(stream.isatty())
