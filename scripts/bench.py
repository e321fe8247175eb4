"""The benchmark: how much a KMS costs, beside a bare echo on the same library, in one run on this machine.

`nox -s bench` runs all of it; `nox -s bench -- --help` says what can be chosen. docs/performance.rst has the method.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import rich_click as click
from rich.console import Console

from scripts.benchmark import clients, control_plane, data_plane, files, report, servers, session
from scripts.benchmark.processes import Bench, BenchmarkError

SECTIONS: Final = ("data", "team", "control", "clients", "files")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("trio", "msgspec", "cryptography"))
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {libraries}",
    }


@click.command()
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Run this part alone. May be repeated.")
@click.option(
    "--match",
    multiple=True,
    metavar="TEXT",
    help="Of the data plane, rows whose names hold TEXT: 'unix Encrypt 32 B 32x1'.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Another checkout: measure this one's data plane beside that one's, too.",
)
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Rounds of each measurement; its median is reported.",
)
@click.option("--seconds", default=0.5, show_default=True, type=click.FloatRange(0.05), help="How long each load lasts.")
@click.option(
    "--file-mib", default=1024, show_default=True, type=click.IntRange(1), help="The size of the file that is encrypted."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where that file lies; by default a temporary directory.",
)
@click.option(
    "--short", is_flag=True, help="One quick round of everything, to see that it works; its figures are worth nothing."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures here.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the data plane's ratios here, as SVG.")
@click.option("--check", is_flag=True, help="End with status 1 when a target was missed.")
def main(
    *,
    only: tuple[str, ...],
    match: tuple[str, ...],
    baseline: Path | None,
    rounds: int,
    seconds: float,
    file_mib: int,
    directory: Path | None,
    short: bool,
    json_path: Path | None,
    plot: Path | None,
    check: bool,
) -> None:
    """Measure what a KMS costs.

    The data plane beside a bare echo, and with a team's configuration beside the default; the control plane, the
    clients, and files beside age and cp.
    """
    chosen = only or SECTIONS
    items = clients.ITEMS
    if short:
        rounds, seconds, file_mib, items = 1, 0.1, 16, 1_000
    console, progress = Console(), Console(stderr=True)
    # In a narrower terminal the lines wrap, which reads better than columns cut to two letters.
    console.width = max(console.width, 140)
    figures = report.Figures()
    try:
        with Bench() as bench, progress.status("") as status:
            if "files" in chosen:
                files.require_age()
            if "team" in chosen:
                servers.require_metrics()

            def said(what: str) -> None:
                status.update(what)

            if "data" in chosen:
                figures.data_plane = data_plane.measure(
                    bench, rounds=rounds, seconds=seconds, said=said, chosen=lambda name: all(t in name for t in match)
                )
            if "team" in chosen:
                figures.team = servers.team(bench, rounds=rounds, seconds=seconds, said=said)
            if baseline is not None:
                figures.session = session.compare(baseline, rounds=rounds, said=said)
                figures.baseline = servers.baseline(bench, baseline, rounds=rounds, seconds=seconds, said=said)
            if "control" in chosen:
                said("making keystores")
                directories = control_plane.data_directories(bench)
                figures.mutations = control_plane.mutations(bench, directories, rounds=rounds, seconds=seconds, said=said)
                figures.interference = control_plane.interference(
                    bench, directories[control_plane.GROUPS[0]], rounds=rounds, seconds=2 * seconds, said=said
                )
                figures.sizes = control_plane.sizes(bench, directories, rounds=rounds, said=said)
            if "clients" in chosen:
                figures.clients = clients.measure(bench, rounds=rounds, items=items, said=said)
            if "files" in chosen:
                with tempfile.TemporaryDirectory(prefix="kmsbench", dir=directory) as place:
                    figures.files = files.measure(bench, Path(place), size_mib=file_mib, rounds=rounds, said=said)
                figures.cold_starts = files.cold_start(bench, rounds=4 * rounds, said=said)
    except BenchmarkError as error:
        progress.print(f"bench: {error}", markup=False, highlight=False)
        sys.exit(1)
    machine_ = machine()
    report.show(console, figures, machine_)
    if not short:
        report.show_targets(console, figures)
    if json_path is not None:
        everything: dict[str, Any] = {"machine": machine_, "rounds": rounds, "seconds": seconds}
        json_path.write_text(json.dumps(everything | msgspec.to_builtins(figures), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        report.plot(figures.data_plane, plot)
    if check and not all(target.is_reached for target in report.targets(figures)):
        sys.exit(1)


if __name__ == "__main__":
    main()
