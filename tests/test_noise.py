"""Exploration noise: its laws, one process per environment, what a reset touches, what a checkpoint keeps."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import DDPG, SAC, TD3
from angle_rl.agents.actor_critic import begins_anew
from angle_rl.agents.noise import noisy_actions, ornstein_uhlenbeck, policy_actions
from angle_rl.config import AgentConfig, Hyperparameters
from angle_rl.types import EnvironmentState, RandomKey, RLState, reset_state

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
HALF_RANGE = torch.tensor([1.0, 5.0])


def seen(n=4, terminated=(), truncated=(), waiting=(), reward=0.0):
    """What n environments show; the indices say which ended and which did not step."""
    flags = [np.isin(np.arange(n), rows) for rows in (terminated, truncated, waiting)]
    observation = np.arange(3 * n, dtype=np.float32).reshape(n, 3) / 10
    return EnvironmentState(observation, np.full(n, reward), flags[0], flags[1], observation, ~flags[2])


def made(agent=DDPG, n=4, **hyperparameters):
    """An agent and the RLState at its first step, past the random actions."""
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": agent.__name__.lower(), "hidden_sizes": (8,), "replay_capacity": 100, "batch_size": 8}
            | {"learning_starts": 0}
            | hyperparameters
        )
    )
    agent = agent(config)
    state, _ = agent.init(RandomKey(1), observation_space=OBSERVATIONS, action_space=ACTIONS)
    rl_state = RLState(state, reset_state(seen(n).observation, n), RandomKey(2), 0, 0, None)
    state, key = agent.reset(rl_state.random_key, rl_state)
    return agent, rl_state._replace(agent_state=state, random_key=key)


# The process --------------------------------------------------------------------------------------------------


def test_ornstein_uhlenbeck_follows_its_recursion_to_the_bit():
    x = RandomKey(1).normal(5, 2)
    expected, one = x.numpy(), np.float32
    for index in range(50):
        key = RandomKey(index)
        x = ornstein_uhlenbeck(x, key, sigma=0.3, theta=0.2, mu=-0.5)
        pull = one(0.2) * (one(-0.5) - expected)
        expected = expected + pull + one(0.3) * key.normal(5, 2).numpy()
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), expected)


def test_ornstein_uhlenbeck_is_stationary_where_it_should_be():
    """20,000 processes: variance sigma^2 / (theta (2 - theta)), correlation (1 - theta)^k, mean mu; each five sigma."""
    rows, lag = 20_000, 5
    x, key, kept = torch.full((rows, 1), 0.4), RandomKey(7), []
    for _ in range(80 + lag):
        step_key, key = key.split(2)
        x = ornstein_uhlenbeck(x, step_key, sigma=0.2, mu=0.4)
        kept.append(x[:, 0].double().numpy())
    early, late = kept[-1 - lag], kept[-1]
    variance = 0.2**2 / (0.15 * (2 - 0.15))
    assert late.var() == pytest.approx(variance, rel=5 * (2 / rows) ** 0.5)
    assert late.mean() == pytest.approx(0.4, abs=5 * (variance / rows) ** 0.5)
    assert np.corrcoef(early, late)[0, 1] == pytest.approx((1 - 0.15) ** lag, abs=5 / rows**0.5)
    neighbours = np.corrcoef(late[0::2], late[1::2])[0, 1]
    assert abs(neighbours) < 5 / (rows / 2) ** 0.5


def test_a_row_goes_its_own_way():
    x = RandomKey(1).normal(4, 2)
    other = x.clone()
    other[1] += 1.0
    moved, other_moved = (ornstein_uhlenbeck(start, RandomKey(3), sigma=0.2) for start in (x, other))
    same = [torch.equal(a, b) for a, b in zip(moved, other_moved, strict=True)]
    assert same == [True, False, True, True]


# In the agents ------------------------------------------------------------------------------------------------


def test_ddpg_adds_the_process_to_its_policy_in_halves_of_the_range():
    agent, rl_state = made(n=2, exploration_noise=0.3, exploration_theta=0.5, exploration_mean=0.1)
    state, expected = rl_state.agent_state, torch.full((2, 2), 0.1)
    for _ in range(3):
        key = rl_state.random_key.split(2)[0]
        action, rl_state = agent.select_action(rl_state, 0)
        expected = ornstein_uhlenbeck(expected, key.split(2)[1], sigma=0.3, theta=0.5, mu=0.1)
        with torch.no_grad():
            mean, _ = state.policy.sample_actions(torch.from_numpy(rl_state.environment_state.observation))
        low, high = torch.tensor(ACTIONS.low), torch.tensor(ACTIONS.high)
        assert torch.equal(torch.from_numpy(action), (mean + expected * HALF_RANGE).clamp(low, high))
        assert torch.equal(state.noise, expected)


def test_actions_stay_within_the_bounds_and_the_noise_does_not():
    agent, rl_state = made(exploration_noise=50.0)
    action, rl_state = agent.select_action(rl_state, 0)
    assert ((action >= ACTIONS.low) & (action <= ACTIONS.high)).all()
    assert (action == ACTIONS.low).any()
    assert float(rl_state.agent_state.noise.abs().max()) > 10


def test_gaussian_noise_is_td3s_own_and_any_agent_may_take_either():
    key = RandomKey(2).split(2)[0]
    policy_key, noise_key = key.split(2)
    for agent, process, deterministic in [(TD3, "auto", True), (DDPG, "gaussian", True), (SAC, "gaussian", False)]:
        agent, rl_state = made(agent, exploration_process=process)
        state = rl_state.agent_state
        action, _ = agent.select_action(rl_state, 0)
        with torch.no_grad():
            observations = torch.from_numpy(rl_state.environment_state.observation)
            plain, _ = policy_actions(state.policy, observations, (4, 2), policy_key, deterministic=deterministic)
        assert torch.equal(torch.from_numpy(action), noisy_actions(plain, state.bounds, noise_key, scale=0.1))
        assert state.noise is None


def test_without_noise_the_policy_acts_alone():
    for agent, deterministic in [(DDPG, True), (SAC, False)]:
        agent, rl_state = made(agent, exploration_process="none")
        action, _ = agent.select_action(rl_state, 0)
        with torch.no_grad():
            observations = torch.from_numpy(rl_state.environment_state.observation)
            key = RandomKey(2).split(2)[0]
            plain, _ = policy_actions(
                rl_state.agent_state.policy, observations, (4, 2), key, deterministic=deterministic
            )
        assert torch.equal(torch.from_numpy(action), plain)


def test_random_actions_leave_the_noise_where_it_is():
    agent, rl_state = made(learning_starts=10)
    agent.select_action(rl_state, 0)
    assert torch.equal(rl_state.agent_state.noise, torch.zeros(4, 2))


# Resets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment_state", "rows"),
    [
        (seen(terminated=[1]), [1]),
        (seen(truncated=[0, 3]), [0, 3]),
        (seen(terminated=[2], truncated=[2]), [2]),
        (seen(terminated=[1, 2], waiting=[2]), [1]),  # row 2 ended before, and this step was its reset
        (seen(), []),
        (seen(waiting=[0, 1, 2, 3]), [0, 1, 2, 3]),  # a feed's reset: everything begins
        (reset_state(np.zeros((4, 3), np.float32), 4), [0, 1, 2, 3]),
    ],
)
def test_a_reset_touches_only_what_begins_anew(environment_state, rows):
    agent, rl_state = made(exploration_mean=0.25)
    _, rl_state = agent.select_action(rl_state, 0)
    before = rl_state.agent_state.noise.clone()
    held = rl_state.agent_state.noise
    state, key = agent.reset(rl_state.random_key, rl_state._replace(environment_state=environment_state))
    assert key == rl_state.random_key
    assert np.flatnonzero(begins_anew(environment_state)).tolist() == rows
    expected = before.clone()
    expected[rows] = 0.25
    assert torch.equal(state.noise, expected)
    assert torch.equal(held, before)  # whoever still holds the old noise sees no change


def test_a_reset_with_another_number_of_environments_begins_everywhere():
    agent, rl_state = made(n=4)
    _, rl_state = agent.select_action(rl_state, 0)
    state, _ = agent.reset(rl_state.random_key, rl_state._replace(environment_state=seen(n=2)))
    assert torch.equal(state.noise, torch.zeros(2, 2))


# Checkpoints --------------------------------------------------------------------------------------------------


def test_the_noise_comes_back_bit_for_bit():
    agent, rl_state = made()
    for _ in range(5):
        _, rl_state = agent.select_action(rl_state, 0)
    tensors, values = agent.export_state(rl_state.agent_state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other, restored = made()
    other.import_state(restored.agent_state, tensors, values)
    restored = restored._replace(random_key=rl_state.random_key)
    for _ in range(5):
        action, rl_state = agent.select_action(rl_state, 0)
        again, restored = other.select_action(restored, 0)
        np.testing.assert_array_equal(action, again)
        assert torch.equal(rl_state.agent_state.noise, restored.agent_state.noise)
    assert not torch.equal(tensors["noise"], rl_state.agent_state.noise)  # what was saved did not move on


def test_noise_of_other_actions_is_refused_and_nothing_changes():
    agent, rl_state = made()
    state = rl_state.agent_state
    tensors, values = agent.export_state(state)
    for wrong in (torch.zeros(4, 3), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"noise has shape .* in the checkpoint; here it must be \[n, 2\]"):
            agent.import_state(state, tensors | {"noise": wrong}, values | {"counters": {}})
    assert torch.equal(state.noise, torch.zeros(4, 2))


def test_a_checkpoint_without_noise_is_taken():
    agent, rl_state = made()
    _, rl_state = agent.select_action(rl_state, 0)
    tensors, values = agent.export_state(rl_state.agent_state)
    del tensors["noise"], values["exploration"]
    agent.import_state(rl_state.agent_state, tensors, values)
    assert rl_state.agent_state.noise is None
    action, _ = agent.select_action(rl_state, 0)
    assert action.shape == (4, 2)
