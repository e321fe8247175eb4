"""What a command says on standard output: tables for people, tab-separated text for pipes, JSON for programs.

What a command may not need, rich's drawing above all, is imported where it is used: scripts call these often.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from kms.cli.run import one_line

if TYPE_CHECKING:
    from kms.wire.messages import KeyGroupView

_STATE_STYLES: Final = {"ACTIVE": "bold green", "ENABLED": "cyan", "DISABLED": "yellow", "DESTROYED": "dim red"}


def document(**fields: Any) -> None:
    """`fields` as one JSON document on a line of its own; bytes become base64, structs objects."""
    import msgspec

    click.echo(msgspec.json.encode(fields))


def text(line: str) -> None:
    """One line of plain text."""
    click.echo(one_line(line))


def octets(line: memoryview) -> None:
    """`line` and a line end, as it is: a secret in a buffer does not become a string on its way out."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def key_groups(groups: list[KeyGroupView]) -> None:
    """The versions of `groups`: a table at a terminal; else `group, version, state, created`, tab-separated."""
    if _is_terminal(sys.stdout):
        _table(groups)
        return
    for group in groups:
        for version in group.versions:
            created = _moment(version.created_at_epoch_sec, "%Y-%m-%dT%H:%M:%SZ")
            click.echo(f"{one_line(group.key_id)}\tv{version.version}\t{one_line(version.status)}\t{created}")


def _table(groups: list[KeyGroupView]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("group", box=SIMPLE_HEAD)
    table.add_column("version", justify="right")
    table.add_column("state")
    table.add_column("created (UTC)")
    for group in groups:
        name = one_line(group.key_id)
        for version in group.versions:
            # Text, not str: a name is not markup.
            table.add_row(
                Text(name),
                f"v{version.version}",
                Text(one_line(version.status), _STATE_STYLES.get(version.status, "")),
                _moment(version.created_at_epoch_sec, "%Y-%m-%d %H:%M:%S"),
            )
            name = ""
    Console().print(table)


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
