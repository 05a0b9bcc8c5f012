"""Encoders and QNetwork: known features, the space's order, image layouts, and SAC and TD3 behind an encoder."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.agents import DDPG, SAC, TD3, DiscreteSAC
from angle_rl.config import AgentConfig, Hyperparameters
from angle_rl.encoders import ImageEncoder, ObservationEncoder, is_image
from angle_rl.models import QNetwork, SquashedGaussianPolicy, TwinQ
from angle_rl.spaces import map_space
from angle_rl.types import RandomKey


def image(*shape, dtype=np.uint8, high=255):
    return spaces.Box(0, high, shape, dtype)


def batch_of(space, n, seed=0):
    """`n` of a space's samples, batched as feeds do, as tensors."""
    space.seed(seed)
    rows = [space.sample() for _ in range(n)]
    return map_space(lambda _, *leaves: torch.as_tensor(np.stack([np.asarray(x) for x in leaves])), space, *rows)


# Features that are known --------------------------------------------------------------------------------------


def test_a_flat_box_goes_through_as_it_is():
    encoder = ObservationEncoder(spaces.Box(-np.inf, np.inf, (3,), np.float32))
    observations = torch.randn(5, 3)
    assert encoder(observations).data_ptr() == observations.data_ptr()
    assert encoder.width == 3
    assert list(encoder.state_dict()) == []


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, np.uint8])
def test_a_box_of_another_shape_is_flattened_to_float32(dtype):
    space = spaces.Box(0, 100, (2, 3), dtype)
    values = torch.as_tensor(np.arange(12).reshape(2, 2, 3).astype(dtype))
    features = ObservationEncoder(space)(values)
    assert features.dtype == torch.float32
    assert features.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_discrete_is_one_hot_from_its_start():
    encoder = ObservationEncoder(spaces.Discrete(3, start=-1))
    assert encoder(torch.tensor([-1, 1, 0])).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert encoder(torch.tensor([2])).tolist() == [[0, 0, 0]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_multi_discrete_is_one_hot_number_by_number(counts, data):
    starts = data.draw(st.lists(st.integers(-3, 3), min_size=len(counts), max_size=len(counts)))
    rows = data.draw(
        st.lists(
            st.tuples(*(st.integers(s, s + n - 1) for n, s in zip(counts, starts, strict=True))),
            min_size=1,
            max_size=4,
        )
    )
    space = spaces.MultiDiscrete(counts, start=starts)
    expected = np.zeros((len(rows), sum(counts)))
    for line, row in zip(expected, rows, strict=True):
        column = 0
        for number, count, start in zip(row, counts, starts, strict=True):
            line[column + number - start] = 1
            column += count
    assert np.array_equal(ObservationEncoder(space)(torch.tensor(rows)).numpy(), expected)


def test_multi_discrete_and_multi_binary_of_two_axes():
    encoder = ObservationEncoder(spaces.MultiDiscrete([[2, 3], [1, 2]]))
    assert encoder(torch.tensor([[[1, 2], [0, 0]]])).tolist() == [[0, 1, 0, 0, 1, 1, 1, 0]]
    encoder = ObservationEncoder(spaces.MultiBinary((2, 2)))
    assert encoder(torch.tensor([[[1, 0], [1, 1]]], dtype=torch.int8)).tolist() == [[1, 0, 1, 1]]


def test_dicts_and_tuples_stand_side_by_side_in_the_space_s_order():
    space = spaces.Dict(
        [
            ("z", spaces.Discrete(2)),
            ("a", spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Dict(inner=spaces.MultiBinary(1))])),
        ]
    )
    observations = {  # another order than the space's
        "a": (torch.tensor([[0.5, -0.5]]), {"inner": torch.tensor([[1]], dtype=torch.int8)}),
        "z": torch.tensor([1]),
    }
    encoder = ObservationEncoder(space)
    assert encoder.width == 5
    own = {"z": [0, 1], "a": [0.5, -0.5, 1]}
    assert encoder(observations).tolist() == [[x for name in space.spaces for x in own[name]]]


