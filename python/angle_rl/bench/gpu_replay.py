"""Prioritised replay on a device: draws with new priorities, and inserts, beside TorchRL's and the bytes' floor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from angle_rl.bench import replay_atari
from angle_rl.bench.gpu_libraries import PAGE, Angle, AtariAngle, TorchRL, TorchRLHostTree, chunks_there, make_there
from angle_rl.bench.gpu_timing import Case, Place, all_of, bound, turns
from angle_rl.bench.replay_checks import check_library
from angle_rl.bench.rows import HALFCHEETAH, Shape, check_indices, make_rows

PAIRS = 50  # draws with new priorities in one graph
ERRORS = 16  # sets of td errors that take turns
HANDLE, WEIGHT, DISCOUNT, STEPS, ERROR, LEAF, WORD = 8, 4, 4, 8, 4, 8, 8  # bytes
KERNELS = 2  # one that draws, one that updates


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One filled buffer, and what is measured on it."""

    shape: Shape
    capacity: int
    batches: tuple[int, ...]  # drawn and updated
    inserts: tuple[int, ...]  # rows of one insert


def buffers(place: Place) -> list[Buffer]:
    """Smallest first, so that what does not fit comes last."""
    large, small = place.choose((65_536, 256), (65_536, 256), (64, 16))
    every = place.choose((1, 1024, 65_536), (1, 1024), (1, 32))
    cheetahs = place.choose((1_000_000, 10_000_000), (1_000_000,), (2_000,))
    pages = place.choose(1_000_000, 200_000, 500)
    found = [
        Buffer(shape=HALFCHEETAH, capacity=n, batches=(large, small), inserts=every if n == cheetahs[0] else ())
        for n in cheetahs
    ]
    return [*found, Buffer(shape=PAGE, capacity=pages, batches=(large,), inserts=())]


def cycle_bytes(shape: Shape, batch: int) -> int:
    """Bytes that must be read or written to draw so many rows and give them new priorities.

    Of each drawn row its numbers are read and written, and its leaf and the word that tells its age and end are read;
    handle, importance weight, discount and steps are written. Then handle, td error and leaf are read, and the leaf and
    the priority written. Of the tree nothing else: its upper levels are few and shared by all draws.
    """
    drawn = 2 * shape.payload + LEAF + WORD + HANDLE + WEIGHT + DISCOUNT + STEPS
    return batch * (drawn + HANDLE + ERROR + 2 * LEAF + WORD)


def measure_replay(place: Place) -> None:
    """Everybody's answers, then every buffer."""
    with place.part("answers of ours"):
        check_library(Angle)
    peers: list[type[TorchRL]] = []
    for kind in (TorchRL, TorchRLHostTree):
        with place.part(f"answers of {kind.name}", ours=False):
            if peers:
                continue  # the trees on the device are there, so those in host memory need no measuring
            check_library(kind)
            if place.real and kind is TorchRL:
                _require_tree(kind)
            peers.append(kind)
    for buffer in buffers(place):
        about = f"{buffer.capacity:,} rows of {buffer.shape.name}"
        with place.part(about):
            _measure_buffer(place, buffer, peers)
        if place.real:
            torch.cuda.empty_cache()
    with place.part("frames"):
        _measure_frames(place)


