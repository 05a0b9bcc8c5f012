"""The floor of one SAC update: its matrix products alone, at the best rate that this machine reaches."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from angle_rl import _core
from angle_rl.bench.rows import ACTION, OBSERVATION
from angle_rl.bench.timing import Clock, clock

SIZE = 256  # the usual width and batch


def sac_flops(
    observation: int = OBSERVATION,
    action: int = ACTION,
    hidden_sizes: Sequence[int] = (SIZE, SIZE),
    batch: int = SIZE,
    critics: int = 2,
) -> tuple[int, int]:
    """Floating-point operations (a multiply and an add are two) of one update's products, dense and spared.

    One step of the critics and one of a squashed Gaussian policy. A layer ``[in, out]`` costs in * out
    multiply-adds a row forward, as many for its weights' gradient, and as many for its input's gradient:

    - the policy forward on the next observations, the target critics and the critics forward;
    - the critics backward: every weight's gradient, every input's but the first layer's;
    - the policy and the critics forward on the observations, the critics backward to the actions alone: no
      weight gradients, and of the first layer only the action's columns;
    - the policy backward: every weight's gradient, every input's but the first layer's.

    The second number lets only each row's minimum critic carry the policy's gradient. At the defaults these
    are 577,110,016 and 542,638,080.
    """

    def layers(inputs: int, outputs: int) -> list[int]:
        return [i * o for i, o in itertools.pairwise((inputs, *hidden_sizes, outputs))]

    policy, critic = layers(observation, 2 * action), layers(observation + action, 1)
    policy_inputs, critic_inputs = sum(policy[1:]), sum(critic[1:])
    to_actions = critic_inputs + action * hidden_sizes[0]
    critic_step = sum(policy) + critics * (3 * sum(critic) + critic_inputs)
    policy_step = 2 * sum(policy) + critics * sum(critic) + policy_inputs
    dense = critic_step + policy_step + critics * to_actions
    return 2 * batch * dense, 2 * batch * (dense - (critics - 1) * to_actions)


@dataclass(frozen=True)
class ProductRate:
    """A float32 product [width, width] x [width, batch] and how fast it runs."""

    name: str
    rate: float  # operations a second, all threads together
    run: Clock  # of so many products, spread over the threads
    flops: float  # operations of one product


Maker = Callable[[int, int], Clock]


def _torch_mm(width: int, batch: int) -> Clock:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(batch, width, generator=generator), torch.randn(width, width, generator=generator)
    out = torch.empty(batch, width)
    return clock(lambda: torch.mm(a, b, out=out))


def _onednn(width: int, batch: int) -> Clock:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise RuntimeError("this torch has no oneDNN")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(batch, width, generator=generator), torch.randn(width, width, generator=generator)
    packed_a, packed_b = a.to_mkldnn(), b.t().contiguous().to_mkldnn()
    linear = torch.ops.aten.mkldnn_linear
    if not torch.allclose(linear(packed_a, packed_b).to_dense(), torch.mm(a, b), atol=1e-3, rtol=1e-4):
        raise RuntimeError("oneDNN's product is wrong")
    return clock(lambda: linear(packed_a, packed_b))


def _own(width: int, batch: int) -> Clock:
    """The product that the native engine uses."""
    kind: Any = getattr(_core, "ProductFloor", None)
    if kind is None:
        raise RuntimeError("this version has no product of its own")
    floor = kind(width, batch, width)
    floor.product(1)
    if not floor.agrees():
        raise RuntimeError("our own product is wrong")
    return lambda iterations: float(floor.product(iterations))


CANDIDATES: dict[str, Maker] = {"torch.mm": _torch_mm, "oneDNN linear": _onednn, "own product": _own}


def _at_once(clocks: Sequence[Clock]) -> Clock:
    """So many products spread over threads that run at the same time, each with torch on one thread."""

    def run(iterations: int) -> float:
        share = -(-iterations // len(clocks))
        start = threading.Barrier(len(clocks) + 1)

        def work(one: Clock) -> None:
            torch.set_num_threads(1)
            start.wait()
            one(share)

        before = torch.get_num_threads()
        threads = [threading.Thread(target=work, args=(one,)) for one in clocks]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - began
        torch.set_num_threads(before)
        return taken * iterations / (share * len(clocks))

    return run


def products(threads: int = 1, width: int = SIZE, batch: int = SIZE) -> dict[str, Clock]:
    """The candidates there are. Several threads run one product each: nothing that they share one can beat that."""
    found: dict[str, Clock] = {}
    for name, make in CANDIDATES.items():
        try:
            one = make(width, batch)
        except RuntimeError:
            continue
        if threads == 1:
            found[name] = one
        else:
            found[f"{name}, {threads} at once"] = _at_once([one, *(make(width, batch) for _ in range(threads - 1))])
    return found


def best_product(
    seconds: float = 0.05, threads: int = 1, width: int = SIZE, batch: int = SIZE
) -> tuple[ProductRate, dict[str, float]]:
    """The fastest float32 product of a shape on so many threads, and every candidate's operations a second."""
    flops = 2.0 * width * width * batch
    best: ProductRate | None = None
    rates: dict[str, float] = {}
    for name, run in products(threads, width, batch).items():
        count = 8 * threads
        taken = run(count)
        while taken < seconds / 4:
            count *= 2 if taken * 4 > seconds / 4 else 8
            taken = run(count)
        taken = min(taken, *(run(count) for _ in range(3)))
        rates[name] = flops * count / taken
        if best is None or rates[name] > best.rate:
            best = ProductRate(name, rates[name], run, flops)
    assert best is not None
    return best, rates


def floor_clock(product: ProductRate, flops: int) -> Clock:
    """A clock whose one iteration is ``flops`` floating-point operations in products."""
    work = flops / product.flops  # products an iteration

    def run(iterations: int) -> float:
        count = max(1, round(iterations * work))
        return product.run(count) * iterations * work / count

    return run
