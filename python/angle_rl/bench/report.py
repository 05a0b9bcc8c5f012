"""Rows of a benchmark, where they were measured, and how they are printed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from angle_rl import __version__, _core

OURS = (  # names of our own libraries in a table
    "angle",
    "angle-shared",
    "angle-plain",
    "angle-torch",
    "angle-native",
    "angle-native-bf16",
    "angle-cuda_graph",
)
FLOOR = "floor"  # name of the machine's floor in a table
PEERS = (
    "cpprb",
    "tianshou",
    "stable-baselines3",
    "torchrl",
    "tensordict",
    "gymnasium",
    "mujoco",
    "jax",
    "flashbax",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured operation; times are microseconds a call, over the rounds."""

    library: str
    operation: str
    capacity: int  # rows the buffer holds, all filled
    batch: int  # rows a call touches
    threads: int  # or processes, where the operation says so
    median_us: float
    min_us: float
    max_us: float
    rows: str = "halfcheetah"  # what a row holds
    extra: dict[str, Any] = field(default_factory=dict)  # p999_us, gives ("torch", "numpy", "jax"), and the like


def summarize(
    library: str,
    operation: str,
    microseconds: Sequence[float],
    *,
    capacity: int,
    batch: int,
    threads: int,
    rows: str = "halfcheetah",
    **extra: Any,
) -> Row:
    """The row of one operation from its rounds' microseconds a call."""
    return Row(
        library=library,
        operation=operation,
        capacity=capacity,
        batch=batch,
        threads=threads,
        median_us=float(np.median(microseconds)),
        min_us=min(microseconds),
        max_us=max(microseconds),
        rows=rows,
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def metadata() -> dict[str, Any]:
    """The machine, the operating system and every version that the numbers depend on."""
    peers = {name: version for name in PEERS if (version := _version(name)) is not None}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "angle_rl": __version__,
        "isa": _core.isa(),
        "peers": peers,
    }


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


Place = tuple[str, int, int, str, int]


def place(row: Row) -> Place:
    """What a row is compared within: operation, batch, capacity, kind of rows, threads."""
    return row.operation, row.batch, row.capacity, row.rows, row.threads


def floors(rows: Iterable[Row]) -> dict[Place, Row]:
    """The floor's row of each place."""
    return {place(row): row for row in rows if row.library == FLOOR}


def floor_of(where: Place, below: dict[Place, Row]) -> Row | None:
    """The floor's row of a place, or of the same with one thread, which is all that most floors have."""
    *rest, _ = where
    return below.get(where) or next((row for key, row in below.items() if [*key[:4]] == rest), None)


def is_peer(row: Row) -> bool:
    """Whether another library made this row."""
    return row.library != FLOOR and row.library not in OURS


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one block per operation, batch and threads, the fastest first.

    ``x floor``: the row's median over the floor's. ``x peer``: the fastest peer's median over the row's, so
    above 1 is faster than every peer.
    """
    blocks: dict[Place, list[Row]] = {}
    for row in rows:
        blocks.setdefault(place(row), []).append(row)
    below = floors(rows)
    lines = []
    columns = (
        ("threads", 8),
        ("median us", 15),
        ("min us", 15),
        ("max us", 15),
        ("x floor", 10),
        ("x peer", 9),
    )
    heading = f"{'library':<22}" + "".join(f"{name:>{width}}" for name, width in columns)
    for (operation, batch, capacity, kind, threads), block in blocks.items():
        floor = floor_of((operation, batch, capacity, kind, threads), below)
        peer = min((row.median_us for row in block if is_peer(row)), default=None)
        lines += ["", f"{operation}  batch {batch}  capacity {capacity}  rows {kind}", heading]
        shown = block if floor is None or floor.threads == threads else [*block, floor]
        for row in sorted(shown, key=lambda row: row.median_us):
            over_floor = _ratio(None if floor is None else row.median_us / floor.median_us)
            over_peer = _ratio(None if peer is None or row.library == FLOOR else peer / row.median_us)
            notes = "  ".join(f"{name} {_short(value)}" for name, value in row.extra.items())
            lines.append(
                f"{row.library:<22}{row.threads:>8}{row.median_us:>15.3f}{row.min_us:>15.3f}{row.max_us:>15.3f}"
                f"{over_floor:>10}{over_peer:>9}  {notes}".rstrip()
            )
    return "\n".join(lines[1:])


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def as_json(rows: Iterable[Row], notes: Sequence[str], about: dict[str, Any], parts: dict[str, Any]) -> str:
    """``{"metadata": ..., "notes": [...], "rows": [...]}`` and ``parts``; a row's extras stand beside its columns."""
    flat = []
    for row in rows:
        columns = {name: getattr(row, name) for name in Row.__dataclass_fields__ if name != "extra"}
        flat.append({**columns, **row.extra})
    return json.dumps({"metadata": about, "notes": list(notes), **parts, "rows": flat}, indent=2) + "\n"


def publish(
    rows: Sequence[Row],
    notes: Sequence[str],
    path: Path | None,
    *,
    texts: Sequence[str] = (),
    parts: dict[str, Any] | None = None,
    **about: Any,
) -> None:
    """Prints the machine, the table, the notes and ``texts``; writes rows, notes and ``parts`` to ``path`` as JSON."""
    facts = {**metadata(), **about}
    versions = "  ".join(f"{name} {facts[name]}" for name in ("python", "numpy", "torch", "angle_rl"))
    peers = "  ".join(f"{name} {version}" for name, version in facts["peers"].items())
    details = "  ".join(f"{name} {_short(value)}" for name, value in about.items() if value is not None)
    print(
        f"{facts['cpu']}, {facts['cores']} cores, isa {facts['isa']}, {facts['os']}\n{versions}\n{peers}\n{details}\n"
    )
    print(table(rows))
    for text in texts:
        print(f"\n{text}")
    for note in notes:
        print(f"not measured: {note}")
    if path is not None:
        path.write_text(as_json(rows, notes, facts, parts or {}))
        print(f"written to {path}")
