"""SAC updates on a device: the graph engine beside torch's and a hand-tuned peer; where a large update's time goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from angle_rl.bench.gpu_lean import LeanStyle, check_lean
from angle_rl.bench.gpu_timing import Case, Place
from angle_rl.bench.learners import USUAL, Angle, Learner, Sizes, check_learner, random_rows
from angle_rl.bench.libraries import spaces
from angle_rl.bench.products import sac_flops
from angle_rl.bench.report import Row
from angle_rl.bench.update_cases import of_calls
from angle_rl.engines import CudaGraphEngine
from angle_rl.replay import PrioritizedReplayBuffer

GRAPH, EAGER = "angle-cuda_graph", "angle-torch"
UPDATES = (1, 8, 32)  # of one call
TOLERANCE = 0.02  # of a tensor's change after a few updates, see learners.check_engine
CHECKED = 4  # updates that are compared
WIDE = Sizes(batch=32_768, hidden_sizes=(1024, 1024))
PRECISIONS = ("highest", "high")  # of float32 products: as they are, and in TF32
PROFILED = 5  # calls whose kernels are added up
PRODUCTS = re.compile(r"gemm|cutlass|xmma|nvjet|wgmma|gemv|splitk|cublas|addmm|baddbmm|aten::(mm|bmm)$", re.IGNORECASE)
SHOWN = 20  # kernels that take longest, in the JSON


class DeviceAngle(Angle):
    """Ours with networks and replay on the device."""

    def __init__(
        self, place: Place, capacity: int, sizes: Sizes = USUAL, *, graph: bool, updates: int = 1, replay: Any = None
    ) -> None:
        """`graph`: the engine; without a device its steps are taken one by one, by the kernels for the host."""
        if place.real:
            engine = "cuda_graph" if graph else "torch"
            super().__init__(capacity, sizes, engine=engine, updates=updates, replay=replay, device="cuda")
        else:
            replay = _resident(capacity) if replay is None else replay
            super().__init__(capacity, sizes, engine="torch", updates=updates, replay=replay)
            if graph:
                parts: Any = self.agent
                spec, update = parts._spec(self.state), parts._update_parts(self.state)
                self.state.engine = CudaGraphEngine(spec, update, capture=False)
        self.name = GRAPH if graph else EAGER
        if not getattr(self.state.replay, "resident", False):
            raise RuntimeError(f"{self.name}: the replay is not on the device")

    def require_engine(self) -> None:
        """RuntimeError where it gave up recording."""
        engine: Any = self.state.engine
        if self.name == GRAPH and engine.name != "cuda_graph":
            raise RuntimeError(f"{self.name}: {engine.why}")


def _resident(capacity: int) -> PrioritizedReplayBuffer:
    observation_space, action_space = spaces()
    return PrioritizedReplayBuffer(
        capacity, observation_space=observation_space, action_space=action_space, device="cuda"
    )


# The usual sizes ----------


def measure_updates(place: Place) -> None:
    """``learner_update``: everybody on 1M rows, in turns, once their numbers are right."""
    capacity = place.choose(1_000_000, 100_000, 512)
    sizes = place.choose(USUAL, USUAL, Sizes(batch=32))
    numbers = place.choose(UPDATES, UPDATES, (1, 2))
    rows = random_rows(capacity)
    learners: list[Learner] = []
    with place.part("numbers of ours"):
        _check_graph(place, sizes)
    replay: Any = None
    for graph, updates in ((False, 1), *((True, number) for number in numbers)):
        name = f"{GRAPH if graph else EAGER}, {updates} a call"
        with place.part(name):
            learner = DeviceAngle(place, capacity, sizes, graph=graph, updates=updates, replay=replay)
            learner.fill(rows)
            replay = learner.state.replay
            for _ in range(3):  # torch's, the recording, the graph
                check_learner(learner)
            learner.require_engine()
            learners.append(learner)
    with place.part("numbers of lean-style", ours=False):
        check_lean(place, random_rows(64))
    for compiled in (True, False):
        with place.part(f"lean-style, {'compiled' if compiled else 'recorded only'}", ours=False):
            lean = LeanStyle(place, capacity, sizes.batch, compiled=compiled)
            lean.fill(rows)
            check_learner(lean)
            learners.append(lean)
    with place.part("times"):
        cases = [
            Case(library=each.name, call=each.update, calls=each.updates, extra=of_calls(each.updates))
            for each in learners
        ]
        place.measure("learner_update", cases, batch=sizes.batch, capacity=capacity, multiple=2)
        _, necessary = sac_flops(batch=sizes.batch, hidden_sizes=sizes.hidden_sizes)
        rate = _product_rate(place, sizes)
        place.add_floor("learner_update", necessary / rate * 1e6, batch=sizes.batch, capacity=capacity, flops=necessary)
    for one in learners:
        if isinstance(one, DeviceAngle):
            with place.part(f"{one.name}, {one.updates} a call, afterwards"):
                one.require_engine()
                check_learner(one)


def _check_graph(place: Place, sizes: Sizes) -> None:
    """RuntimeError unless the graph engine's first updates are torch's, from the same rows, networks and noise."""
    rows = random_rows(1024)
    changes = []
    for graph in (False, True):
        learner = DeviceAngle(place, 1024, sizes, graph=graph)
        learner.fill(rows)
        tensors = [*learner.critics(), *learner.targets(), *learner.policy()]
        before = [tensor.detach().clone() for tensor in tensors]
        for _ in range(CHECKED):
            learner.update()
        learner.require_engine()
        changes.append([(tensor.detach() - old).double() for tensor, old in zip(tensors, before, strict=True)])
    for expected, found in zip(*changes, strict=True):
        apart = float((expected - found).norm())
        if not apart <= TOLERANCE * float(expected.norm()) + 1e-9:
            raise RuntimeError(
                f"{GRAPH}: {CHECKED} updates changed a tensor of shape {list(expected.shape)} by "
                f"{float(found.norm()):.3g}, torch's by {float(expected.norm()):.3g}, {apart:.3g} apart"
            )


def _product_rate(place: Place, sizes: Sizes) -> float:
    """Operations a second of the hidden layers' product in float32, captured; a row for it."""
    width, batch = sizes.hidden_sizes[0], sizes.batch
    generator, many = place.generator(), place.choose(20, 20, 2)
    hidden = torch.randn(batch, width, device=place.device, generator=generator)
    weights = [torch.randn(width, width, device=place.device, generator=generator) for _ in range(many)]
    out = torch.empty_like(hidden)

    def products() -> None:
        for weight in weights:
            torch.mm(hidden, weight, out=out)

    case = Case(library="torch", call=place.captured(products), calls=many, extra={"flops": 2 * batch * width * width})
    precision = torch.get_float32_matmul_precision()
    place.measure("product", [case], batch=batch, rows=f"width {width}, {precision}")
    return float(case.extra["flops"] / place.found.rows[-1].median_us * 1e6)


