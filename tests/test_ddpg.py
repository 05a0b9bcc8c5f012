"""DDPG: its equations on a linear case worked out by hand, one critic, target policy, and the targets' updates."""

import copy
import typing

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import DDPG, SAC, TD3, Agent
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.models import PolicyModel
from angle_rl.trainer import AGENTS, AgentTrainer
from angle_rl.types import RandomKey

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))


def made(agent=DDPG, *, policy=None, critics=None, **hyperparameters):
    """An agent and its first state, with some random transitions in the replay."""
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            **{"hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000, "agent": agent.__name__.lower()}
            | hyperparameters
        ),
        training=Training(engine="torch"),
    )
    agent = agent(config)
    state, _ = agent.init(
        RandomKey(1), observation_space=OBSERVATIONS, action_space=ACTIONS, policy=policy, critics=critics
    )
    generator = np.random.default_rng(0)
    n = 200
    state.replay.insert(
        generator.normal(size=(n, 3)).astype(np.float32),
        generator.uniform(ACTIONS.low, ACTIONS.high, (n, 2)).astype(np.float32),
        generator.normal(size=n).astype(np.float32),
        generator.normal(size=(n, 3)).astype(np.float32),
        generator.random(n) < 0.2,
    )
    return agent, state


def networks(state):
    return [network for network in (state.critics, state.policy) if network is not None]


def targets(state):
    return [network for network in (state.target_critics, state.target_policy) if network is not None]


