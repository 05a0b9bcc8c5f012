from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.squashed_gaussian import squashed_gaussian
from reference.twin_q_loss import twin_q_loss
from reference.twin_q_target import twin_q_target
from reference.update_targets import update_targets
from torch.autograd import gradcheck, gradgradcheck

from angle_rl import _core, fused, ops

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = {"critics": st.integers(1, 5), "batch": st.integers(1, 70), "seed": st.integers(0, 2**16)}
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def _new_tensors_there(device):
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


everywhere = pytest.mark.usefixtures("_new_tensors_there")


def draw(seed, *shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return values.to(dtype).to(torch.empty(0).device)


def numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def of_tensors(reference):
    """The reference for tensors, also in lists, wherever they lie."""

    def converted(value):
        if isinstance(value, list):
            return [converted(each) for each in value]
        return numpy(value) if torch.is_tensor(value) else value

    return lambda *arguments: reference(*(converted(argument) for argument in arguments))


reference_gaussian, reference_loss = of_tensors(squashed_gaussian), of_tensors(twin_q_loss)
reference_target, reference_update = of_tensors(twin_q_target), of_tensors(update_targets)


def close(value, truth, dtype):
    np.testing.assert_allclose(numpy(value), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def loss_inputs(dtype, critics=2, batch=7):
    q = draw(1, critics, batch, dtype=dtype, scale=2.0).requires_grad_()
    return q, draw(2, batch, dtype=dtype), draw(3, batch, dtype=dtype).abs()


def gaussian_inputs(dtype, rows=5, columns=3):
    mean = draw(1, rows, columns, dtype=dtype).requires_grad_()
    return mean, draw(2, rows, columns, dtype=dtype).requires_grad_(), draw(3, rows, columns, dtype=dtype)


# Against float64 NumPy -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [None, 0.3, "tensor"])
@given(**SHAPES)
@quick
def test_target_equals_the_reference(dtype, entropy, critics, batch, seed):
    rewards, discounts = draw(seed, batch, dtype=dtype), draw(seed + 1, batch, dtype=dtype)
    next_q, log_prob = draw(seed + 2, critics, batch, dtype=dtype), draw(seed + 3, batch, dtype=dtype)
    if entropy is None:
        close(ops.twin_q_target(rewards, discounts, next_q), reference_target(rewards, discounts, next_q), dtype)
        return
    coefficient = torch.tensor([0.3]) if entropy == "tensor" else entropy
    value = ops.twin_q_target(rewards, discounts, next_q, log_prob, coefficient)
    assert value.shape == (batch,)
    assert value.dtype == dtype
    close(value, reference_target(rewards, discounts, next_q, log_prob, float(coefficient)), dtype)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("huber_delta", [None, 0.8])
@given(**SHAPES)
@quick
def test_loss_and_gradient_equal_the_reference(dtype, weighted, huber_delta, critics, batch, seed):
    q = draw(seed, critics, batch, dtype=dtype).requires_grad_()
    target, weights = draw(seed + 1, batch, dtype=dtype), draw(seed + 2, batch, dtype=dtype).abs()
    weights = weights if weighted else None
    loss, td_error = ops.twin_q_loss(q, target, weights, huber_delta=huber_delta)
    assert loss.shape == ()
    assert not td_error.requires_grad
    (3.0 * loss).backward()
    truth = reference_loss(q.detach(), target, weights, huber_delta)
    close(loss, truth[0], dtype)
    close(td_error, truth[1], dtype)
    close(q.grad, 3.0 * truth[2], dtype)
    with torch.no_grad():
        assert torch.equal(ops.twin_q_loss(q, target, weights, huber_delta=huber_delta)[0], loss)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("huber_delta", [None, 0.8])
def test_each_critics_error_has_its_own_weight(dtype, huber_delta):
    q, target, weights = loss_inputs(dtype, critics=3)
    own = draw(4, 3).abs()  # float64 always
    loss, td_error = ops.twin_q_loss(q, target, weights, huber_delta=huber_delta, critic_weights=own)
    loss.backward()
    truth = reference_loss(q.detach(), target, weights, huber_delta, own)
    close(loss, truth[0], dtype)
    close(td_error, truth[1], dtype)
    close(q.grad, truth[2], dtype)
    if dtype == torch.float64:
        inputs = (q.detach().requires_grad_(), own.requires_grad_())
        assert gradcheck(lambda x, c: ops.twin_q_loss(x, target, weights, critic_weights=c)[0], inputs)
        assert gradgradcheck(lambda x, c: ops.twin_q_loss(x, target, weights, critic_weights=c)[0], inputs)


@everywhere
def test_huber_is_torchs():
    q, target, _ = loss_inputs(torch.float64, batch=40)
    expected = sum(torch.nn.functional.huber_loss(row, target, delta=0.7) for row in q)
    torch.testing.assert_close(ops.twin_q_loss(q, target, huber_delta=0.7)[0], expected)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 40), columns=st.sampled_from([1, 2, 3, 6, 17, 513, 1030]), seed=st.integers(0, 2**16))