# Large batches, wide networks ----------


def measure_products(place: Place) -> None:
    """How much of a large update's kernel time is in matrix products, in full float32 and in TF32."""
    sizes = place.choose(WIDE, WIDE, Sizes(batch=64, hidden_sizes=(32, 32)))
    capacity = place.choose(200_000, 100_000, 512)
    rows = random_rows(capacity)
    before = torch.get_float32_matmul_precision()
    timed: list[tuple[str, DeviceAngle, Row]] = []
    try:
        for precision in PRECISIONS:
            torch.set_float32_matmul_precision(precision)
            for graph in (True, False):
                with place.part(f"{GRAPH if graph else EAGER}, {precision}"):
                    learner = DeviceAngle(place, capacity, sizes, graph=graph)
                    learner.fill(rows)
                    for _ in range(3):
                        check_learner(learner)
                    learner.require_engine()
                    timed.append((precision, learner, _time_wide(place, learner, sizes, capacity, precision)))
        for precision, learner, row in timed:  # at last, since a profiler stays and slows down what comes after it
            torch.set_float32_matmul_precision(precision)
            with place.part(f"kernels of {learner.name}, {precision}"):
                _note_share(place, learner, row, precision)
    finally:
        torch.set_float32_matmul_precision(before)


def _time_wide(place: Place, learner: DeviceAngle, sizes: Sizes, capacity: int, precision: str) -> Row:
    about: dict[str, Any] = {
        "batch": sizes.batch,
        "capacity": capacity,
        "rows": f"width {sizes.hidden_sizes[0]}, {precision}",
    }
    place.measure("wide_update", [Case(library=learner.name, call=learner.update)], **about)
    row = place.found.rows[-1]
    if learner.name == GRAPH:
        _, necessary = sac_flops(batch=sizes.batch, hidden_sizes=sizes.hidden_sizes)
        place.add_floor("wide_update", necessary / _product_rate(place, sizes) * 1e6, flops=necessary, **about)
    return row


def _note_share(place: Place, learner: DeviceAngle, row: Row, precision: str) -> None:
    """The products' share goes into the row, the kernels that take longest into what is written beside the rows."""
    times = kernel_times(place, learner.update)
    total = sum(times.values())
    if total <= 0:
        raise RuntimeError("the profiler saw no kernels")
    row.extra["products_share"] = sum(us for name, us in times.items() if PRODUCTS.search(name)) / total
    row.extra["kernel_us"] = total / PROFILED
    longest = sorted(times.items(), key=lambda item: -item[1])[:SHOWN]
    place.found.about[f"kernels of {learner.name}, {precision}"] = {name[:120]: us / total for name, us in longest}


def kernel_times(place: Place, call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel, by name, over PROFILED calls; without a device of each torch operation by itself."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if place.real else [kind.CPU]
    place.wait()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            call()
        place.wait()
    times: dict[str, float] = {}
    if place.real:
        for event in profile.events() or []:
            annotation = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
            if event.device_type == DeviceType.CUDA and not annotation:
                times[event.name] = times.get(event.name, 0.0) + float(event.time_range.elapsed_us())
    else:
        for average in profile.key_averages():
            times[average.key] = float(average.self_cpu_time_total)
    return times