def values(modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


class LinearPolicy(PolicyModel):
    """pi(s) = W s, free of bounds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(RandomKey(5).normal(2, 3) * 0.1)

    def forward(self, observations):
        return observations @ self.weight.T


class LinearCritic(torch.nn.Module):
    """Q(s, a) = u . s + v . a, the only critic."""

    def __init__(self):
        super().__init__()
        self.u = torch.nn.Parameter(RandomKey(6).normal(3))
        self.v = torch.nn.Parameter(RandomKey(7).normal(2))

    def forward(self, observations, actions):
        return (observations @ self.u + actions @ self.v).unsqueeze(0)


# The equations ------------------------------------------------------------------------------------------------


def test_an_update_follows_the_equations_worked_out_by_hand():
    """Two updates of linear networks, gradients and Adam written out in float64."""
    agent, state = made(policy=LinearPolicy(), critics=LinearCritic(), replay="uniform", learning_rate=0.01, tau=0.1)
    assert isinstance(agent, Agent)
    w, u, v = (p.detach().double().numpy() for p in (state.policy.weight, state.critics.u, state.critics.v))
    slow_w, slow_u, slow_v = w, u, v
    moments = {}

    def adam(name, parameter, gradient, count):
        first, second = moments.get(name, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        moments[name] = first, second
        return parameter - 0.01 * (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)

    for count in (1, 2):
        result = state.engine.update(RandomKey(count), 1)
        batch = [getattr(result.batch, name).double().numpy() for name in result.batch._fields]
        s, a, r, s2, discount = batch[:5]
        target = r + discount * (s2 @ slow_u + (s2 @ slow_w.T) @ slow_v)
        error = s @ u + a @ v - target
        assert float(result.critic_loss) == pytest.approx((error**2).mean(), rel=1e-5)
        n = len(error)
        u, v = adam("u", u, 2 * error @ s / n, count), adam("v", v, 2 * error @ a / n, count)
        q = s @ u + (s @ w.T) @ v  # the policy learns on the critic that has just learned
        assert float(result.policy_loss) == pytest.approx(-q.mean(), rel=1e-4)
        w = adam("w", w, -np.outer(v, s.mean(0)), count)
        slow_w, slow_u, slow_v = (0.1 * b + 0.9 * c for b, c in ((w, slow_w), (u, slow_u), (v, slow_v)))
        for ours, expected in [
            (state.critics.u, u),
            (state.critics.v, v),
            (state.policy.weight, w),
            (state.target_critics.u, slow_u),
            (state.target_critics.v, slow_v),
            (state.target_policy.weight, slow_w),
        ]:
            np.testing.assert_allclose(ours.detach().numpy(), expected, atol=2e-6)


def test_the_targets_actions_are_the_target_policys_without_noise():
    agent, state = made()
    with torch.no_grad():
        for parameter in state.target_policy.parameters():
            parameter.add_(0.1)
    batch = state.replay.sample(32)
    future = agent.next_values(state, batch, RandomKey(0))
    with torch.no_grad():
        actions = state.target_policy(batch.next_observations)
        assert torch.equal(future.q, state.target_critics(batch.next_observations, actions))
        assert not torch.allclose(actions, state.policy(batch.next_observations))
    assert (future.log_prob, future.entropy_coefficient) == (None, 0.0)
    assert torch.equal(future.q, agent.next_values(state, batch, RandomKey(1)).q)


def test_the_number_of_critics():
    for agent, given, expected in [(DDPG, "auto", 1), (DDPG, 2, 2), (TD3, "auto", 2), (SAC, "auto", 2), (SAC, 3, 3)]:
        config = AgentConfig(hyperparameters=Hyperparameters(agent=agent.__name__.lower(), critics=given))
        state, _ = agent(config).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=ACTIONS)
        assert state.critics(torch.zeros(4, 3), torch.zeros(4, 2)).shape == (expected, 4)
    for name in ("sac", "td3"):
        with pytest.raises(ValueError, match=rf"critics is 1; it must lie in \[2, inf\) where agent is '{name}'"):
            Hyperparameters(agent=name, critics=1)
    assert Hyperparameters(agent="ddpg", critics=1).critics == 1


def test_every_agent_of_the_config_has_a_class_of_its_own():
    names = set(AGENTS)
    assert names <= set(typing.get_args(typing.get_type_hints(Hyperparameters)["agent"]))
    assert AGENTS["ddpg"] is DDPG
    assert len(set(AGENTS.values())) == len(names)


# The targets' updates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG])
def test_hard_updates_copy_when_told_and_leave_the_targets_alone_otherwise(agent):
    _, state = made(agent, target_update_interval=3)
    first = values(targets(state))
    for index in range(2):
        state.engine.update(RandomKey(index), 1, False)
        assert all(map(torch.equal, first, values(targets(state))))
    state.engine.update(RandomKey(9), 1, True)
    online = values(networks(state))[: len(first)]
    assert all(map(torch.equal, online, values(targets(state))))
    assert not any(map(torch.equal, first, values(targets(state))))


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG])
def test_soft_updates_do_not_ask_the_caller(agent):
    states = [made(agent)[1] for _ in range(2)]
    for state, copies in zip(states, (False, True), strict=True):
        before = values(targets(state))
        state.engine.update(RandomKey(1), 1, copies)
        for old, slow, online in zip(before, values(targets(state)), values(networks(state)), strict=False):
            torch.testing.assert_close(slow, 0.995 * old + 0.005 * online)
    assert all(map(torch.equal, *(values(targets(state)) for state in states)))


# Runs ---------------------------------------------------------------------------------------------------------


def walk(observation, action):
    observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
    return observation, -float(np.abs(observation).sum())


def walk_feed(**options):
    return FunctionFeed(
        walk,
        initial_observation=np.array([0.5], np.float32),
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        step_limit=10,
        **options,
    )


def small(folder, steps=120, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "ddpg", "hidden_sizes": (16,), "batch_size": 8, "learning_starts": 20, "replay_capacity": 1000}
            | hyperparameters
        ),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=2, engine="torch"),
        service=Service(run_folder=str(folder), tensorboard=False),
    )


@pytest.mark.parametrize(
    ("options", "updates", "policy_steps"),
    [({}, 100, 100), ({"policy_update_interval": 4}, 100, 25), ({"updates_per_step": 0.5}, 50, 50)],
)
def test_the_policy_steps_with_every_update(tmp_path, options, updates, policy_steps):
    trainer = AgentTrainer(small(tmp_path, **options), walk_feed())
    trainer.train()
    state = trainer.rl_state.agent_state
    assert (state.updates, state.policy_updates) == (updates, policy_steps)


class Copies(DDPG):
    """DDPG that writes down after which updates its targets are the online networks."""

    def optimize_model(self, rl_state):
        rl_state = super().optimize_model(rl_state)
        state = rl_state.agent_state
        if all(map(torch.equal, values(targets(state)), values(networks(state)))):
            self.seen.append(state.updates)
        return rl_state


def test_hard_updates_come_every_so_many_updates_also_after_a_resume(tmp_path):
    config = small(tmp_path, steps=50, target_update_interval=7)
    agent = Copies(config)
    agent.seen = []
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    trainer.train()
    assert [count for count in agent.seen if count > 0] == [7, 14, 21, 28]
    config = small(tmp_path, steps=70, target_update_interval=7)
    resumed = Copies(config)
    resumed.seen = []
    AgentTrainer.resume(trainer.run_folder, config, feed=walk_feed(), agent=resumed).train()
    assert resumed.seen == [35, 42, 49]


def test_a_skipped_update_does_not_count_and_copies_nothing(tmp_path):
    config = small(tmp_path, target_update_interval=2)
    agent = DDPG(config)
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    engine, asked = trainer.rl_state.agent_state.engine, []
    update = engine.update

    def watch(key, policy_steps, copy_targets):
        result = update(key, policy_steps, copy_targets)
        result = result._replace(finite=len(asked) % 3 != 1)  # every third one is said to have failed
        asked.append((copy_targets, result.finite))
        return result

    engine.update = watch
    trainer.train()
    taken = 0
    for copies, finite in asked:
        assert copies == ((taken + 1) % 2 == 0)
        taken += finite
    assert trainer.skipped_updates > 10


def learned(trainer):
    """All tensors of a checkpoint but the replay's, whose rows go to new streams after a resume."""
    tensors, _ = trainer.agent.export_state(trainer.rl_state.agent_state)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("replay.")}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = AgentTrainer(small(tmp_path / "whole", steps=120), walk_feed(num_environments=2))
    whole.train()
    half = AgentTrainer(small(tmp_path / "half", steps=60), walk_feed(num_environments=2))
    half.train()
    resumed = AgentTrainer.resume(
        half.run_folder, small(tmp_path / "half", steps=120), feed=walk_feed(num_environments=2)
    )
    resumed.train()
    assert resumed.updates == whole.updates == 100
    exports = [learned(trainer) for trainer in (whole, resumed)]
    assert "noise" in exports[0]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        assert torch.equal(tensor, exports[1][name]), name


