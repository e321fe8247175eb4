"""`kms-admin list-keys`: which key groups, in which order, and how they are shown.

At a terminal a row for each group, or with `--versions` for each version, through a pager when they do not fit. In a pipe
a tab-separated line for each version, as scripts have it since the first release. A name is never cut: of two that differ
at their end, somebody would take the wrong one.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from kms.cli import render
from kms.cli.options import Count, OneOf, Settings, connected, examples
from kms.cli.words import one_line
from kms.client.environment import ADMIN

if TYPE_CHECKING:
    from rich.table import Table

    from kms.core.usage import VersionUsage
    from kms.wire.messages import KeyGroupView, VersionView

STATES: Final = ("ACTIVE", "ENABLED", "DISABLED", "DESTROYED")
ORDERS: Final = ("made", "name", "rotated", "used", "versions")
_IN_USE: Final = ("ACTIVE", "ENABLED")
_STATE_STYLES: Final = {"ACTIVE": "bold green", "ENABLED": "cyan", "DISABLED": "yellow", "DESTROYED": "dim red"}
_SORTABLE: Final = "%Y-%m-%dT%H:%M:%SZ"


@click.command(
    "list-keys",
    epilog=examples(
        "kms-admin list-keys",
        "kms-admin list-keys 'billing-*' --state DISABLED",
        "kms-admin list-keys --usage --sort used --limit 10",
        "kms-admin list-keys | grep ACTIVE",
    ),
)
@click.argument("patterns", nargs=-1, metavar="[GLOB]...")
@click.option(
    "--state",
    type=OneOf(STATES),
    metavar="STATE",
    help=f"Only key groups with a version in this state: {', '.join(STATES)}.",
)
@click.option(
    "--sort",
    "order",
    type=OneOf(ORDERS),
    metavar="ORDER",
    default="made",
    help="made (the oldest first), name, rotated or used (the latest first), or versions (the most first). [default: made]",
)
@click.option("--limit", type=Count(), metavar="N", help="At most so many key groups.")
@click.option("--versions", is_flag=True, help="A row for each version; in a pipe it is always so.")
@click.option("--usage", is_flag=True, help="Also when each was last used and by whom; of versions, also for what.")
@click.option("--no-pager", is_flag=True, help="Do not stop after a screenful. [PAGER names the pager]")
@click.pass_obj
def list_keys(
    settings: Settings,
    patterns: Sequence[str],
    state: str | None,
    order: str,
    limit: int | None,
    *,
    versions: bool,
    usage: bool,
    no_pager: bool,
) -> None:
    """List the key groups, or those whose names fit a GLOB such as 'billing-*'."""
    needs_usage = usage or order == "used"
    with connected(settings, ADMIN) as (client, _):
        groups = chosen(client.iter_key_groups(usage=needs_usage), patterns, state, order, limit)
    if settings.json:
        render.document(keyGroups=groups)
    elif not groups and render.is_terminal(sys.stdout):
        render.remark("there is no such key group; without a GLOB and --state all are listed")
    elif not render.is_terminal(sys.stdout):
        for group in groups:
            print_lines(group, usage=usage)
    else:
        _show(_version_table(groups, usage=usage) if versions else _group_table(groups, usage=usage), pages=not no_pager)


def chosen(
    groups: Iterable[KeyGroupView], patterns: Sequence[str], state: str | None, order: str, limit: int | None
) -> list[KeyGroupView]:
    """Those of `groups` whose names fit one of `patterns` (if there are any) with a version in `state`, in `order`."""
    found = [
        group
        for group in groups
        if (not patterns or any(fnmatchcase(group.key_id, pattern) for pattern in patterns))
        and (state is None or any(version.status == state for version in group.versions))
    ]
    if order != "made":
        found.sort(key=_KEYS[order])
    return found[:limit]


_KEYS: Final[dict[str, Callable[[KeyGroupView], Any]]] = {
    "name": lambda group: group.key_id,
    "rotated": lambda group: -_active(group).created_at_epoch_sec,
    "used": lambda group: -(_last_used(group) or (0, ""))[0],
    "versions": lambda group: -len(group.versions),
}


def print_lines(group: KeyGroupView, *, usage: bool) -> None:
    """`group, version, state, created`, tab-separated, for each version of `group`.

    With `usage` also `counted since, last used, by, operations`, which are empty where nothing is known.
    """
    for version in group.versions:
        created = render.exact(version.created_at_epoch_sec, _SORTABLE)
        fields = [group.key_id, f"v{version.version}", version.status, created]
        if usage:
            fields += _usage_fields(version.usage)
        click.echo("\t".join(map(one_line, fields)))


def _usage_fields(usage: VersionUsage | None) -> list[str]:
    if usage is None:
        return [""] * 4
    used = usage.last_used_epoch_sec
    return [
        render.exact(usage.since_epoch_sec, _SORTABLE),
        "" if used is None else render.exact(used, _SORTABLE),
        usage.last_used_by or "",
        " ".join(f"{kind}={count}" for kind, count in render.counts(usage).items()),
    ]


def _group_table(groups: list[KeyGroupView], *, usage: bool) -> Table:
    """A row for each group, in 80 columns; `off` are the versions that are disabled or destroyed."""
    table = _new_table("active", "versions", "off")
    for column in ("last used", "by") if usage else ("rotated",):
        table.add_column(column)
    now = time.time()
    for group in groups:
        off = sum(version.status not in _IN_USE for version in group.versions)
        if usage:
            used = _last_used(group)
            last = [_ago(used[0], now), one_line(used[1])] if used else ["never", ""]
        else:
            last = [render.exact(_active(group).created_at_epoch_sec, "%Y-%m-%d")]
        _add_row(table, group.key_id, f"v{group.active_version}", str(len(group.versions)), str(off or ""), *last)
    return table


def _version_table(groups: list[KeyGroupView], *, usage: bool) -> Table:
    """A row for each version; the name of its group stands at its first one."""
    from rich.text import Text

    table = _new_table("version")
    for column in ("state", "last used", "by", "operations") if usage else ("state", "created (UTC)"):
        table.add_column(column)
    now = time.time()
    for group in groups:
        name = group.key_id
        for version in group.versions:
            state = Text(one_line(version.status), _STATE_STYLES.get(version.status, ""))
            if usage:
                cells = _usage_cells(version.usage, now)
            else:
                cells = [render.exact(version.created_at_epoch_sec, "%Y-%m-%d %H:%M:%S")]
            _add_row(table, name, f"v{version.version}", state, *cells)
            name = ""
    return table


def _new_table(*numbers: str) -> Table:
    """A table whose first column is the name of a group; after it come `numbers`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # Whole, on more lines where it has to be.
    table.add_column("key group", overflow="fold", min_width=16)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, name: str, *cells: Any) -> None:
    from rich.text import Text

    # Text, not str: a name is not markup.
    table.add_row(Text(one_line(name)), *(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _usage_cells(usage: VersionUsage | None, now: float) -> list[str]:
    if usage is None:
        return ["not known", "", ""]
    if usage.last_used_epoch_sec is None:
        return ["never", "", ""]
    counts = ", ".join(f"{count} {kind}" for kind, count in render.counts(usage).items())
    return [_ago(usage.last_used_epoch_sec, now), one_line(usage.last_used_by or ""), counts]


def _ago(seconds: int, now: float) -> str:
    return render.distance(seconds - now)


def _active(group: KeyGroupView) -> VersionView:
    return next((one for one in group.versions if one.version == group.active_version), group.versions[-1])


def _last_used(group: KeyGroupView) -> tuple[int, str] | None:
    """When any of its versions was last used, and by whom."""
    uses = [
        (one.usage.last_used_epoch_sec, one.usage.last_used_by or "")
        for one in group.versions
        if one.usage is not None and one.usage.last_used_epoch_sec is not None
    ]
    return max(uses, default=None)


def _show(table: Table, *, pages: bool) -> None:
    from rich.console import Console

    console = Console()
    if not pages or os.environ.get("TERM", "dumb") == "dumb" or not render.is_terminal(sys.stdin):
        console.print(table)
        return
    drawn = io.StringIO()
    Console(file=drawn, width=console.width, force_terminal=True, color_system=console.color_system).print(table)  # type: ignore[arg-type]  # it takes what it gives
    if drawn.getvalue().count("\n") < shutil.get_terminal_size().lines:
        console.print(table)
    else:
        pager = os.environ.get("PAGER", "").split()
        if pager and shutil.which(pager[0]) is None:
            render.remark(f"PAGER: there is no program {pager[0]}")
        # Whether the pager shows colours is for click to find out: it tells less to, and takes them out for another. It
        # adds a line end; rich has ended the table with a blank line.
        click.echo_via_pager(drawn.getvalue().rstrip())
