"""The floor of one SAC update: its matrix products alone, at the best rate that this machine reaches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from angle_rl.bench.rows import ACTION, OBSERVATION
from angle_rl.bench.timing import Clock

SIZE = 256  # the products measured are 256 x 256 x 256


def sac_flops(
    observation: int = OBSERVATION,
    action: int = ACTION,
    hidden: int = 256,
    batch: int = 256,
    critics: int = 2,
) -> tuple[int, int]:
    """Floating-point operations (a multiply and an add are two) of one update's products, dense and spared.

    One step of the critics and one of a squashed Gaussian policy, two hidden layers each. A layer ``[in,
    out]`` costs in * out multiply-adds a row forward, as many for its weights' gradient, and as many for its
    input's gradient:

    - the policy forward on the next observations, the target critics and the critics forward;
    - the critics backward: every weight's gradient, every input's but the first layer's;
    - the policy and the critics forward on the observations, the critics backward to the actions alone: no
      weight
      gradients, and of the first layer only the action's columns;
    - the policy backward: every weight's gradient, every input's but the first layer's.

    The second number lets only each row's minimum critic carry the policy's gradient. At the defaults these
    are 577,110,016 and 542,638,080.
    """
    policy = observation * hidden + hidden * hidden + hidden * 2 * action
    critic = (observation + action) * hidden + hidden * hidden + hidden
    critic_inputs = hidden * hidden + hidden
    policy_inputs = hidden * hidden + hidden * 2 * action
    to_actions = critic_inputs + action * hidden
    critic_step = policy + critics * (critic + critic + critic + critic_inputs)
    policy_step = policy + critics * critic + policy + policy_inputs
    dense = critic_step + policy_step + critics * to_actions
    return 2 * batch * dense, 2 * batch * (dense - (critics - 1) * to_actions)


def _candidates() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    found: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed_a, packed_b = a.to_mkldnn(), b.t().contiguous().to_mkldnn()
        linear = torch.ops.aten.mkldnn_linear
        if torch.allclose(linear(packed_a, packed_b).to_dense(), torch.mm(a, b), atol=1e-3):
            found["oneDNN linear"] = lambda: linear(packed_a, packed_b)
    return found


def best_product(seconds: float = 0.05) -> tuple[str, float, Callable[[], object]]:
    """The fastest float32 product of 256 x 256 matrices: its name, operations a second, and itself."""
    best: tuple[str, float, Callable[[], object]] | None = None
    for name, product in _candidates().items():
        for _ in range(8):
            product()
        for _ in range(4):
            start, count = time.perf_counter(), 0
            while (taken := time.perf_counter() - start) < seconds / 4:
                for _ in range(8):
                    product()
                count += 8
            rate = 2.0 * SIZE**3 * count / taken
            if best is None or rate > best[1]:
                best = (name, rate, product)
    assert best is not None
    return best


def floor_clock(product: Callable[[], object], flops: int) -> Clock:
    """A clock whose one iteration is ``flops`` floating-point operations in ``product``."""
    work = flops / (2.0 * SIZE**3)  # products an iteration

    def run(iterations: int) -> float:
        count = max(1, round(iterations * work))
        start = time.perf_counter()
        for _ in range(count):
            product()
        return (time.perf_counter() - start) * iterations * work / count

    return run