def _measure_frames(place: Place) -> None:
    """Atari rows, of which a record keeps one frame: draws, and inserts of as many as vectors of environments give."""
    capacity, batch = place.choose((20_000, 256), (5_000, 256), (300, 8))
    ours = AtariAngle(capacity)
    inserted = capacity + replay_atari.CHUNK
    for first in range(0, inserted, replay_atari.CHUNK):
        ours.insert_many(replay_atari.make_rows(np.arange(first, min(first + replay_atari.CHUNK, inserted))))

    def check() -> None:
        replay_atari.check_rows(ours.arrays(ours.sample(batch)), inserted - capacity, inserted - 1, ours.name)

    check()
    frame, stacks = replay_atari.SIDE**2, 2 * replay_atari.FRAMES
    drawn = batch * ((stacks + replay_atari.FRAMES + 1) * frame + LEAF + WORD + HANDLE + WEIGHT + DISCOUNT + STEPS)
    about: dict[str, Any] = {"batch": batch, "capacity": capacity, "rows": replay_atari.ROWS}
    cases = [
        Case(library=ours.name, call=partial(ours.sample, batch)),
        Case(library=ours.name, call=partial(ours.sample_out, batch), extra={"out": True}),
    ]
    place.measure("sample_frames", cases, **about)
    place.add_floor("sample_frames", place.ceilings.floor_us(drawn, 1), bytes=drawn, **about)
    check()
    for rows in place.choose((8, 64), (8,), (3,)):
        made = replay_atari.make_rows(np.arange(inserted, inserted + rows))
        call = partial(ours.insert_many, made)
        place.measure("insert_frames", [Case(library=ours.name, call=call)], **{**about, "batch": rows})
        count = rows * stacks * frame
        over = count / place.ceilings.host_bandwidth * 1e6
        place.add_floor("insert_frames", over, bytes=count, **{**about, "batch": rows})
    faults = ours.buffer.audit()
    if faults:
        raise RuntimeError(f"angle: after the measurements {faults[0]}")


def _require_tree(kind: type[TorchRL]) -> None:
    library = kind(64)
    library.insert_many(library.ready_rows(make_rows(torch.arange(64).numpy())))
    library.sample(4)
    library.require_tree()


def _measure_buffer(place: Place, buffer: Buffer, kinds: Sequence[type[TorchRL]]) -> None:
    ours = Angle(buffer.capacity, buffer.shape)
    _fill(place, ours, buffer)
    for batch in buffer.batches:
        with place.part(f"graphs of {batch:,} of {buffer.capacity:,}"):
            _measure_graphs(place, ours, buffer, batch)
    peers = []
    for kind in kinds:
        with place.part(f"filling {kind.name}", ours=False):
            peer = kind(buffer.capacity, buffer.shape)
            _fill(place, peer, buffer)
            peers.append(peer)
    for batch in buffer.batches:
        with place.part(f"draws of {batch:,} of {buffer.capacity:,}"):
            _measure_draws(place, ours, peers, buffer, batch)
    for rows in buffer.inserts:
        with place.part(f"inserts of {rows:,}"):
            _measure_inserts(place, ours, peers, buffer, rows)
    with place.part(f"sums of {buffer.capacity:,} rows afterwards"):
        faults = ours.buffer.audit()
        if faults:
            raise RuntimeError(f"angle: after the measurements {faults[0]}")
    ours.buffer.close()
    del ours, peers
    gc.collect()


def _fill(place: Place, library: Any, buffer: Buffer) -> None:
    """Rows 0 to the capacity, with varied priorities; then a few batches must be whole."""
    generator = place.generator()
    first = 0
    for rows in chunks_there(buffer.capacity, buffer.shape, place.device):
        library.insert_many(library.ready_there(rows))
        n = len(rows.rewards)
        handles = torch.arange(first, first + n, device=place.device)
        library.update(handles, torch.empty(n, device=place.device).exponential_(generator=generator))
        first += n
    for _ in range(4):
        check_indices(library.arrays(library.sample(64)), buffer.capacity, buffer.capacity, library.name)


def _errors(place: Place, batch: int) -> list[torch.Tensor]:
    generator = place.generator(1)
    return [torch.empty(batch, device=place.device).exponential_(generator=generator) for _ in range(ERRORS)]


def _floor(place: Place, operation: str, buffer: Buffer, batch: int) -> None:
    count = cycle_bytes(buffer.shape, batch)
    place.add_floor(
        operation,
        place.ceilings.floor_us(count, KERNELS),
        batch=batch,
        capacity=buffer.capacity,
        rows=buffer.shape.name,
        bytes=count,
        bytes_us=place.ceilings.bytes_us(count),
    )