def test_other_spaces_are_refused():
    with pytest.raises(TypeError, match=r"holds Text"):
        ObservationEncoder(spaces.Dict(a=spaces.Text(3)))
    with pytest.raises(ValueError, match="nothing to observe"):
        ObservationEncoder(spaces.Dict())


# Images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "holds"),
    [
        (image(84, 84, 4), True),
        (image(3, 210, 160), True),
        (image(10, 10, 6, dtype=np.bool_, high=1), True),
        (image(4, 84, 84, 3), True),
        (image(84, 84), False),
        (image(84, 84, 1, dtype=np.float32), False),
        (image(2, 2, 2), False),
        (spaces.MultiBinary((10, 10, 4)), False),
    ],
)
def test_what_is_an_image(space, holds):
    assert is_image(space) == holds
    if not holds:
        with pytest.raises(ValueError, match="an image is a Box of uint8 or bool"):
            ImageEncoder(space)


@pytest.mark.parametrize(
    ("first", "last"), [((4, 84, 84), (84, 84, 4)), ((3, 40, 50), (40, 50, 3)), ((4, 10, 10), (10, 10, 4))]
)
def test_channels_first_and_last_see_the_same_image(first, last):
    one, other = ImageEncoder(image(*first)), ImageEncoder(image(*last))
    other.load_state_dict(one.state_dict())
    pixels = batch_of(image(*first), 2)
    assert torch.allclose(one(pixels), other(pixels.movedim(1, -1)), atol=1e-5)


