"""What the benchmark found, as tables for people, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from scripts.benchmark.clients import Client
from scripts.benchmark.control_plane import Interference, Mutations, Size
from scripts.benchmark.data_plane import SHAPES
from scripts.benchmark.files import FILE_RATIOS, ColdStart, FileRate
from scripts.benchmark.session import SessionCost
from scripts.benchmark.turns import Row

R = TypeVar("R")


class Figures(msgspec.Struct, rename="camel"):
    """All that was measured; a part that was not chosen is empty."""

    data_plane: list[Row] = []
    team: list[Row] = []
    baseline: list[Row] = []
    session: list[SessionCost] = []
    mutations: list[Mutations] = []
    interference: list[Interference] = []
    sizes: list[Size] = []
    clients: list[Client] = []
    files: list[FileRate] = []
    cold_starts: list[ColdStart] = []


class Target(msgspec.Struct, frozen=True):
    """A figure that was set out to be reached. `bound` is the least or, with `at_most`, the greatest it may be."""

    name: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def is_reached(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def targets(figures: Figures) -> Iterator[Target]:
    """Each target of which the figures were measured."""
    rows = {(row.transport, row.operation, row.connections, row.depth): row for row in figures.data_plane}
    for row in figures.data_plane:
        what = f"{row.operation} {row.connections}x{row.depth}, {row.transport}"
        if row.target is not None:
            yield Target(f"{what}: ratio to the echo", row.ratio, row.target)
        encrypt = rows.get((row.transport, "Encrypt 32 B", row.connections, row.depth))
        if row.operation in ("Decrypt 32 B", "GenerateDataKey") and encrypt is not None and row.transport == "unix":
            yield Target(f"{what}: ratio to Encrypt's", row.ratio / encrypt.ratio, 0.8)
        if (row.operation, row.transport, row.connections, row.depth) == ("Encrypt 32 B", "unix", 32, 1):
            yield Target(f"{what}: p99 / p50", row.p99 / row.p50, 2, at_most=True)
    for row in (*figures.team, *figures.baseline):
        if row.target is not None:
            what = f"{row.operation} {row.connections}x{row.depth}"
            yield Target(f"{what}: {row.server} / {row.other}", row.ratio, row.target)
    for cost in figures.session:
        yield Target(f"{cost.operation} in Session.serve / the baseline's", cost.ratio, cost.bound, at_most=True)
    rates = {(row.what, row.groups, row.clients): row for row in figures.mutations}
    for (what, groups, clients), mutated in rates.items():
        if clients > 1:
            alone = rates[what, groups, 1]
            yield Target(f"{groups} groups: {what}, by {clients} clients / by one", mutated.rate / alone.rate, 5)
        elif what == "rotate" and groups == max(row.groups for row in figures.mutations):
            yield Target(f"{groups} groups: rotate, p99, ms", mutated.p99, 150, at_most=True)
    for other in figures.interference:
        name = f"Encrypt 32 B {other.connections}x1: p99 beside {other.beside} / quiet"
        yield Target(name, other.ratio, 3 if other.beside == "rotations" else 5, at_most=True)
    for size in figures.sizes:
        if size is figures.sizes[-1]:
            yield Target(f"{size.groups} groups: start-up, s", size.start_up, 3, at_most=True)
        else:
            yield Target(f"{size.groups} groups: idle, MiB", size.idle, 60, at_most=True)
        yield Target(f"{size.groups} groups: 256 idle connections add, MiB", size.connected - size.idle, 10, at_most=True)
    for client in figures.clients:
        yield Target(f"{client.name}: encrypt_many / single calls", client.ratio, 5)
    for file in figures.files:
        bound = FILE_RATIOS.get(file.name)
        if bound is not None:
            yield Target(f"{file.name}: throughput / age's", file.ratio, bound)
            yield Target(f"{file.name}: peak, MiB", file.peak_mib, 64, at_most=True)


def show(console: Console, figures: Figures, machine: dict[str, str]) -> None:
    """Print a table for each part that was measured."""
    for name, value in machine.items():
        console.print(f"{name:10} {value}", highlight=False)
    _print(
        console,
        "Data plane: replies per second, times in us",
        figures.data_plane,
        {
            "what": lambda row: f"{row.transport} {row.operation} {row.connections}x{row.depth}",
            "replies": lambda row: f"{row.rate:,.0f}",
            "of the echo's": lambda row: f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            "p50": lambda row: f"{row.p50:,.0f}",
            "p99": lambda row: f"{row.p99:,.0f}",
            "max": lambda row: f"{row.max:,.0f}",
            "CPU each": lambda row: f"{row.cpu_per_request:.1f}",
            "RSS, MiB": lambda row: f"{row.resident_mib:.0f}",
            "busy": lambda row: f"{row.busy:.0%} ({row.other_busy:.0%})",
            "load busy": lambda row: f"{row.load_busy:.0%} ({row.other_load_busy:.0%})",
        },
    )
    _print_servers(console, "Encrypt 32 B 32x1 as a team has it", figures.team, lambda row: row.server)
    _print_servers(console, "This checkout", figures.baseline, lambda row: f"{row.operation} {row.connections}x{row.depth}")
    _print(
        console,
        "Session.serve without a socket, beside the baseline (in brackets): us",
        figures.session,
        {
            "operation": lambda row: row.operation,
            "cost": lambda row: f"{row.ours:.1f} ({row.theirs:.1f})",
            "ratio": lambda row: f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
        },
    )
    _print(
        console,
        "Mutations, each durable before its answer: times in ms",
        figures.mutations,
        {
            "what": lambda row: row.what,
            "groups": lambda row: f"{row.groups:,}",
            "clients": lambda row: str(row.clients),
            "per second": lambda row: f"{row.rate:,.0f}",
            "p50": lambda row: f"{row.p50:.1f}",
            "p99": lambda row: f"{row.p99:.1f}",
        },
    )
    _print(
        console,
        "Encrypt 32 B beside another client: p99 in us",
        figures.interference,
        {
            "beside": lambda row: row.beside,
            "shape": lambda row: f"{row.connections}x1",
            "quiet": lambda row: f"{row.quiet:,.0f}",
            "disturbed": lambda row: f"{row.disturbed:,.0f}",
            "ratio": lambda row: f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            "the other's rate": lambda row: f"{row.rate:,.0f}",
        },
    )
    _print(
        console,
        "Size",
        figures.sizes,
        {
            "groups": lambda row: f"{row.groups:,}",
            "KEKs": lambda row: f"{row.keks:,}",
            "start-up, s": lambda row: f"{row.start_up:.2f}",
            "idle, MiB": lambda row: f"{row.idle:.1f}",
            "with 256 idle connections, MiB": lambda row: f"{row.connected:.1f}",
        },
    )
    _print(
        console,
        "Clients: Encrypt of 16 bytes, per second",
        figures.clients,
        {
            "client": lambda row: row.name,
            "one by one": lambda row: f"{row.single:,.0f}",
            "encrypt_many": lambda row: f"{row.many:,.0f}",
            "ratio": lambda row: f"{row.ratio:.1f} ({row.ratio_low:.1f}-{row.ratio_high:.1f})",
        },
    )
    _print(
        console,
        "A file, until it is durable",
        figures.files,
        {
            "command": lambda row: row.name,
            "MiB/s": lambda row: f"{row.rate:,.0f}",
            "ratio to age": lambda row: f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            "peak, MiB": lambda row: f"{row.peak_mib:.0f}",
        },
    )
    _print(
        console,
        "Cold start",
        figures.cold_starts,
        {"command": lambda row: row.name, "ms": lambda row: f"{row.milliseconds:.0f}"},
    )


def _print_servers(console: Console, what: str, rows: list[Row], name: Callable[[Row], str]) -> None:
    """A table of servers beside another one, whose figures are in brackets; `name` tells its rows apart."""
    if not rows:
        return
    _print(
        console,
        f"{what}, beside {rows[0].other} (in brackets): replies per second, times in us",
        rows,
        {
            "what": name,
            "replies": lambda row: f"{row.rate:,.0f} ({row.other_rate:,.0f})",
            "ratio": lambda row: f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            "p50": lambda row: f"{row.p50:,.0f} ({row.other_p50:,.0f})",
            "p99": lambda row: f"{row.p99:,.0f} ({row.other_p99:,.0f})",
            "CPU each": lambda row: f"{row.cpu_per_request:.1f} ({row.other_cpu_per_request:.1f})",
            "busy": lambda row: f"{row.busy:.0%} ({row.other_busy:.0%})",
            "load busy": lambda row: f"{row.load_busy:.0%} ({row.other_load_busy:.0%})",
        },
    )


def show_targets(console: Console, figures: Figures) -> None:
    """Print what was set out to be reached, and whether it was."""
    _print(
        console,
        "Targets",
        list(targets(figures)),
        {
            "what": lambda target: target.name,
            "measured": lambda target: f"{target.measured:.2f}",
            "bound": lambda target: f"{'<=' if target.at_most else '>='} {target.bound:g}",
            "": lambda target: "reached" if target.is_reached else "[bold red]missed[/]",
        },
    )


def _print(console: Console, title: str, rows: Sequence[R], columns: Mapping[str, Callable[[R], str]]) -> None:
    """A table with a line for each row, or nothing without rows; each heading comes with what stands below it."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """The ratios to the echo over the Unix socket, as bars, with a mark at each target."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, which is smaller, and can be found; no date, so that the same figures make the same file.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mini-kms", "font.size": 9})
    unix = [row for row in rows if row.transport == "unix"]
    operations = list(dict.fromkeys(row.operation for row in unix))
    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(11, 2.8), sharey=True, layout="constrained")
    for axis, (connections, depth) in zip(axes, SHAPES, strict=True):
        shown = {row.operation: row for row in unix if (row.connections, row.depth) == (connections, depth)}
        for position, operation in enumerate(reversed(operations)):
            row = shown.get(operation)
            if row is None:
                continue
            axis.barh(position, row.ratio, color="#4c78a8", height=0.6)
            axis.plot([row.ratio_low, row.ratio_high], [position, position], color="#1f3b57", linewidth=1)
            axis.text(0.02, position, f"{row.ratio:.2f}", color="white", va="center")
            if row.target is not None:
                axis.plot([row.target, row.target], [position - 0.4, position + 0.4], color="#e45756", linewidth=2)
        axis.set_title(f"{connections} x {depth}", loc="left")
        axis.set_yticks(range(len(operations)), list(reversed(operations)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "replies per second, of the bare echo's; connections x requests under way; red: the target", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})