def _measure_graphs(place: Place, ours: Angle, buffer: Buffer, batch: int) -> None:
    """Draws with new priorities as graphs: many pairs a launch, and one."""
    replay: Any = ours.buffer
    sets = min(PAIRS, place.sets(batch * buffer.shape.payload))
    filled = [replay.sample(batch) for _ in range(sets)]
    errors = _errors(place, batch)

    def pair(number: int) -> Callable[[], object]:
        out, td_errors = filled[number % sets], errors[number % ERRORS]

        def call() -> object:
            replay.sample(batch, out=out)
            return replay.update_priorities(out.handles, td_errors)

        return call

    pairs = place.choose(PAIRS, PAIRS, 2)
    cases = []
    for count in (pairs, 1):
        launch = place.captured(all_of([pair(number) for number in range(count)]))

        def call(launch: Callable[[], object] = launch, count: int = count) -> None:
            replay.refresh()
            launch()
            replay.launched(samples=count)

        cases.append(Case(library=ours.name, call=call, calls=count, extra={"pairs_a_launch": count}))
    about: dict[str, Any] = {"batch": batch, "capacity": buffer.capacity, "rows": buffer.shape.name}
    place.measure("sample_update_graph", cases, **about)
    _floor(place, "sample_update_graph", buffer, batch)
    for out in filled:
        check_indices(ours.arrays(out), buffer.capacity, buffer.capacity, ours.name)


def _measure_draws(place: Place, ours: Angle, peers: Sequence[TorchRL], buffer: Buffer, batch: int) -> None:
    """A batch as the library gives it, then new priorities for its rows; ours also into tensors that are there."""
    errors = _errors(place, batch)

    def cycle(library: Any, sample: Callable[[int], Any]) -> Callable[[], object]:
        def one(td_errors: torch.Tensor) -> Callable[[], object]:
            return lambda: library.update(library.handles(sample(batch)), td_errors)

        return turns([one(td_errors) for td_errors in errors])

    libraries: list[Any] = [ours, *peers]
    cases = [Case(library=library.name, call=cycle(library, library.sample)) for library in libraries]
    cases.append(Case(library=ours.name, call=cycle(ours, ours.sample_out), extra={"out": True}))
    place.measure("sample_update", cases, batch=batch, capacity=buffer.capacity, rows=buffer.shape.name)
    _floor(place, "sample_update", buffer, batch)


def _measure_inserts(place: Place, ours: Angle, peers: Sequence[TorchRL], buffer: Buffer, rows: int) -> None:
    """Rows from host arrays and from tensors on the device; the buffer goes on as if they followed its own."""
    shape = buffer.shape
    sets = min(place.sets(rows * shape.payload), 64)
    numbers = [torch.arange(buffer.capacity + k * rows, buffer.capacity + (k + 1) * rows) for k in range(sets)]
    of_the_host = [(ours.ready_rows(make_rows(each.numpy(), shape)),) for each in numbers]
    there = [make_there(each.to(place.device), shape) for each in numbers]

    about: dict[str, Any] = {"batch": rows, "capacity": buffer.capacity, "rows": shape.name}
    place.measure("insert_host", [Case(library=ours.name, call=turns(bound(ours.insert_many, of_the_host)))], **about)
    count = rows * (shape.payload + 1)
    over = count / place.ceilings.host_bandwidth * 1e6
    place.add_floor("insert_host", max(over, place.ceilings.floor_us(3 * count, 1)), bytes=count, **about)
    libraries: list[Any] = [ours, *peers]
    cases = [
        Case(
            library=library.name,
            call=turns(bound(library.insert_many, [(library.ready_there(made),) for made in there])),
        )
        for library in libraries
    ]
    place.measure("insert_device", cases, **about)
    count = rows * (2 * (shape.payload + 1) + LEAF + 3 * WORD)
    place.add_floor("insert_device", place.ceilings.floor_us(count, 1), bytes=count, **about)
