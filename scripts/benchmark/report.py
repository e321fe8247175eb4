"""What the benchmark found, as tables for people, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from scripts.benchmark.clients import Client
from scripts.benchmark.control_plane import Interference, Mutations, Size
from scripts.benchmark.data_plane import SHAPES, Row
from scripts.benchmark.files import ColdStart, FileRate


class Figures(msgspec.Struct, rename="camel"):
    """All that was measured; a part that was not chosen is empty."""

    data_plane: list[Row] = []
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
        if file.name.startswith("kms-client"):
            yield Target(f"{file.name}: throughput / age's", file.ratio, 1)
            yield Target(f"{file.name}: peak, MiB", file.peak_mib, 100, at_most=True)


def show(console: Console, figures: Figures, machine: dict[str, str]) -> None:
    """Print a table for each part that was measured."""
    for name, value in machine.items():
        console.print(f"{name:10} {value}", highlight=False)
    if figures.data_plane:
        table = _table("Data plane: replies per second, times in us", "what", "replies", "of the echo's")
        for column in ("p50", "p99", "max", "CPU each", "RSS, MiB", "busy", "load busy"):
            table.add_column(column, justify="right")
        for row in figures.data_plane:
            table.add_row(
                f"{row.transport} {row.operation} {row.connections}x{row.depth}",
                f"{row.rate:,.0f}",
                f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
                f"{row.p50:,.0f}",
                f"{row.p99:,.0f}",
                f"{row.max:,.0f}",
                f"{row.cpu_per_request:.1f}",
                f"{row.resident_mib:.0f}",
                f"{row.busy:.0%} ({row.echo_busy:.0%})",
                f"{row.load_busy:.0%} ({row.echo_load_busy:.0%})",
            )
        console.print(table)
    if figures.mutations:
        table = _table(
            "Mutations, each durable before its answer: times in ms",
            "what",
            "groups",
            "clients",
            "per second",
            "p50",
            "p99",
        )
        for mutated in figures.mutations:
            table.add_row(
                mutated.what,
                f"{mutated.groups:,}",
                str(mutated.clients),
                f"{mutated.rate:,.0f}",
                f"{mutated.p50:.1f}",
                f"{mutated.p99:.1f}",
            )
        console.print(table)
    if figures.interference:
        table = _table("Encrypt 32 B beside another client: p99 in us", "beside", "shape", "quiet", "disturbed", "ratio")
        for column in ("low-high", "the other's rate"):
            table.add_column(column, justify="right")
        for beside in figures.interference:
            table.add_row(
                beside.beside,
                f"{beside.connections}x1",
                f"{beside.quiet:,.0f}",
                f"{beside.disturbed:,.0f}",
                f"{beside.ratio:.2f}",
                f"{beside.ratio_low:.2f}-{beside.ratio_high:.2f}",
                f"{beside.rate:,.0f}",
            )
        console.print(table)
    if figures.sizes:
        table = _table("Size", "groups", "KEKs", "start-up, s", "idle, MiB", "with 256 idle connections, MiB")
        for size in figures.sizes:
            table.add_row(
                f"{size.groups:,}", f"{size.keks:,}", f"{size.start_up:.2f}", f"{size.idle:.1f}", f"{size.connected:.1f}"
            )
        console.print(table)
    if figures.clients:
        table = _table(
            "Clients: Encrypt of 16 bytes, per second", "client", "one by one", "encrypt_many", "ratio", "low-high"
        )
        for client in figures.clients:
            table.add_row(
                client.name,
                f"{client.single:,.0f}",
                f"{client.many:,.0f}",
                f"{client.ratio:.1f}",
                f"{client.ratio_low:.1f}-{client.ratio_high:.1f}",
            )
        console.print(table)
    if figures.files:
        table = _table("A file, until it is durable", "command", "MiB/s", "ratio to age", "low-high", "peak, MiB")
        for file in figures.files:
            table.add_row(
                file.name,
                f"{file.rate:,.0f}",
                f"{file.ratio:.2f}",
                f"{file.ratio_low:.2f}-{file.ratio_high:.2f}",
                f"{file.peak_mib:.0f}",
            )
        console.print(table)
    if figures.cold_starts:
        table = _table("Cold start", "command", "ms")
        for cold in figures.cold_starts:
            table.add_row(cold.name, f"{cold.milliseconds:.0f}")
        console.print(table)


def show_targets(console: Console, figures: Figures) -> None:
    """Print what was set out to be reached, and whether it was."""
    table = _table("Targets", "what", "measured", "bound", "")
    for target in targets(figures):
        table.add_row(
            target.name,
            f"{target.measured:.2f}",
            f"{'<=' if target.at_most else '>='} {target.bound:g}",
            "reached" if target.is_reached else "[bold red]missed[/]",
        )
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table


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
