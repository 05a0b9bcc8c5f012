"""Figures of the sweeps: ours, the peers, the floor and the goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from angle_rl.bench.goals import GOALS, PER_SECOND
from angle_rl.bench.report import FLOOR, OURS, Row

CAPACITY_OPERATIONS = ("sample", "update", "cycle", "insert")
BATCH_OPERATIONS = ("sample", "update", "cycle", "uniform_sample")
THREADS = (("native", "native threads"), ("concurrent", "Python threads"))
PROCESSES = (("process_native", "processes, native loops"), ("process", "processes, Python loops"))
PEER_COLOURS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:olive")


def _styles(libraries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each library's line looks, the same in every panel."""
    colours = iter(PEER_COLOURS * 4)
    styles: dict[str, dict[str, Any]] = {}
    for library in libraries:
        if library == FLOOR:
            styles[library] = {"color": "0.5", "linestyle": "--", "marker": "."}
        elif library in OURS:
            styles[library] = {"color": "tab:blue", "linewidth": 2.2, "marker": "o"}
        else:
            styles[library] = {"color": next(colours), "linewidth": 1.0, "marker": "x"}
    return styles


def _lines(rows: Sequence[Row], along: str, operations: Sequence[str], title: str, path: Path) -> Path | None:
    """Microseconds a call along ``along`` ("capacity" or "batch"), one panel per operation; None without two points."""
    from matplotlib.figure import Figure

    styles = _styles(dict.fromkeys(row.library for row in rows))
    panels = []
    for operation in operations:
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.operation == operation:
                series.setdefault(row.library, []).append((getattr(row, along), row.median_us))
        if any(len(line) > 1 for line in series.values()):
            panels.append((operation, series))
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    for place, (operation, series) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for library, line in series.items():
            points = sorted(line)
            axes.plot([x for x, _ in points], [y for _, y in points], label=library, **styles[library])
        axes.set(xscale="log", yscale="log", title=operation, xlabel=along)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
        if place == 0:
            axes.set_ylabel("microseconds a call")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return path


def plot_capacity(rows: Sequence[Row], path: Path) -> Path | None:
    """Cost of each operation against capacity, rows of 32 bytes; None where there is nothing to draw."""
    small = [row for row in rows if row.rows == "32 bytes"]
    return _lines(small, "capacity", CAPACITY_OPERATIONS, "Cost against capacity, rows of 32 bytes", path)


def plot_batches(rows: Sequence[Row], path: Path) -> Path | None:
    """Cost of each operation against the batch size, HalfCheetah rows; None where there is nothing to draw."""
    large = [row for row in rows if row.rows == "halfcheetah" and row.batch > 1]
    return _lines(large, "batch", BATCH_OPERATIONS, "Cost against batch size, HalfCheetah rows", path)


def _bars(axes: Any, rows: Sequence[Row], operation: str) -> None:
    """Calls a second of each library and number of threads, the floor and the goal as lines across."""
    shown = [row for row in rows if row.library != FLOOR]
    shown.sort(key=lambda row: (row.threads, row.library not in OURS, row.library))
    heights = [row.extra[PER_SECOND] for row in shown]
    colours = ["tab:blue" if row.library in OURS else "tab:orange" for row in shown]
    places = list(range(len(shown)))
    drawn = axes.bar(places, heights, color=colours)
    axes.set_xticks(places, [f"{row.library}\n{row.threads}" for row in shown], fontsize="x-small")
    axes.bar_label(drawn, [f"{height:,.0f}" for height in heights], fontsize="x-small")
    for row in rows:
        if row.library == FLOOR:
            axes.axhline(row.extra[PER_SECOND], color="0.5", linestyle="--", label="floor, one thread")
            heights.append(row.extra[PER_SECOND])
    for goal in GOALS:
        if goal.operation == operation and goal.figure == PER_SECOND:
            axes.axhline(goal.limit, color="tab:green", linestyle=":", label=f"goal, {goal.threads} at once")
            heights.append(goal.limit)
    axes.set(yscale="log", ylim=(min(heights) / 3, max(heights) * 6))
    axes.legend(fontsize="x-small", loc="upper right", ncols=2)


def plot_races(rows: Sequence[Row], kinds: Sequence[tuple[str, str]], path: Path) -> Path | None:
    """Inserts and cycles a second by so many threads or processes, as bars; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in kinds if any(row.operation == f"{kind[0]}_insert" for row in rows)]
    if not kinds:
        return None
    figure = Figure(figsize=(10.0, 3.8 * len(kinds)), layout="constrained")
    for line, (prefix, words) in enumerate(kinds):
        for column, work in enumerate(("insert", "cycle")):
            operation = f"{prefix}_{work}"
            axes = figure.add_subplot(len(kinds), 2, 2 * line + column + 1)
            _bars(axes, [row for row in rows if row.operation == operation], operation)
            axes.set(title=f"{words}: {work}s a second")
    figure.savefig(path, dpi=110)
    return path


def plot_all(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Writes the figures of every sweep that the rows hold, ``<stem>-<sweep>.png``, and names them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = (
        plot_capacity(rows, folder / f"{stem}-capacity.png"),
        plot_batches(rows, folder / f"{stem}-batch.png"),
        plot_races(rows, THREADS, folder / f"{stem}-threads.png"),
        plot_races(rows, PROCESSES, folder / f"{stem}-processes.png"),
    )
    return [path for path in written if path is not None]
