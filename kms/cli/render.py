"""What a command says on standard output: tables for people, tab-separated text for pipes, JSON for programs.

What a command may not need, rich's drawing above all, is imported where it is used: scripts call these often.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from kms.cli.words import fitted, one_line

if TYPE_CHECKING:
    from kms.cli.options import Settings
    from kms.core.usage import TimedDisable, VersionUsage
    from kms.wire.messages import KeyGroupView

_SORTABLE: Final = "%Y-%m-%dT%H:%M:%SZ"
_READABLE: Final = "%Y-%m-%d %H:%M:%S UTC"
_UNITS: Final = ((24 * 3600, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_STATE_STYLES: Final = {"ACTIVE": "bold green", "ENABLED": "cyan", "DISABLED": "yellow", "DESTROYED": "dim red"}


def document(**fields: Any) -> None:
    """`fields` as one JSON document on a line of its own; bytes become base64, structs objects, paths text.

    What is not printable is escaped: JSON has its own way for that, and a terminal obeys none of it.
    """
    import msgspec

    shown = {name: one_line(str(value)) if isinstance(value, Path) else value for name, value in fields.items()}
    encoded = msgspec.json.encode(shown).decode()
    click.echo(encoded if encoded.isprintable() else "".join(map(_json_escaped, encoded)))


def _json_escaped(character: str) -> str:
    # Of what the encoder leaves as it is, only in strings is anything not printable.
    return character if character.isprintable() else json.dumps(character)[1:-1]


def detail(settings: Settings, words: str) -> None:
    """What was done, in the server's words."""
    if settings.json:
        document(detail=words)
    else:
        text(words)


def text(line: str) -> None:
    """One line of plain text."""
    click.echo(fitted(one_line(line), 1))


def remark(line: str) -> None:
    """One line of plain text for whoever watches: standard output is for the result."""
    click.echo(fitted(one_line(line), 2), err=True)


def octets(line: memoryview) -> None:
    """`line` and a line end, as it is: a secret in a buffer does not become a string on its way out."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def key_groups(groups: list[KeyGroupView], *, usage: bool = False) -> None:
    """The versions of `groups`: a table at a terminal; else `group, version, state, created`, tab-separated.

    With `usage` also `counted since, last used, by, operations`, which are empty where nothing is known.
    """
    if _is_terminal(sys.stdout):
        _table(groups, usage=usage)
        return
    for group in groups:
        for version in group.versions:
            created = _moment(version.created_at_epoch_sec, _SORTABLE)
            fields = [group.key_id, f"v{version.version}", version.status, created]
            if usage:
                fields += _usage_fields(version.usage)
            click.echo("\t".join(map(one_line, fields)))


def _usage_fields(usage: VersionUsage | None) -> list[str]:
    if usage is None:
        return [""] * 4
    used = usage.last_used_epoch_sec
    return [
        _moment(usage.since_epoch_sec, _SORTABLE),
        "" if used is None else _moment(used, _SORTABLE),
        usage.last_used_by or "",
        " ".join(f"{kind}={count}" for kind, count in _counts(usage).items()),
    ]


def key_group(group: KeyGroupView, now: float) -> None:
    """All that is known of one group; `now` is in epoch seconds."""
    text(f"{group.key_id}: version {group.active_version} is active")
    for version in group.versions:
        text("")
        text(f"version {version.version} is {version.status}")
        text(f"    created    {moment(version.created_at_epoch_sec, now)}")
        if version.usage is not None:
            text(f"    used       {used(version.usage)}")
            text(f"    last used  {last_used(version.usage, now)}")
            if version.usage.timed_disable is not None:
                for line in timed_disable(version.usage.timed_disable, now):
                    text(f"    {line}")


def used(usage: VersionUsage) -> str:
    """How often, by kind, and counted since when."""
    counts = ", ".join(f"{count} {kind}" for kind, count in _counts(usage).items())
    return f"{counts or 'never'} since {_moment(usage.since_epoch_sec, _READABLE)}"


def last_used(usage: VersionUsage, now: float) -> str:
    """When, and by whom."""
    if usage.last_used_epoch_sec is None:
        return f"never since {moment(usage.since_epoch_sec, now)}"
    return f"{moment(usage.last_used_epoch_sec, now)} by {usage.last_used_by}"


def timed_disable(trial: TimedDisable, now: float) -> list[str]:
    """When it was disabled and by whom, until when, and who was refused meanwhile."""
    lines = [f"disabled   for a time, {moment(trial.since_epoch_sec, now)} by {trial.by}"]
    if trial.ended_epoch_sec is None:
        lines.append(f"enabled    {moment(trial.until_epoch_sec, now)}")
    else:
        lines.append(f"ended      {moment(trial.ended_epoch_sec, now)}")
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
    return f"{_distance(seconds - now)} ({_moment(seconds, _READABLE)})"


def _distance(seconds: float) -> str:
    whole = int(abs(seconds))
    size, unit = next(((size, unit) for size, unit in _UNITS if whole >= size), (1, "second"))
    count = whole // size
    if not count:
        return "now"
    length = f"{count} {unit}" if count == 1 else f"{count} {unit}s"
    return f"in {length}" if seconds > 0 else f"{length} ago"


def _counts(usage: VersionUsage) -> dict[str, int]:
    import msgspec

    counts: dict[str, int] = msgspec.to_builtins(usage.operations)
    return counts


def _table(groups: list[KeyGroupView], *, usage: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("group", box=SIMPLE_HEAD)
    table.add_column("version", justify="right")
    table.add_column("state")
    if usage:
        table.add_column("last used")
        table.add_column("by")
        table.add_column("operations")
    else:
        table.add_column("created (UTC)")
    now = time.time()
    for group in groups:
        name = one_line(group.key_id)
        for version in group.versions:
            # Text, not str: a name is not markup.
            table.add_row(
                Text(name),
                f"v{version.version}",
                Text(one_line(version.status), _STATE_STYLES.get(version.status, "")),
                *(
                    map(Text, _usage_cells(version.usage, now))
                    if usage
                    else [_moment(version.created_at_epoch_sec, "%Y-%m-%d %H:%M:%S")]
                ),
            )
            name = ""
    Console().print(table)


def _usage_cells(usage: VersionUsage | None, now: float) -> list[str]:
    if usage is None:
        return ["not known", "", ""]
    if usage.last_used_epoch_sec is None:
        return [f"never since {_moment(usage.since_epoch_sec, '%Y-%m-%d')}", "", ""]
    counts = ", ".join(f"{count} {kind}" for kind, count in _counts(usage).items())
    return [_distance(usage.last_used_epoch_sec - now), one_line(usage.last_used_by or ""), counts]


def _moment(seconds: int, form: str) -> str:
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
    if not _is_terminal(sys.stderr) or (target is None and _is_terminal(sys.stdout)):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    total = source.stat().st_size if source is not None and source.is_file() else None
    with bar:
        task = bar.add_task(source.name.replace("[", r"\[") if source is not None else "standard input", total=total)
        yield lambda read: bar.advance(task, read)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())
