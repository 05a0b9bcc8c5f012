"""Cost against capacity: rows of 32 bytes, 10,000 to 100,000,000 of them."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from angle_rl.bench.libraries import Angle, Kind, Library
from angle_rl.bench.peers import in_short
from angle_rl.bench.replay_cases import (
    FLOORS,
    Case,
    Settings,
    floor_cases,
    floor_inserts,
    insert_cases,
    measure,
    prioritized_cases,
)
from angle_rl.bench.replay_checks import fill
from angle_rl.bench.report import Row
from angle_rl.bench.rows import SMALL
from angle_rl.bench.timing import one_setting
from angle_rl.replay.arrays import available_memory

CAPACITIES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
QUICK_CAPACITIES = CAPACITIES[:3]
PEER_CAPACITY = 10_000_000  # rows up to which peers are measured too
ROOM = 100  # bytes a row that a buffer or the floor may need
BATCH_SWEEP = (32, 128, 512, 2048, 8192, 32_768, 65_536)
QUICK_BATCH_SWEEP = (32, 2048)


def _libraries(capacity: int, kinds: Sequence[Kind]) -> tuple[list[Library], list[str]]:
    """Filled libraries of ``capacity`` small rows, ours first, and a line for each that does not fit."""
    libraries: list[Library] = []
    notes = []
    for kind in [Angle, *(kinds if capacity <= PEER_CAPACITY else ())]:
        name = getattr(kind, "__name__", str(kind))
        if (short := _shortage(capacity)) is not None:
            notes.append(f"{name} with {capacity} rows of 32 bytes: {short}")
            continue
        try:
            library = kind(capacity, SMALL)
            fill(library, capacity)
        except Exception as failure:  # a peer may fail in any way of its own
            if kind is Angle:
                raise
            notes.append(f"{name} with {capacity} rows of 32 bytes: {in_short(failure)}")
            continue
        libraries.append(library)
    return libraries, notes


def _shortage(capacity: int) -> str | None:
    needed, available = capacity * ROOM, available_memory()
    if needed <= available:
        return None
    return f"{needed / 2**30:.1f} GiB are needed, {available / 2**30:.1f} GiB are available"


def _facts(library: Library) -> dict[str, int | float]:
    if not isinstance(library, Angle):
        return {}
    buffer = library.buffer
    return {"bytes_a_row": buffer.nbytes / buffer.capacity, "record_bytes": buffer._core.record_bytes}


def _one_capacity(capacity: int, kinds: Sequence[Kind], settings: Settings) -> tuple[list[Row], list[str]]:
    libraries, notes = _libraries(capacity, kinds)
    if not libraries:
        return [], notes
    batch = settings.batches[0]
    cases: list[Case] = []
    if (short := _shortage(capacity)) is None:
        floor = FLOORS[SMALL](capacity, 1)
        cases += floor_inserts(floor, capacity, SMALL)
        wanted = ("sample", "update", "cycle", "sample_out")
        cases += [case for case in floor_cases(floor, capacity, batch, SMALL) if case.operation in wanted]
    else:
        notes.append(f"floor with {capacity} rows of 32 bytes: {short}")
    for library in libraries:
        cases += insert_cases(library, capacity, _facts(library))
        cases += prioritized_cases(library, capacity, batch)
    rows = measure(cases, repeats=settings.repeats, seconds=settings.seconds, threads=settings.threads)
    return rows, notes


def capacity_rows(kinds: Sequence[Kind], settings: Settings, capacities: Sequence[int]) -> tuple[list[Row], list[str]]:
    """The operations on buffers of each of these capacities, one after the other, peers (``kinds``) and floor beside
    them: rows, and a line for what memory or a peer did not allow.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for capacity in capacities:
        if capacity < settings.batches[0]:
            continue
        with one_setting(settings.threads):
            found, why = _one_capacity(capacity, kinds, settings)
        rows += found
        notes += why
        gc.collect()
    return rows, notes
