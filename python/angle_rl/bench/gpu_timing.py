"""How operations on a device are timed: CUDA events around many launches, captured graphs, rotating inputs.

Under ``angle_rl.device.emulated()`` the same code runs on CPU tensors, by the host's clock: that shows that it runs,
and its times mean nothing.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from angle_rl import device as devices
from angle_rl.bench.peers import in_short
from angle_rl.bench.report import FLOOR, Row, summarize
from angle_rl.bench.timing import Clock, round_robin
from angle_rl.bench.update_cases import Found

FEWEST_SETS, MOST_SETS = 4, 256
SECTIONS = ("ceilings", "replay", "updates", "ops", "products")
"""In the order in which they are measured; all others need the first one's figures"""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reaches at best, measured in the same run."""

    bandwidth: float = math.inf  # bytes a second, read and written together
    host_bandwidth: float = math.inf  # bytes a second from pinned host memory
    node_us: float = 0.0  # one node of a long graph whose kernel does nothing worth mentioning

    def bytes_us(self, count: float) -> float:
        """Microseconds that so many bytes, read or written, take at least."""
        return count / self.bandwidth * 1e6

    def floor_us(self, count: float, kernels: int) -> float:
        """Microseconds that so many bytes in so many kernels, one after the other, take at least."""
        return max(self.bytes_us(count), kernels * self.node_us)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One section, as a process of its own is given it."""

    section: str
    emulated: bool = False  # the kernels as compiled for the host, tiny sizes, figures that mean nothing
    quick: bool = False  # fewer sizes, shorter turns
    ceilings: Ceilings = field(default_factory=Ceilings)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One library's way of an operation."""

    library: str
    call: Callable[[], object]
    calls: int = 1  # of what is reported in one `call`
    extra: dict[str, Any] = field(default_factory=dict)


class Place:
    """A device that one section is measured on, and what was found there so far."""

    def __init__(self, settings: Settings, output: Path | None = None) -> None:
        """`output`: where `found` is written after every part, so that a crash costs one part only."""
        self.settings = settings
        self.ceilings = settings.ceilings
        self.found = Found()
        self.failed: list[str] = []
        self.device = devices.memory_device("cuda")
        self.real = self.device.type == "cuda"
        self.repeats, self.seconds = (2, 1e-4) if not self.real else (5, 0.03) if settings.quick else (9, 0.1)
        self._output = output
        self._pools: list[Any] = []

    def choose(self, full: Any, quick: Any, emulated: Any) -> Any:
        """That one of three which this run asks for."""
        return emulated if self.settings.emulated else quick if self.settings.quick else full

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def sets(self, bytes_each: float) -> int:
        """How many sets of inputs of so many bytes take turns, so that the next lies in no cache, if that can be."""
        if not self.real:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(MOST_SETS, max(FEWEST_SETS, math.ceil(3 * cache / bytes_each)))

    # Parts ----------

    @contextmanager
    def part(self, name: str, *, ours: bool = True) -> Iterator[None]:
        """What fails inside is noted and told, and the rest goes on; `ours`: it counts as this section's failure."""
        print(f"{self.settings.section}: {name}", file=sys.stderr, flush=True)
        try:
            yield
            self.wait()
        except Exception as failure:
            self.found.notes.append(f"{self.settings.section}, {name}: {in_short(failure)}")
            if ours:
                self.failed.append(name)
                traceback.print_exception(failure)
        if self.real:
            gc.collect()  # a part's tensors are often in circles, and the next one wants their memory
        self.keep()

    def keep(self) -> None:
        """Write what was found so far."""
        if self._output is not None:
            text = json.dumps({"found": json.loads(self.found.to_json()), "failed": self.failed})
            scratch = self._output.with_suffix(".part")
            scratch.write_text(text)
            scratch.replace(self._output)

    # Times ----------

    def clock(self, call: Callable[[], object]) -> Clock:
        """A clock by events on the current stream: from before the first launch to after the last one's end."""

        def by_events(iterations: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
            begin.record()
            for _ in range(iterations):
                call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3

        def by_the_host(iterations: int) -> float:
            begin = time.perf_counter()
            for _ in range(iterations):
                call()
            return time.perf_counter() - begin

        return by_events if self.real else by_the_host

    def measure(
        self,
        operation: str,
        cases: Sequence[Case],
        *,
        batch: int,
        capacity: int = 0,
        rows: str = "-",
        multiple: int = 1,
    ) -> None:
        """Times the cases in turns; microseconds of one of each case's `calls`."""
        clocks = [self.clock(case.call) for case in cases]
        every = round_robin(clocks, repeats=self.repeats, seconds=self.seconds, multiple=multiple)
        for case, times in zip(cases, every, strict=True):
            each = [microseconds / case.calls for microseconds in times]
            self.add(
                summarize(
                    case.library, operation, each, capacity=capacity, batch=batch, threads=1, rows=rows, **case.extra
                )
            )

    def add(self, row: Row) -> None:
        self.found.rows.append(row)

    def add_floor(
        self, operation: str, microseconds: float, *, batch: int, capacity: int = 0, rows: str = "-", **extra: Any
    ) -> None:
        """The floor's row beside such an operation."""
        self.add(
            summarize(FLOOR, operation, [microseconds], capacity=capacity, batch=batch, threads=1, rows=rows, **extra)
        )

    def captured(self, body: Callable[[], object], warmups: int = 3) -> Callable[[], object]:
        """`body` as one graph; where there is no device, `body` itself. It has run `warmups` times by then."""
        if not self.real:
            for _ in range(warmups):
                body()
            return body
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(warmups):
                body()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        return graph.replay


def turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that takes the next one of these each time."""
    place = 0

    def call() -> object:
        nonlocal place
        chosen = calls[place]
        place = (place + 1) % len(calls)
        return chosen()

    return call


def bound(call: Callable[..., object], sets: Sequence[Sequence[Any]]) -> list[Callable[[], object]]:
    """The call with each of these sets of arguments."""
    return [partial(call, *arguments) for arguments in sets]


def all_of(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """A call that takes all of these, one after the other."""

    def call() -> None:
        for each in calls:
            each()

    return call


def why_no_device() -> str | None:
    """One line saying why nothing can be measured here; None where it can."""
    try:
        devices.memory_device("cuda")
        devices.backend("cuda")
    except RuntimeError as reason:
        return in_short(reason)
    return None


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def clocks_now() -> str | None:
    """The card's clocks, power and temperature, as nvidia-smi tells them; None where it does not."""
    return _nvidia_smi(CLOCKS)


def card() -> dict[str, Any]:
    """What the figures were measured on: card, driver, CUDA, multiprocessors, cache."""
    about: dict[str, Any] = {"cuda": torch.version.cuda, "torch_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        about |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": properties.L2_cache_size / 2**20,
            "driver": _nvidia_smi(("driver_version",)),
        }
    return about


def _nvidia_smi(fields: Sequence[str]) -> str | None:
    index = str(torch.cuda.current_device()) if torch.cuda.is_available() else "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = done.stdout.strip().split(", ")
    if done.returncode != 0 or len(values) != len(fields):
        return None
    if len(fields) == 1:
        return values[0]
    return ", ".join(f"{name} {value}" for name, value in zip(fields, values, strict=True))