def test_ends_of_equal_length_mean_channels_last():
    encoder = ImageEncoder(image(10, 10, 10))
    lit = torch.zeros(1, 10, 10, 10, dtype=torch.uint8)
    seen = []
    encoder.layers[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    lit[0, 2, 5, 7] = 255
    encoder(lit)
    assert seen[0].nonzero().tolist() == [[0, 7, 2, 5]]


def test_a_history_of_images_becomes_channels():
    space = image(3, 12, 11, 2)
    encoder = ImageEncoder(space)
    pixels = batch_of(space, 2)
    seen = []
    encoder.layers[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    assert encoder(pixels).shape == (2, 128)
    expected = np.concatenate([pixels.numpy()[:, k].transpose(0, 3, 1, 2) for k in range(3)], 1) / 255.0
    assert np.allclose(seen[0].numpy(), expected, atol=1e-6)


def test_images_are_divided_by_the_largest_number():
    for space, value in [
        (image(8, 8, 2), 255),
        (image(8, 8, 2, high=5), 5),
        (image(8, 8, 2, dtype=np.bool_, high=1), 1),
    ]:
        encoder = ImageEncoder(space)
        full = torch.full((1, 8, 8, 2), value, dtype=torch.bool if space.dtype == np.bool_ else torch.uint8)
        expected = encoder.layers(torch.ones(1, 2, 8, 8))
        assert torch.allclose(encoder(full), expected, atol=1e-6)


def test_the_convolutions_are_those_of_the_papers():
    shapes = [tuple(p.shape) for p in ImageEncoder(image(84, 84, 4)).parameters() if p.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    shapes = [tuple(p.shape) for p in ImageEncoder(image(10, 10, 4)).parameters() if p.dim() > 1]
    assert shapes == [(16, 4, 3, 3), (128, 16 * 8 * 8)]
    for side, width in [(36, 512), (35, 128), (3, 128)]:
        space = image(side, side, 3)
        assert ObservationEncoder(space)(batch_of(space, 2)).shape == (2, width)


# QNetwork -----------------------------------------------------------------------------------------------------


def dense(x, layer):
    return x @ layer.weight.detach().numpy().astype(float).T + layer.bias.detach().numpy()


def relu(x):
    return np.maximum(x, 0)


def test_plain_and_dueling_values_against_numpy():
    space = spaces.Box(-1, 1, (3,))
    observations = batch_of(space, 6)
    x = observations.numpy().astype(float)
    plain = QNetwork(space, 4, (8, 7))
    hidden = relu(dense(relu(dense(x, plain.body[0])), plain.body[2]))
    assert np.allclose(plain(observations).detach(), dense(hidden, plain.advantages[-1]), atol=1e-5)

    dueling = QNetwork(space, 4, (8, 7), dueling=True)
    hidden = relu(dense(x, dueling.body[0]))
    value, advantages = (
        dense(relu(dense(hidden, stream[0])), stream[2]) for stream in (dueling.value, dueling.advantages)
    )
    assert value.shape == (6, 1)
    expected = value + advantages - advantages.mean(1, keepdims=True)
    assert np.allclose(dueling(observations).detach(), expected, atol=1e-5)


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.Dict(camera=image(12, 12, 3), speed=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(4)),
    ],
)
def test_q_networks_take_any_space_and_every_parameter_learns(space, dueling):
    network = QNetwork(space, 3, (16,), dueling=dueling)
    q = network(batch_of(space, 7))
    assert q.shape == (7, 3)
    q.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_sizes_are_refused():
    with pytest.raises(ValueError, match="actions is 0; it must be at least 1"):
        QNetwork(spaces.Discrete(2), 0)
    with pytest.raises(ValueError, match="hidden_sizes is"):
        QNetwork(spaces.Discrete(2), 2, (0,))


# Actor-critics behind an encoder ------------------------------------------------------------------------------

ACTIONS = spaces.Box(-2, 2, (2,), np.float32)
NESTED = spaces.Dict(camera=image(12, 12, 3), speed=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(4))


def actor_critic(agent, space):
    config = AgentConfig(hyperparameters=Hyperparameters(hidden_sizes=(16,), batch_size=8, replay_capacity=100))
    agent = agent(config)
    actions = spaces.Discrete(3) if isinstance(agent, DiscreteSAC) else ACTIONS
    state, _ = agent.init(RandomKey(0), observation_space=space, action_space=actions)
    return agent, state


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG, DiscreteSAC])
@pytest.mark.parametrize("space", [NESTED, spaces.Discrete(5), spaces.Box(0, 5, (4,), np.uint8)])
def test_default_networks_of_actor_critics_take_any_space_and_learn(agent, space):
    agent, state = actor_critic(agent, space)
    observations, following = (
        map_space(lambda _, leaf: leaf.numpy(), space, batch_of(space, 30, seed)) for seed in (0, 1)
    )
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=30).astype(np.float32)
    discrete = isinstance(agent, DiscreteSAC)
    actions = rng.integers(0, 3, 30) if discrete else rng.uniform(-2, 2, (30, 2)).astype(np.float32)
    state.replay.insert(observations, actions, rewards, following, [False] * 30)
    before = [p.detach().clone() for net in (state.policy, state.critics) for p in net.parameters()]
    for key in range(4):
        assert state.engine.update(RandomKey(key), 1).finite
    after = [p.detach() for net in (state.policy, state.critics) for p in net.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    actions, log_prob = state.policy.sample_actions(batch_of(space, 6), True)
    assert actions.shape == ((6,) if discrete else (6, 2))
    assert log_prob.shape == (6,)
    assert state.critics(batch_of(space, 6), actions).shape == (1 if isinstance(agent, DDPG) else 2, 6)


def test_the_same_noise_gives_the_same_actions_behind_an_encoder():
    _, state = actor_critic(SAC, NESTED)
    noise = RandomKey(1).normal(6, 2)
    draws = [state.policy.sample_actions(batch_of(NESTED, 6), noise=noise)[0] for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], state.policy.sample_actions(batch_of(NESTED, 6), noise=2 * noise)[0])


def test_flat_floats_need_no_encoder():
    _, state = actor_critic(SAC, spaces.Box(-1, 1, (3,)))
    assert isinstance(state.policy, SquashedGaussianPolicy)
    assert isinstance(state.critics, TwinQ)