def test_a_two_step_chain_is_learned_to_two_percent(tmp_path):
    """Rewards 1 and 2 whatever is done, then the end: Q*(second) = 2, Q*(first) = 1 + 0.8 * 2."""

    def function(observation, action):
        first = observation[0] > 0
        return np.array([-1.0], np.float32), 1.0 if first else 2.0, not first

    chain = FunctionFeed(
        function,
        initial_observation=np.array([1.0], np.float32),
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        step_limit=2,
    )
    config = small(
        tmp_path,
        steps=1200,
        hidden_sizes=(32,),
        batch_size=32,
        learning_rate=3e-3,
        discount=0.8,
        exploration_noise=1.0,
        learning_starts=100,
        target_update_interval=10,
    )
    trainer = AgentTrainer(config, chain)
    trainer.train()
    with torch.no_grad():
        for action in (-0.5, 0.0, 0.5):
            q = trainer.critics(torch.tensor([[1.0], [-1.0]]), torch.full((2, 1), action))
            torch.testing.assert_close(q[0], torch.tensor([2.6, 2.0]), rtol=0.02, atol=0.0)


def test_the_state_is_refused_by_another_agent(tmp_path):
    AgentTrainer(small(tmp_path), walk_feed()).save(tmp_path / "ddpg")
    other = AgentTrainer(small(tmp_path, agent="td3"), walk_feed())
    before = copy.deepcopy(values(networks(other.rl_state.agent_state)))
    with pytest.raises(ValueError, match="saved by DDPG"):
        other.load(tmp_path / "ddpg")
    assert all(map(torch.equal, before, values(networks(other.rl_state.agent_state))))
