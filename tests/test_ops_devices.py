"""The fused operations on devices: what the cases of test_ops.py do not ask of the CPU."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from reference.squashed_gaussian import squashed_gaussian as reference_gaussian
from reference.twin_q_loss import twin_q_loss as reference_loss
from reference.twin_q_target import twin_q_target as reference_target
from reference.update_targets import update_targets as reference_update

from angle_rl import device as device_module
from angle_rl import fused, ops

SINGLE, HALF = torch.float32, torch.bfloat16


pytestmark = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.cuda), "host kernels"], indirect=True
)


@pytest.fixture
def place(device):
    """Where the device kernels work: a CUDA device, or the CPU with the same kernels compiled for it."""
    return device


@contextmanager
def cpu_kernels(monkeypatch):
    """Within it CPU tensors go where they go for everybody."""
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "_emulated", False)
        yield


def draw(place, seed, *shape, dtype=SINGLE):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(place)


def numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def close(value, truth, dtype):
    """Rounded to ``dtype`` once."""
    relative = {HALF: 2**-8, SINGLE: 2e-6}[dtype]
    assert value.dtype == dtype
    np.testing.assert_allclose(numpy(value), truth, rtol=relative, atol=2e-5)


def loss_inputs(place, critics, batch, dtype=SINGLE):
    q = draw(place, 1, critics, batch, dtype=dtype)
    return q, draw(place, 2, batch, dtype=dtype), draw(place, 3, batch, dtype=dtype).abs()


@pytest.mark.parametrize(("critics", "batch"), [(1, 1), (2, 31), (2, 256), (33, 129), (2, 4096), (3, 4097), (2, 30001)])
def test_float32_has_the_cpu_kernels_bits(place, monkeypatch, critics, batch):
    q, target, weights = loss_inputs(place, critics, batch)
    mean, log_std, noise = (draw(place, seed, batch, critics) for seed in (4, 5, 6))
    by_actions, by_log_prob = draw(place, 7, batch, critics), draw(place, 8, batch)

    def run(*tensors):
        q, target, weights, mean, log_std, noise, by_actions, by_log_prob = tensors
        actions, log_prob, spread = fused.run_squashed_gaussian(mean, log_std, noise)
        moved = mean.clone()
        fused.run_update_targets([moved], [noise], 0.005)
        exact = {
            "target": fused.run_twin_q_target(target, weights, q, target, 0.2),
            "actions": actions,
            "spread": spread,
            "gradients": torch.stack(fused.run_squashed_gaussian_gradient(by_actions, by_log_prob, actions, spread)),
            "moved": moved,
        }
        sums = {"log_prob": log_prob}
        for huber_delta in (None, 0.8):
            sums[f"loss {huber_delta}"], *rest = fused.run_twin_q_loss(q, target, weights, huber_delta)
            exact[f"td_error {huber_delta}"], exact[f"q_gradient {huber_delta}"] = rest
        return exact, sums

    inputs = (q, target, weights, mean, log_std, noise, by_actions, by_log_prob)
    exact, sums = run(*inputs)
    with cpu_kernels(monkeypatch):
        expected, expected_sums = run(*(tensor.cpu() for tensor in inputs))
    for name, value in exact.items():
        assert torch.equal(value.cpu(), expected[name]), name
    for name, value in sums.items():  # float64 sums in another order
        torch.testing.assert_close(value.cpu(), expected_sums[name], rtol=2e-7, atol=1e-6, msg=name)


@pytest.mark.parametrize(("critics", "batch"), [(2, 256), (5, 4097)])
def test_bfloat16_is_calculated_in_float32_and_rounded_once(place, critics, batch):
    q, target, weights = loss_inputs(place, critics, batch, HALF)
    for huber_delta in (None, 0.8):
        given = q.clone().requires_grad_()
        loss, td_error = ops.twin_q_loss(given, target, weights, huber_delta=huber_delta)
        loss.backward()
        truth = reference_loss(numpy(q), numpy(target), numpy(weights), huber_delta)
        close(loss, truth[0], HALF)
        close(td_error, truth[1], HALF)
        assert given.grad.dtype == HALF
        np.testing.assert_allclose(numpy(given.grad), truth[2], rtol=2**-8, atol=1e-7)
    value = ops.twin_q_target(target, weights, q, target, 0.3)
    close(value, reference_target(numpy(target), numpy(weights), numpy(q), numpy(target), 0.3), HALF)
    inputs = [draw(place, seed, batch, 6, dtype=HALF) for seed in (4, 5, 6)]
    actions, log_prob = ops.squashed_gaussian(*inputs)
    truth = reference_gaussian(*map(numpy, inputs))
    close(actions, truth[0], HALF)
    close(log_prob, truth[1], HALF)


def test_gaussian_gradients_in_bfloat16(place):
    mean, log_std = (draw(place, seed, 40, 6, dtype=HALF).requires_grad_() for seed in (1, 2))
    noise, by_actions, by_log_prob = draw(place, 3, 40, 6), draw(place, 4, 40, 6), draw(place, 5, 40)
    actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
    ((actions * by_actions).sum() + (log_prob * by_log_prob).sum()).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (mean, log_std)]
    actions, log_prob = ops._squashed_gaussian_formula(*wide, noise.double())
    ((actions * by_actions).sum() + (log_prob * by_log_prob).sum()).backward()
    close(mean.grad, numpy(wide[0].grad), HALF)
    close(log_std.grad, numpy(wide[1].grad), HALF)


@pytest.mark.parametrize("narrow", range(4))
def test_float32_and_bfloat16_meet_as_in_torch(place, narrow):
    dtypes = [HALF if place_of == narrow else SINGLE for place_of in range(3)]
    q, target, weights = (tensor.to(dtype) for tensor, dtype in zip(loss_inputs(place, 2, 37), dtypes, strict=True))
    q.requires_grad_()
    loss, td_error = ops.twin_q_loss(q, target, weights)
    plain_loss, plain_error = ops._twin_q_loss_formula(q, target, weights, None)
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    (plain_gradient,) = torch.autograd.grad(plain_loss, q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), q)
    (plain_second,) = torch.autograd.grad(plain_gradient.square().sum(), q)
    value = ops.twin_q_target(target, weights, q.detach(), target, 0.3)
    plain_value = ops._twin_q_target_formula(target, weights, q.detach(), target, 0.3)
    inputs = [draw(place, seed, 9, 6, dtype=dtype) for seed, dtype in zip((4, 5, 6), dtypes, strict=True)]
    pairs = [
        (loss, plain_loss),
        (td_error, plain_error),
        (gradient, plain_gradient),
        (second, plain_second),
        (value, plain_value),
        *zip(ops.squashed_gaussian(*inputs), ops._squashed_gaussian_formula(*inputs), strict=True),
    ]
    for fast, plain in pairs:
        torch.testing.assert_close(fast, plain, rtol=3e-2, atol=3e-2)  # dtypes are compared, too


@pytest.mark.parametrize("narrow", range(4))
def test_operators_of_mixed_types_pass_opcheck(place, narrow):
    dtypes = [HALF if place_of == narrow else SINGLE for place_of in range(3)]
    q, target, weights = (tensor.to(dtype) for tensor, dtype in zip(loss_inputs(place, 2, 37), dtypes, strict=True))
    torch.library.opcheck(fused.twin_q_loss_op, (q.requires_grad_(), target, weights, 0.5))
    coefficient = torch.tensor(0.3, device=place)
    torch.library.opcheck(fused.twin_q_target_op, (target, weights, q.detach(), target, coefficient))
    inputs = [draw(place, seed, 9, 6, dtype=dtype) for seed, dtype in zip((4, 5, 6), dtypes, strict=True)]
    torch.library.opcheck(fused.squashed_gaussian_op, (inputs[0].requires_grad_(), *inputs[1:]))


@pytest.mark.parametrize("dtype", [torch.float16, HALF, SINGLE, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_coefficient_is_read_where_it_lies(place, dtype, shape):
    q, target, weights = loss_inputs(place, 2, 65)
    coefficient = torch.full(shape, 0.3, dtype=dtype, device=place)
    value = ops.twin_q_target(target, weights, q, target, coefficient)
    truth = reference_target(numpy(target), numpy(weights), numpy(q), numpy(target), float(coefficient))
    close(value, truth, SINGLE)
    here = ops.twin_q_target(target, weights, q, target, coefficient.cpu())
    assert torch.equal(here, value) or dtype == torch.float64
    unread = torch.full(shape, torch.nan, dtype=dtype, device=place)
    assert not ops.twin_q_target(target, weights, q, None, unread).isnan().any()


def test_nothing_in_nothing_out(place):
    none = torch.empty(0, device=place)
    assert ops.twin_q_target(none, none, torch.empty(2, 0, device=place), none, 0.1).shape == (0,)
    mean = torch.empty(0, 6, device=place, requires_grad=True)
    actions, log_prob = ops.squashed_gaussian(mean, mean, mean.detach())
    assert (actions.shape, log_prob.shape) == ((0, 6), (0,))
    (actions.sum() + log_prob.sum()).backward()
    assert mean.grad.shape == (0, 6)
    ops.update_targets([none], [none], 0.5)
    ops.update_targets([], [], 0.5)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, torch.float64])
def test_many_targets_at_any_place(place, dtype):
    generator = np.random.default_rng(0)
    sizes = [0, 1, 2047, 2048, 2049, 70_001, *generator.integers(0, 5000, 300).tolist()]
    targets = [draw(place, i, size + 1, dtype=dtype)[i % 2 :][:size] for i, size in enumerate(sizes)]
    online = [draw(place, 1000 + i, size + 3, dtype=dtype)[i % 3 :][:size] for i, size in enumerate(sizes)]
    truth = reference_update([numpy(target) for target in targets], [numpy(source) for source in online], 0.005)
    ops.update_targets(targets, online, 0.005)
    tolerance = {HALF: 2**-8, SINGLE: 1e-6, torch.float64: 1e-14}[dtype]
    for target, expected in zip(targets, truth, strict=True):
        np.testing.assert_allclose(numpy(target), expected, rtol=tolerance, atol=tolerance * 0.1)


def test_bfloat16_rounds_as_torch_does(place):
    bits = torch.arange(0, 2**32, 2**12 + 1, dtype=torch.int64).to(torch.int32).to(place)  # of all magnitudes, and NaN
    values = bits.view(SINGLE)
    ties = ((torch.arange(2**16, dtype=torch.int64) << 16) + 2**15).to(torch.int32).to(place).view(SINGLE)
    for wide in (values, ties):
        noise = torch.zeros_like(wide, dtype=HALF)
        zeros = torch.zeros_like(wide, dtype=HALF)
        ones = torch.ones_like(zeros)
        # rewards + discounts * q with float32 q, put to bfloat16 by a target of bfloat16
        out = torch.empty_like(zeros)
        arrays = (zeros, ones, wide[None], None, None, out)
        fused._launch("twin_q_target", place, arrays, 0.0, 1, wide.numel())
        expected = (noise + wide).to(HALF)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[~out.isnan()], expected[~out.isnan()])


def test_the_same_call_gives_the_same_bits(place):
    q, target, weights = loss_inputs(place, 2, 100_003)
    losses = {float(ops.twin_q_loss(q, target, weights)[0]) for _ in range(5)}
    assert len(losses) == 1


def every_operation(place):
    """A function that runs them all, and the tensors that it writes."""
    q, target, weights = loss_inputs(place, 2, 5000)
    q.requires_grad_()
    mean, log_std = (draw(place, seed, 5000, 6).requires_grad_() for seed in (4, 5))
    noise, coefficient = draw(place, 6, 5000, 6), torch.tensor(0.2, device=place)
    targets = [torch.zeros(7, i + 1, device=place) for i in range(150)]
    online = [draw(place, i, 7, i + 1) for i in range(150)]
    results = {}

    def run():
        results["target"] = ops.twin_q_target(target, weights, q.detach(), target, coefficient)
        loss, results["td_error"] = ops.twin_q_loss(q, results["target"], weights, huber_delta=0.5)
        actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
        total = loss + actions.mean() + log_prob.mean()
        results["q"], results["mean"], results["log_std"] = torch.autograd.grad(total, (q, mean, log_std))
        results["loss"] = loss.detach()
        ops.update_targets(targets, online, 0.1)
        results["targets"] = targets[-1]

    return run, results, coefficient


def test_nothing_waits_for_the_device_and_all_can_be_captured(place):
    if place.type != "cuda":
        pytest.skip("no CUDA device")
    run, results, coefficient = every_operation(place)
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    captured = dict(results)
    coefficient.fill_(0.7)
    graph.replay()
    got = {name: value.clone() for name, value in captured.items() if name != "targets"}
    run()
    for name, value in got.items():
        assert torch.equal(value, results[name]), name


def test_every_operation_runs_on_the_device_alone(place, monkeypatch):
    run, results, _ = every_operation(place)
    for name in ("twin_q_target", "twin_q_loss", "squashed_gaussian"):
        monkeypatch.setattr(ops, f"_{name}_formula", None)
    monkeypatch.setattr(fused, "_core", None)
    run()
    assert all(value.isfinite().all() for value in results.values())
