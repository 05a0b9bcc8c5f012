"""Actions computed in one compiled call, beside those of torch's way."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from angle_rl import acting
from angle_rl.models import ACTIVATIONS, DeterministicPolicy, SquashedGaussianPolicy

LOW, HIGH = np.array([-2.0, 0.1, -1e-3], np.float32), np.array([2.0, 0.7, 5.0], np.float32)
UNIT = np.ones(3, np.float32)
KINDS = [SquashedGaussianPolicy, DeterministicPolicy]
OFFERED = getattr(torch.Tensor, acting._EXCHANGE, None)


@pytest.fixture(autouse=True, params=["exchange", "methods"])
def exchange(request, monkeypatch):
    """Tensors looked at by DLPack's functions, where this torch has them, and by their Python methods."""
    if request.param == "methods":
        monkeypatch.setattr(torch.Tensor, acting._EXCHANGE, None, raising=False)
    return request.param


@pytest.fixture
def compiled(monkeypatch):
    """Whether the last call was computed by the compiled pass: its answers, one after the other."""
    answers = []
    original = acting.sampled

    def seen(*given):
        answers.append(original(*given))
        return answers[-1]

    monkeypatch.setattr(acting, "sampled", seen)
    return answers


def batch(rows=1, width=5, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def act(policy, observations, deterministic=False, noise=None):
    with torch.no_grad():
        return policy.sample_actions(observations, deterministic, noise=noise)


def agree(policy, observations, deterministic=False, noise=None):
    """The compiled pass and torch's, which takes gradients, to float32's rounding."""
    actions, log_prob = act(policy, observations, deterministic, noise)
    expected, density = policy.sample_actions(observations, deterministic, noise=noise)
    assert not actions.requires_grad
    assert not log_prob.requires_grad
    assert expected.requires_grad
    assert actions.shape == expected.shape
    assert log_prob.shape == density.shape
    reach = float(policy.action_scale.max() + policy.action_center.abs().max())
    torch.testing.assert_close(actions, expected.detach(), rtol=2e-6, atol=1e-6 * reach)
    torch.testing.assert_close(log_prob, density.detach(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("sizes", [(), (16,), (33, 7, 100), (256, 256)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_torch(kind, activation, sizes, compiled):
    torch.manual_seed(1)
    for low, high in ((LOW, HIGH), (-UNIT, UNIT)):
        policy = kind(5, low, high, sizes, activation=activation)
        for rows in range(1, 10):
            for deterministic in (False, True):
                agree(policy, 2.0 * batch(rows), deterministic, batch(rows, 3, 1))
                assert (compiled[-1] is not None) == (rows <= 8)
            actions, _ = act(policy, 1e6 * batch(rows), False, batch(rows, 3, 2))
            assert (actions >= torch.from_numpy(low)).all()
            assert (actions <= torch.from_numpy(high)).all()


def test_a_row_does_not_depend_on_its_batch_nor_on_what_came_before():
    policy = SquashedGaussianPolicy(17, LOW, HIGH)
    observations, noise = batch(8, 17), batch(8, 3, 1)
    actions, log_prob = act(policy, observations, noise=noise)
    for rows in (1, 2, 3, 5):
        for start in range(8 - rows + 1):
            part = slice(start, start + rows)
            some, density = act(policy, observations[part], noise=noise[part])
            assert torch.equal(some, actions[part])
            assert torch.equal(density, log_prob[part])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_torchs(kind, compiled):
    policy = kind(5, LOW, HIGH)
    for rows in (1, 2, 8):
        torch.manual_seed(7)
        actions, _ = act(policy, batch(rows))
        assert compiled[-1] is not None
        after = torch.get_rng_state()
        torch.manual_seed(7)
        expected, _ = policy.sample_actions(batch(rows))
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(actions, expected.detach(), rtol=2e-6, atol=1e-5)


def test_gradients_are_torchs(compiled):
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    actions, log_prob = policy.sample_actions(batch())
    (actions.sum() + log_prob.sum()).backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert not compiled
    with torch.inference_mode():
        actions, _ = policy.sample_actions(batch(), True)
    assert actions.is_inference()
    assert compiled[-1] is not None
    agree(policy, batch(), noise=batch(1, 3))
    actions, _ = act(policy, batch())
    assert not actions.is_inference()
    assert compiled[-1] is not None


def changed_in_place(policy):
    with torch.no_grad():
        policy.head.bias.add_(0.3)


def moved(policy):
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone() + 0.1


def assigned(policy):
    policy.load_state_dict({name: value + 0.1 for name, value in policy.state_dict().items()}, assign=True)


def shared_and_moved(policy):
    policy.share_memory()  # the same tensors, other memory
    changed_in_place(policy)


def swapped(policy):
    other = type(policy)(5, LOW, HIGH, (16, 16))
    for mine, others in zip(policy.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(mine, others)


def put_into_others_memory(policy):
    weight, block = policy.head.weight, torch.randn(40, 16)
    weight.data = block[3 : 3 + len(weight)]


def new_bounds(policy):
    policy.action_scale = policy.action_scale * 0.5


def other_layer(policy):
    policy.body[2] = nn.Linear(16, 16)


def other_activation(policy):
    policy.body[1] = nn.Tanh()
    policy.body[3] = nn.Tanh()


def narrower(policy):
    policy.body[2], policy.head = nn.Linear(16, 8), nn.Linear(8, policy.head.out_features)


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        moved,
        assigned,
        nn.Module.share_memory,
        shared_and_moved,
        swapped,
        put_into_others_memory,
        new_bounds,
        other_layer,
        other_activation,
        narrower,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_changes(kind, change, compiled):
    policy = kind(5, LOW, HIGH, (16, 16))
    before, _ = act(policy, batch(), True)
    change(policy)
    agree(policy, batch(2), noise=batch(2, 3))
    assert compiled[-1] is not None
    assert torch.equal(before, act(policy, batch(), True)[0]) == (change is nn.Module.share_memory)


def test_memory_that_stays_with_another_type_or_order_in_it():
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    act(policy, batch())
    policy.body[2].weight.data = policy.body[2].weight.data.t()
    agree(policy, batch(3), noise=batch(3, 3))
    bytes_of = policy.head.weight.data
    policy.head.weight.data = bytes_of.view(torch.float16)
    with pytest.raises(RuntimeError):
        act(policy, batch())
    for other in (bytes_of[:, :15], bytes_of[0, 0], bytes_of[:3], bytes_of.double()):
        policy.head.weight = nn.Parameter(other)
        with pytest.raises((RuntimeError, IndexError)):
            act(policy, batch())
    policy.head.weight = nn.Parameter(bytes_of)
    agree(policy, batch(3), noise=batch(3, 3))


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize(
    "other",
    [
        lambda value: value.to("meta"),
        lambda value: value.to_sparse(),
        lambda value: value.view(torch.float16),
        lambda value: value.double(),
        lambda value: value.view(torch.int32),  # as wide as float32
        lambda value: value.repeat_interleave(2, -1)[..., ::2],  # every other element
        lambda value: value[..., :1].expand(value.shape),
        lambda value: value[..., :-1],
        lambda value: value[None],
        lambda value: value[:0],
        lambda value: value.flatten()[0],
    ],
)
def test_a_parameter_of_another_kind_is_left_to_torch(other, part, compiled):
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    act(policy, batch(), True)
    assert compiled[-1] is not None
    parameter = nn.Parameter(other(getattr(policy.head, part).data), requires_grad=False)
    setattr(policy.head, part, parameter)
    with contextlib.suppress(RuntimeError, IndexError):  # torch's word on it
        act(policy, batch(), True)
    assert compiled[-1] is None


def test_memory_of_inputs(compiled):
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    wide, tall = batch(6, 9), batch(5, 6)
    agree(policy, wide[:1, 2:7], noise=wide[3:4, :3])  # an axis of one row may have any stride
    assert compiled[-1] is not None
    agree(policy, wide[1:3, :5].contiguous(), noise=batch(6, 3)[4:])
    assert compiled[-1] is not None
    for observations, noise in (
        (wide[:2, :5], batch(2, 3)),
        (tall.t()[:2], batch(2, 3)),
        (batch(1).expand(2, 5), batch(2, 3)),
        (batch(2), wide[:2, :3]),
        (batch(2), batch(3, 2).t()),
    ):
        agree(policy, observations, noise=noise)
        assert compiled[-1] is None
    agree(policy, batch(2).to_sparse().to_dense(), noise=batch(2, 3))
    assert compiled[-1] is not None


def test_who_looks_at_tensors(exchange):
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    act(policy, batch())
    assert policy._acting.network.exchanges == (exchange == "exchange" and OFFERED is not None)


@pytest.mark.parametrize("offered", [None, 12345, object(), "other name", 0, 2])
def test_what_is_no_exchange_of_the_first_version_is_not_called(offered, monkeypatch, compiled):
    name, functions = b"dlpack_exchange_api", (ctypes.c_uint64 * 8)()
    if offered == "other name":
        name, offered = b"another", 1
    if offered in (0, 1, 2):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        functions[:] = [offered] + [1] * 7  # addresses that nobody can call
        offered = new(ctypes.addressof(functions), name, None)
    monkeypatch.setattr(torch.Tensor, acting._EXCHANGE, offered, raising=False)
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    agree(policy, batch(), noise=batch(1, 3))
    assert compiled[-1] is not None
    assert not policy._acting.network.exchanges


class Own(SquashedGaussianPolicy):
    def forward(self, observations):
        mean, log_std = super().forward(observations)
        return mean + 1.0, log_std


def hooked(policy):
    policy.body[0].register_forward_hook(lambda module, given, output: output + 1.0)


def hooked_before(policy):
    policy.head.register_forward_pre_hook(lambda module, given: (given[0] + 1.0,))


def parametrized(policy):
    nn.utils.parametrizations.weight_norm(policy.head)
    with torch.no_grad():
        policy.head.parametrizations.weight.original0.mul_(2.0)


def replaced(policy):
    forward = policy.body.forward
    policy.body.forward = lambda observations: forward(observations) + 1.0


def replaced_whole(policy):
    policy.forward = lambda observations: (observations[:, :3], observations[:, :3])


def replaced_scaling(policy):
    policy.scale_actions = lambda actions: actions * 0.1


def inserted(policy):
    policy.body.append(nn.Dropout(0.0))
    policy.body.append(nn.Tanh())


def own_activation(policy):
    policy.body[1] = nn.LeakyReLU(0.5)


def approximate(policy):
    policy.body[1] = policy.body[3] = nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        hooked_before,
        parametrized,
        replaced,
        replaced_whole,
        replaced_scaling,
        inserted,
        own_activation,
        approximate,
    ],
)
def test_what_is_not_ours_is_left_to_torch(change, compiled):
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16, 16))
    before, _ = act(policy, batch(), True)
    assert compiled[-1] is not None
    change(policy)
    after, log_prob = act(policy, batch(), True)
    assert compiled[-1] is None
    expected, density = policy.sample_actions(batch(), True)
    assert torch.equal(after, expected.detach())
    assert torch.equal(log_prob, density.detach())
    assert not torch.equal(before, after)


def test_hooks_of_all_modules_and_their_end(compiled):
    policy, seen = SquashedGaussianPolicy(5, LOW, HIGH), []
    act(policy, batch())
    with torch.nn.modules.module.register_module_forward_hook(lambda *given: seen.append(1)):
        act(policy, batch())
    assert seen
    assert compiled[-1] is None
    act(policy, batch())
    assert compiled[-1] is not None


def test_other_policies_inputs_and_modes_are_left_to_torch(compiled):
    policy, own = SquashedGaussianPolicy(5, LOW, HIGH), Own(5, LOW, HIGH)
    act(own, batch())
    act(policy, batch().double().float()[0], noise=torch.zeros(3))  # one axis
    act(SquashedGaussianPolicy(5, LOW, HIGH, layer_norm=True), batch())
    act(SquashedGaussianPolicy(5, LOW, HIGH).double(), batch().double())
    act(policy, batch(2)[:, :5].t().contiguous().t())
    act(policy, batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        act(policy, batch())
    with torch.no_grad():
        torch.vmap(lambda row: policy.sample_actions(row[None], True)[0])(batch(3))
    with torch.device("cpu"):
        act(policy, batch())
    assert all(answer is None for answer in compiled)
    for wrong in (batch(1, 6), batch().double(), batch()[0, :4]):
        with pytest.raises(RuntimeError):
            act(policy, wrong)
    with pytest.raises((RuntimeError, ValueError)):
        act(policy, batch(), noise=torch.zeros(1, 4))


def test_a_hooked_call_draws_its_noise_once():
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    hooked(policy)
    torch.manual_seed(3)
    actions, _ = act(policy, batch())
    torch.manual_seed(3)
    assert torch.equal(actions, policy.sample_actions(batch())[0].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_of_the_policy_only(kind):
    policy = kind(5, LOW, HIGH)
    expected, _ = act(policy, batch(), True)
    names = set(policy.state_dict())
    for twin in (copy.deepcopy(policy), copy.copy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(act(twin, batch(), True)[0], expected)
        assert set(twin.state_dict()) == names
    twin = copy.deepcopy(policy)
    changed_in_place(twin)
    assert not torch.equal(act(twin, batch(), True)[0], expected)
    assert torch.equal(act(policy, batch(), True)[0], expected)


def test_acting_keeps_no_policy_alive():
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    act(policy, batch())
    gone = weakref.ref(policy)
    gc.collect()
    gc.disable()
    try:
        del policy
        assert gone() is None
    finally:
        gc.enable()


def test_results_are_fresh():
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    first, density = act(policy, batch(), True)
    kept, kept_density = first.clone(), density.clone()
    second, _ = act(policy, batch(1, seed=5), True)
    assert torch.equal(first, kept)
    assert torch.equal(density, kept_density)
    assert first.data_ptr() != second.data_ptr()


def test_results_are_plain_tensors_of_their_own():
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    for rows in (1, 3, 8):
        noise = batch(rows, 3, 1)
        actions, log_prob = act(policy, batch(rows), noise=noise)
        kept, others = actions.clone(), log_prob.clone()
        for result, shape in ((actions, (rows, 3)), (log_prob, (rows,))):
            assert result.shape == shape
            assert result.is_contiguous()
            assert result.is_leaf
            assert result.dtype == torch.float32
            assert result.data_ptr() % 64 == 0
            assert result.untyped_storage().nbytes() == result.numel() * 4
        actions.fill_(-1e9)
        assert torch.equal(log_prob, others)
        log_prob.fill_(1e9)
        assert (actions == -1e9).all()
        actions.copy_(kept)
        assert (log_prob == 1e9).all()
        copied = pickle.loads(pickle.dumps(actions))
        assert torch.equal(copied, kept)
        assert torch.equal(torch.from_numpy(actions.numpy()), kept)
        assert torch.equal(actions.clone().share_memory_(), kept)
        assert torch.equal(actions.share_memory_(), kept)
        assert torch.equal((log_prob.requires_grad_() * 2.0).detach(), torch.full((rows,), 2e9))
        policy = copy.deepcopy(policy)  # the one that made them is gone
        gc.collect()
        assert torch.equal(actions, kept)
        assert (log_prob == 1e9).all()


def test_memory_of_results_comes_back():
    policy, places = SquashedGaussianPolicy(5, LOW, HIGH, (16,)), set()
    for _ in range(1000):
        actions, log_prob = act(policy, batch())
        places |= {actions.data_ptr(), log_prob.data_ptr()}
    assert len(places) < 1000
    held = [act(policy, batch(), True) for _ in range(100)]
    assert len({tensor.data_ptr() for results in held for tensor in results}) == 200


def test_under_torch_compile_it_is_torchs():
    policy = SquashedGaussianPolicy(5, LOW, HIGH, (16,))
    function = torch.compile(lambda observations: policy.sample_actions(observations, True)[0], backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(function(batch()), policy.sample_actions(batch(), True)[0], rtol=2e-6, atol=2e-6)
