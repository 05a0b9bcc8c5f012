"""Figures of one update: against width, depth, batch and critics, and against threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from angle_rl.bench.learners import USUAL
from angle_rl.bench.report import FLOOR, OURS, Row
from angle_rl.bench.update_sweeps import OPERATION, SWEEPS, about

OUR_COLOURS = {"angle-native": "tab:blue", "angle-torch": "tab:cyan", "angle-native-bf16": "navy"}
PEER_COLOURS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:olive", "tab:pink", "black")
Lines = dict[str, list[tuple[int, float]]]


def label(row: Row) -> str:
    """A row's library, with what it does differently from its others."""
    remarks = []
    if "updates_a_call" in row.extra:
        remarks.append(f"{row.extra['updates_a_call']} updates a call")
    if row.extra.get("overlap"):
        remarks.append("overlap")
    return ", ".join([row.library, *remarks])


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each line looks, the same in every panel."""
    colours = iter(PEER_COLOURS * 4)
    styles: dict[str, dict[str, Any]] = {}
    for text in labels:
        library, *remarks = text.split(", ")
        line = ":" if remarks else "-"
        if library == FLOOR:
            styles[text] = {"color": "0.5", "linestyle": "--", "marker": "."}
        elif library in OURS:
            styles[text] = {"color": OUR_COLOURS[library], "linewidth": 2.2, "marker": "o", "linestyle": line}
        else:
            styles[text] = {"color": next(colours), "linewidth": 1.0, "marker": "x", "linestyle": line}
    return styles


def _draw(axes: Any, lines: Lines, styles: dict[str, dict[str, Any]], **named: Any) -> None:
    from matplotlib.ticker import NullLocator

    for text, line in lines.items():
        points = sorted(line)
        axes.plot([x for x, _ in points], [y for _, y in points], label=text, **styles[text])
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axes.set(**named)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def along(rows: Iterable[Row], name: str) -> Lines:
    """Milliseconds an update of each library along one sweep; everything else is as usual."""
    usual = about(USUAL) | {"batch": USUAL.batch}
    found: Lines = {}
    for row in rows:
        at = {key: row.batch if key == "batch" else row.extra.get(key) for key in usual}
        if row.operation == OPERATION and all(at[key] == usual[key] for key in usual if key != name):
            found.setdefault(row.library, []).append((int(at[name] or 0), row.median_us / 1e3))
    return found


def plot_sweeps(rows: Sequence[Row], path: Path) -> Path | None:
    """One update against each of the sweeps, a line of panels for each number of threads; None without any."""
    from matplotlib.figure import Figure

    threads = sorted({row.threads for row in rows if row.operation == OPERATION})
    if not threads:
        return None
    styles = _styles(dict.fromkeys(row.library for row in rows if row.operation == OPERATION))
    figure = Figure(figsize=(4.0 * len(SWEEPS), 3.8 * len(threads)), layout="constrained")
    for line, number in enumerate(threads):
        for column, sweep in enumerate(SWEEPS):
            axes = figure.add_subplot(len(threads), len(SWEEPS), len(SWEEPS) * line + column + 1)
            lines = along([row for row in rows if row.threads == number], sweep.name)
            _draw(axes, lines, styles, yscale="log", xlabel=sweep.name)
            if column == 0:
                axes.set_ylabel(f"ms an update, {number} thread{'s' * (number > 1)}")
                axes.legend(fontsize="x-small")
    figure.suptitle("One SAC update on HalfCheetah's sizes; else two hidden layers of 256, batch 256, two critics")
    figure.savefig(path, dpi=110)
    return path


def plot_threads(rows: Sequence[Row], path: Path) -> Path | None:
    """One update and training steps a second against threads; None without two numbers of threads."""
    from matplotlib.figure import Figure

    panels = (("learner_update", "ms an update"), ("train_step", "training steps a second"))
    shown = [row for row in rows if row.operation in dict(panels)]
    if len({row.threads for row in shown}) < 2:
        return None
    styles = _styles(dict.fromkeys(label(row) for row in shown))
    figure = Figure(figsize=(12.0, 4.6), layout="constrained")
    for column, (operation, words) in enumerate(panels):
        lines: Lines = {}
        for row in shown:
            if row.operation == operation:
                value = row.median_us / 1e3 if operation == "learner_update" else 1e6 / row.median_us
                lines.setdefault(label(row), []).append((row.threads, value))
        if lines:
            axes = figure.add_subplot(1, 2, column + 1)
            _draw(axes, lines, styles, yscale="log", xlabel="threads and cores", ylabel=words)
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    return path


def plot_updates(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Writes the figures that the rows hold, ``<stem>-sweeps.png`` and ``<stem>-threads.png``, and names them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = (
        plot_sweeps(rows, folder / f"{stem}-sweeps.png"),
        plot_threads(rows, folder / f"{stem}-threads.png"),
    )
    return [path for path in written if path is not None]