@quick
def test_gaussian_equals_the_reference(dtype, rows, columns, seed):
    mean, log_std = (
        draw(seed, rows, columns, dtype=dtype, scale=2.0),
        draw(seed + 1, rows, columns, dtype=dtype),
    )
    noise = draw(seed + 2, rows, columns, dtype=dtype)
    actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
    truth = reference_gaussian(mean, log_std, noise)
    assert actions.shape == mean.shape
    assert log_prob.shape == (rows,)
    close(actions, truth[0], dtype)
    scale = {torch.float32: 3e-6, torch.float64: 1e-13}[dtype] * columns * 30  # |terms| reach about 30 each
    np.testing.assert_allclose(numpy(log_prob), truth[1], atol=scale, rtol=0)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@given(shapes=st.lists(st.lists(st.integers(0, 20), max_size=3), max_size=6), tau=st.floats(0, 1))
@quick
def test_update_targets_equals_the_reference(dtype, shapes, tau):
    targets = [draw(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    online = [draw(100 + i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    truth = reference_update(targets, online, tau)
    before = [target._version for target in targets]
    ops.update_targets(targets, iter(online), tau)
    for target, expected, version in zip(targets, truth, before, strict=True):
        close(target, expected, dtype)
        assert target._version > version
    if tau == 1.0:
        assert all(torch.equal(t, o) for t, o in zip(targets, online, strict=True))


def ulps(value, truth):
    """Distance in units of the last place of the float32 nearest to ``truth``."""
    spacing = np.spacing(np.maximum(np.abs(truth).astype(np.float32), np.float32(1.2e-38)))
    return np.abs(numpy(value) - truth) / spacing


@everywhere
def test_float32_exponentials_keep_four_units_in_the_last_place():
    u = torch.cat(
        [
            torch.linspace(-12, 12, 200_001),
            draw(0, 50_000, dtype=torch.float32, scale=1e-3),
            torch.logspace(-37, 1, 20_000),
        ]
    )
    zeros = torch.zeros_like(u)
    actions, log_prob, _ = fused.run_squashed_gaussian(u[:, None], zeros[:, None], zeros[:, None])
    exact = numpy(u)
    assert ulps(actions[:, 0], np.tanh(exact)).max() <= 4
    truth = reference_gaussian(exact[:, None], 0 * exact[:, None], 0 * exact[:, None])[1]
    assert np.abs(numpy(log_prob) - truth).max() <= 4 * np.finfo(np.float32).eps * 8
    x = torch.linspace(-87.3, 88.7, 300_001)
    spread = fused.run_squashed_gaussian(torch.zeros_like(x), x, torch.ones_like(x))[2]
    assert ulps(spread, np.exp(numpy(x))).max() <= 4
    edges = torch.tensor([-200.0, -104.0, -100.0, 88.8, 200.0, -torch.inf, torch.inf])
    spread = fused.run_squashed_gaussian(torch.zeros_like(edges), edges, torch.ones_like(edges))[2]
    with np.errstate(over="ignore"):
        truth = np.exp(numpy(edges)).astype(np.float32)
    np.testing.assert_allclose(numpy(spread), truth, rtol=1e-6, atol=3e-45)


@everywhere
def test_log_prob_stays_finite_far_out():
    mean = torch.tensor([[60.0], [-60.0], [1e4]], requires_grad=True)
    actions, log_prob = ops.squashed_gaussian(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    log_prob.sum().backward()
    assert actions.abs().max() <= 1
    np.testing.assert_allclose(
        numpy(log_prob),
        reference_gaussian(mean.detach(), 0 * mean.detach(), 0 * mean.detach())[1],
        rtol=1e-6,
    )
    np.testing.assert_allclose(numpy(mean.grad), [[2.0], [-2.0], [2.0]])


# Derivatives -----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("huber_delta", [None, 0.8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("constants", [False, True])
def test_loss_derivatives(huber_delta, weighted, constants):
    q, target, weights = loss_inputs(torch.float64, critics=3)
    target.requires_grad_(constants)
    weights.requires_grad_(constants)
    inputs = (q, target, weights) if weighted else (q, target)
    assert gradcheck(lambda *a: ops.twin_q_loss(*a, huber_delta=huber_delta)[0], inputs)
    assert gradgradcheck(lambda *a: ops.twin_q_loss(*a, huber_delta=huber_delta)[0], inputs)


@everywhere
@pytest.mark.parametrize("with_noise", [False, True])
def test_gaussian_derivatives(with_noise):
    mean, log_std, noise = gaussian_inputs(torch.float64)
    noise.requires_grad_(with_noise)
    assert gradcheck(ops.squashed_gaussian, (mean, log_std, noise))
    assert gradgradcheck(ops.squashed_gaussian, (mean, log_std, noise))
    assert gradcheck(lambda *a: ops.squashed_gaussian(*a)[0], (mean, log_std, noise))
    assert gradcheck(lambda *a: ops.squashed_gaussian(*a)[1], (mean, log_std, noise))


@everywhere
def test_target_derivatives():
    inputs = [draw(i, *shape).requires_grad_() for i, shape in enumerate([(6,), (6,), (3, 6), (6,), ()])]
    assert gradcheck(ops.twin_q_target, inputs)
    assert gradgradcheck(ops.twin_q_target, inputs)
    with torch.no_grad():
        assert not ops.twin_q_target(*inputs).requires_grad
    close(
        ops.twin_q_target(*inputs),
        reference_target(*inputs),
        torch.float64,
    )


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivative_through_an_update_equals_plain_torch(dtype):
    def outer(loss_of):
        q, target, weights = loss_inputs(dtype)
        (gradient,) = torch.autograd.grad(loss_of(q, target, weights), q, create_graph=True)
        return torch.autograd.grad((q - 0.1 * gradient).pow(3).sum(), q)[0]

    fused = outer(lambda *a: ops.twin_q_loss(*a, huber_delta=0.9)[0])
    plain = outer(lambda *a: ops._twin_q_loss_formula(*a, 0.9)[0])
    torch.testing.assert_close(fused, plain)


@everywhere
def test_half_precision_and_strides_and_transforms():
    q, target, weights = loss_inputs(torch.float64, batch=64)
    truth = reference_loss(q.detach(), target, weights)
    half, _ = ops.twin_q_loss(q.bfloat16(), target.float(), weights.bfloat16())
    assert abs(half.item() - truth[0]) < 0.02 * truth[0]
    strided = q.detach().t().contiguous().t().requires_grad_()
    loss, _ = ops.twin_q_loss(strided, target.repeat_interleave(2)[::2], weights.flip(0).flip(0))
    loss.backward()
    close(strided.grad, truth[2], torch.float64)
    gradient = torch.func.grad(lambda x: ops.twin_q_loss(x, target, weights)[0])(q.detach())
    close(gradient, truth[2], torch.float64)
    losses = torch.func.vmap(lambda x: ops.twin_q_loss(x, target)[0])(torch.stack([q.detach(), 2 * q.detach()]))
    close(losses[0], reference_loss(q.detach(), target)[0], torch.float64)
    meta = ops.twin_q_loss(q.detach().to("meta"), target.to("meta"))
    assert meta[1].shape == (64,)


@everywhere
def test_update_targets_other_layouts():
    targets = [draw(1, 4, 3).t(), draw(2, 5, dtype=torch.bfloat16), draw(3, 2, dtype=torch.float32)]
    online = [draw(4, 4, 3).t(), draw(5, 5, dtype=torch.bfloat16), draw(6, 4, dtype=torch.float32)[::2]]
    truth = reference_update(targets, online, 0.25)
    ops.update_targets(targets, online, 0.25)
    for target, expected in zip(targets, truth, strict=True):
        np.testing.assert_allclose(numpy(target), expected, rtol=1e-2 if target.dtype == torch.bfloat16 else 1e-6)


@everywhere
def test_update_targets_guards_saved_values():
    target = torch.ones(3, requires_grad=True)
    loss = target.square().sum()
    ops.update_targets([target], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@everywhere
def test_nan_goes_through():
    nan = float("nan")
    for dtype in DTYPES:
        one = torch.ones(40, dtype=dtype)
        for row in (0, 1):
            q = torch.ones(2, 40, dtype=dtype)
            q[row, 3] = nan
            target = ops.twin_q_target(one, one, q)
            assert target.isnan().nonzero().flatten().tolist() == [3]
            for delta in (None, 1.0):
                q = q.detach().requires_grad_()
                loss, td_error = ops.twin_q_loss(q, 0 * one, one, huber_delta=delta)
                loss.backward()
                assert loss.isnan()
                assert td_error.isnan().nonzero().flatten().tolist() == [3]
                assert q.grad.isnan().nonzero().tolist() == [[row, 3]]
        for bad in range(3):
            inputs = [torch.zeros(40, 2, dtype=dtype) for _ in range(3)]
            inputs[bad][3, 1] = nan
            actions, log_prob = ops.squashed_gaussian(*inputs)
            assert actions.isnan().nonzero().tolist() == [[3, 1]]
            assert log_prob.isnan().nonzero().flatten().tolist() == [3]
        target = one.clone()
        ops.update_targets([target], [one * nan], 0.5)
        assert target.isnan().all()


# torch.compile ---------------------------------------------------------------------------------------------


@everywhere
def test_operators_pass_opcheck():
    for dtype in DTYPES:
        q, target, weights = loss_inputs(dtype)
        for delta in (None, 0.5):
            torch.library.opcheck(fused.twin_q_loss_op, (q, target, weights, delta))
            torch.library.opcheck(fused.twin_q_loss_op, (q, target, None, delta))
        torch.library.opcheck(fused.squashed_gaussian_op, gaussian_inputs(dtype))
        coefficient = torch.tensor(0.2)
        torch.library.opcheck(fused.twin_q_target_op, (target, weights, q.detach(), target, coefficient))
        torch.library.opcheck(fused.twin_q_target_op, (target, weights, q.detach(), None, coefficient))
        pairs = [draw(i, 3, i + 1, dtype=dtype) for i in range(4)]
        torch.library.opcheck(
            fused.update_targets_op, (pairs[:1] + pairs[2:3], [pairs[1][:, :1], pairs[3][:, :3]], 0.5)
        )


@everywhere
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", torch.float32), ("aot_eager", torch.float64), ("inductor", torch.float32)],
)
def test_compiled_graph_gives_the_same_numbers(backend, dtype):
    def forward(q, target, weights, mean, log_std, noise, coefficient, targets):
        loss, td_error = ops.twin_q_loss(q, target, weights, huber_delta=0.5)
        actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
        td_target = ops.twin_q_target(target, weights, q.detach(), target, coefficient)
        ops.update_targets(targets, [mean.detach(), log_std.detach()], 0.1)
        return loss, td_error, actions, log_prob, td_target

    def run(function):
        q, target, weights = loss_inputs(dtype)
        mean, log_std, noise = gaussian_inputs(dtype)
        targets = [torch.ones(5, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype)]
        outputs = function(q, target, weights, mean, log_std, noise, torch.tensor(0.2), targets)
        loss, _, actions, log_prob, _ = outputs
        gradients = torch.autograd.grad(loss + actions.sum() + log_prob.square().sum(), (q, mean, log_std))
        return *outputs, *gradients, *targets

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for value, expected in zip(run(compiled), run(forward), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@everywhere
def test_compiled_target_takes_numbers():
    target = torch.compile(ops.twin_q_target, fullgraph=True, backend="aot_eager")
    next_q, rewards, log_prob = draw(1, 2, 9), draw(2, 9), draw(3, 9)
    for coefficient in (0.0, 0.1, 0.7, 1):
        value = target(rewards, rewards, next_q, log_prob, coefficient)
        close(value, reference_target(rewards, rewards, next_q, log_prob, coefficient), torch.float64)


# Instruction sets ------------------------------------------------------------------------------------------

ON_ONE_ISA = """
import sys, numpy as np, torch
from angle_rl import _core, fused, ops
rng = np.random.default_rng(0)
out = {"isa": np.array(_core.isa())}
for name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    q, target, weights = make(3, 301).requires_grad_(), make(301), make(301).abs()
    out[name + "target"] = ops.twin_q_target(target, weights, q.detach(), target, 0.2)
    for delta in (None, 0.8):
        loss, td_error = ops.twin_q_loss(q, target, weights, huber_delta=delta)
        out[f"{name}loss{delta}"], out[f"{name}error{delta}"] = loss, td_error
        out[f"{name}gradient{delta}"] = torch.autograd.grad(loss, q)[0]
    mean, log_std, noise = make(301, 7).requires_grad_(), make(301, 7).requires_grad_(), make(301, 7)
    actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
    out[name + "actions"], out[name + "log_prob"] = actions, log_prob
    gradients = torch.autograd.grad((actions * noise).sum() + (log_prob * target).sum(), (mean, log_std))
    out[name + "mean"], out[name + "log_std"] = gradients
    moved = noise.clone()
    ops.update_targets([moved], [mean], 0.005)
    out[name + "moved"] = moved
np.savez(sys.argv[1], **{k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in out.items()})
"""


def test_instruction_sets_give_equal_numbers(tmp_path: Path):
    results = {}
    for isa in _core.available_isas():
        path = tmp_path / f"{isa}.npz"
        environment = {**os.environ, "ANGLE_ISA": isa, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", ON_ONE_ISA, str(path)], check=True, env=environment)
        results[isa] = dict(np.load(path))
        assert results[isa].pop("isa") == isa
    rng = np.random.default_rng(0)
    truth = {}
    for name, dtype in (("f32", np.float32), ("f64", np.float64)):
        q, target, weights = (rng.standard_normal(s).astype(dtype) for s in ((3, 301), 301, 301))
        weights = np.abs(weights)
        truth[name + "target"] = reference_target(target, weights, q, target, 0.2)
        for delta in (None, 0.8):
            keys = (f"{name}loss{delta}", f"{name}error{delta}", f"{name}gradient{delta}")
            truth.update(zip(keys, reference_loss(q, target, weights, delta), strict=True))
        mean, log_std, noise = (rng.standard_normal((301, 7)).astype(dtype) for _ in range(3))
        truth[name + "actions"], truth[name + "log_prob"] = reference_gaussian(mean, log_std, noise)
        truth[name + "moved"] = reference_update([noise], [mean], 0.005)[0]
    for isa, result in results.items():
        for key, value in result.items():
            np.testing.assert_array_equal(value, results["baseline"][key], err_msg=f"{isa} {key}")
            if key in truth:
                np.testing.assert_allclose(value, truth[key], rtol=2e-5, atol=1e-5, err_msg=f"{isa} {key}")


# Refusals --------------------------------------------------------------------------------------------------

ROW, PAIR = torch.ones(4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.twin_q_target(ROW, ROW, ROW),
            ValueError,
            r"next_q has shape \[4\]; it must be \[critics, batch\]",
        ),
        (lambda: ops.twin_q_target(ROW, ROW, PAIR[:0]), ValueError, "at least 1 critic"),
        (
            lambda: ops.twin_q_target(ROW[:3], ROW, PAIR),
            ValueError,
            r"rewards has shape \[3\]; it must be \[4\]",
        ),
        (lambda: ops.twin_q_target(ROW, PAIR, PAIR), ValueError, "discounts has shape"),
        (lambda: ops.twin_q_target(ROW, ROW, PAIR, ROW[:1]), ValueError, "next_log_prob has shape"),
        (lambda: ops.twin_q_target(ROW, ROW, PAIR, ROW, ROW), ValueError, "entropy_coefficient has shape"),
        (lambda: ops.twin_q_target(ROW.double(), ROW, PAIR), TypeError, "rewards has dtype torch.float64"),
        (lambda: ops.twin_q_target(ROW, ROW.int(), PAIR), TypeError, "discounts has dtype torch.int32"),
        (lambda: ops.twin_q_target(ROW, ROW, PAIR.int()), TypeError, "next_q has dtype torch.int32"),
        (lambda: ops.twin_q_target(ROW.numpy(), ROW, PAIR), TypeError, "rewards is a ndarray"),
        (lambda: ops.twin_q_target(ROW.to("meta"), ROW, PAIR), ValueError, "rewards is on meta"),
        (lambda: ops.twin_q_loss(ROW, ROW), ValueError, r"q has shape \[4\]"),
        (lambda: ops.twin_q_loss(PAIR[:, :0], ROW[:0]), ValueError, "at least 1 of each"),
        (lambda: ops.twin_q_loss(PAIR, ROW, critic_weights=ROW[:1]), ValueError, r"critic_weights has shape \[1\]"),
        (lambda: ops.twin_q_loss(PAIR, ROW, critic_weights=[1, 1]), TypeError, "critic_weights is a list"),
        (lambda: ops.twin_q_loss([1.0], ROW), TypeError, "q is a list"),
        (lambda: ops.twin_q_loss(PAIR, PAIR), ValueError, "td_target has shape"),
        (lambda: ops.twin_q_loss(PAIR, ROW, ROW[:2]), ValueError, "importance_weights has shape"),
        (lambda: ops.twin_q_loss(PAIR, ROW, ROW.double()), TypeError, "importance_weights has dtype"),
        (
            lambda: ops.twin_q_loss(PAIR, ROW, huber_delta=0.0),
            ValueError,
            "huber_delta is 0.0; it must be above 0",
        ),
        (lambda: ops.twin_q_loss(PAIR, ROW, huber_delta=float("nan")), ValueError, "huber_delta is nan"),
        (lambda: ops.twin_q_loss(PAIR, ROW, huber_delta=float("inf")), ValueError, "huber_delta is inf"),
        (lambda: ops.squashed_gaussian(torch.ones(()), ROW, ROW), ValueError, r"mean has shape \[\]"),
        (lambda: ops.squashed_gaussian(PAIR[:, :0], PAIR, PAIR), ValueError, "action_dim at least 1"),
        (lambda: ops.squashed_gaussian(PAIR, ROW, PAIR), ValueError, "log_std has shape"),
        (lambda: ops.squashed_gaussian(PAIR, PAIR, PAIR[:1]), ValueError, "noise has shape"),
        (lambda: ops.squashed_gaussian(PAIR, PAIR, PAIR.double()), TypeError, "noise has dtype"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("online", "tau", "error", "message"),
    [
        ([ROW, ROW], -0.1, ValueError, r"tau is -0.1; it must lie in \[0, 1\]"),
        ([ROW, ROW], 1.5, ValueError, "tau is 1.5"),
        ([ROW, ROW], float("nan"), ValueError, "tau is nan"),
        ([ROW], 0.5, ValueError, "targets holds 2 tensors and online 1"),
        ([ROW, ROW[:2]], 0.5, ValueError, r"online\[1\] has shape \[2\]"),
        ([ROW, ROW.double()], 0.5, TypeError, r"online\[1\] has dtype torch.float64"),
        ([ROW, ROW.bfloat16()], 0.5, TypeError, r"online\[1\] has dtype torch.bfloat16"),
        ([ROW, ROW.to("meta")], 0.5, ValueError, r"online\[1\] is on meta"),
        ([ROW, ROW.numpy()], 0.5, TypeError, r"online\[1\] is a ndarray"),
    ],
)
def test_update_targets_refuses_and_changes_nothing(online, tau, error, message):
    targets = [torch.zeros(4), torch.zeros(4)]
    with pytest.raises(error, match=message):
        ops.update_targets(targets, online, tau)
    assert all(not target.any() for target in targets)


def test_update_targets_refuses_integers():
    with pytest.raises(TypeError, match=r"targets\[0\] has dtype torch.int64"):
        ops.update_targets([torch.zeros(2, dtype=torch.int64)], [torch.ones(2, dtype=torch.int64)], 0.5)
