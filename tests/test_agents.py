"""The agents: known values, the equations, gradients that stay where they belong, users' own parts."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.agents import DDPG, SAC, TD3, Agent
from angle_rl.agents.base import crossings
from angle_rl.agents.noise import action_bounds, noisy_actions, policy_actions, seeded_torch, uniform_actions
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.models import DeterministicPolicy, PolicyModel, SquashedGaussianPolicy, TwinQ
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey, RLState

CPU = torch.device("cpu")
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))


def made(agent=SAC, *, q_future=None, policy=None, critics=None, **hyperparameters):
    """An agent and its first state, with some random transitions in the replay."""
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            **{"hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000, "agent": agent.__name__.lower()}
            | hyperparameters
        ),
        training=Training(engine="torch"),
    )
    agent = agent(config, q_future)
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


# Intervals and noise ------------------------------------------------------------------------------------------


@given(
    st.one_of(st.integers(1, 50), st.fractions(Fraction(1, 50), 50)),
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
)
def test_an_interval_fires_at_every_multiple_however_the_steps_are_cut(interval, strides):
    fired, step = 0, 0
    for stride in strides:
        fired += crossings(interval, step, step + stride)
        step += stride
    assert fired == math.floor(step / Fraction(interval))
    assert crossings(None, 0, step) == 0


def test_td3_noise_is_scaled_to_the_range_clipped_and_within_the_bounds():
    bounds = action_bounds(ACTIONS, CPU, "TD3")
    actions = torch.tensor([[0.0, 5.0]]).expand(20_000, 2)
    noise = noisy_actions(actions, bounds, RandomKey(3), scale=0.2) - actions
    assert noise.std(0).tolist() == pytest.approx([0.2, 1.0], rel=0.03)
    clipped = noisy_actions(actions, bounds, RandomKey(3), scale=0.2, clip=0.1) - actions
    assert clipped.abs().amax(0).tolist() == pytest.approx([0.1, 0.5], rel=1e-5)
    wild = noisy_actions(actions, bounds, RandomKey(3), scale=50.0)
    assert wild.amin(0).tolist() == [-1.0, 0.0]
    assert wild.amax(0).tolist() == [1.0, 10.0]


def test_uniform_actions_fill_the_bounds():
    actions = uniform_actions(action_bounds(ACTIONS, CPU, "SAC"), 20_000, RandomKey(0))
    assert actions.dtype == torch.float32
    assert actions.mean(0).tolist() == pytest.approx([0.0, 5.0], abs=0.1)
    assert actions.amin(0).tolist() == pytest.approx([-1.0, 0.0], abs=0.01)
    assert actions.amax(0).tolist() == pytest.approx([1.0, 10.0], abs=0.01)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (spaces.Discrete(3), "Discrete.*SAC needs continuous"),
        (spaces.Box(0, 255, (2,), np.uint8), "SAC needs continuous"),
        (spaces.Box(-np.inf, np.inf, (2,)), "finite bounds"),
        (spaces.Box(1.0, 1.0, (2,)), "low bound must be less"),
    ],
)
def test_other_action_spaces_are_refused(space, says):
    with pytest.raises(ValueError, match=says):
        SAC(AgentConfig()).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=space)


def test_default_networks_refuse_actions_that_are_not_flat():
    actions = spaces.Box(-1, 1, (2, 2))
    with pytest.raises(ValueError, match=r"default policy takes flat Box.*pass policy="):
        SAC(AgentConfig()).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=actions)
    policy = SquashedGaussianPolicy(3, ACTIONS.low, ACTIONS.high)
    with pytest.raises(ValueError, match=r"default critics takes flat Box.*pass critics="):
        SAC(AgentConfig()).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=actions, policy=policy)


def test_a_policy_without_noise_runs_under_the_key_and_leaves_torch_alone():
    class Drawing(torch.nn.Module):
        def sample_actions(self, observations, deterministic=False):
            return torch.randn(len(observations), 2), None

    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [policy_actions(Drawing(), torch.zeros(4, 3), (4, 2), RandomKey(key))[0] for key in (7, 7, 8)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(RuntimeError), seeded_torch(RandomKey(0), CPU):
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())


# The equations ------------------------------------------------------------------------------------------------


def test_agents_are_agents():
    assert isinstance(SAC(AgentConfig()), Agent)
    assert isinstance(TD3(AgentConfig()), Agent)


def test_critics_start_apart_and_targets_start_equal():
    _, state = made(critics=None)
    q = state.critics(torch.ones(1, 3), torch.ones(1, 2))
    assert q.shape == (2, 1)
    assert q[0] != q[1]
    for online, target in zip(state.critics.parameters(), state.target_critics.parameters(), strict=True):
        assert torch.equal(online, target)
        assert online.data_ptr() != target.data_ptr()
        assert not target.requires_grad


def test_sac_update_follows_the_equations():
    """One update against the paper's equations written out with autograd, Adam and a loop over targets."""
    _, state = made(learning_rate=0.01, replay="uniform", entropy_learning_rate=0.02)
    policy, critics = copy.deepcopy(state.policy), copy.deepcopy(state.critics)
    key = RandomKey(11)
    result = state.engine.update(key, 1)
    batch, (target_key, policy_key) = result.batch, key.split(2)
    with torch.no_grad():
        actions, log_prob = policy.sample_actions(batch.next_observations, noise=target_key.normal(32, 2))
        value = critics(batch.next_observations, actions).amin(0) - 1.0 * log_prob
        target = batch.rewards + batch.discounts * value
    q = critics(batch.observations, batch.actions)
    loss = ((q[0] - target) ** 2 + (q[1] - target) ** 2).mean()
    assert torch.allclose(result.critic_loss, loss, rtol=1e-5)
    old = [parameter.detach().clone() for parameter in critics.parameters()]
    optimizer = torch.optim.Adam(critics.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()
    for expected, before, ours, slow in zip(
        critics.parameters(), old, state.critics.parameters(), state.target_critics.parameters(), strict=True
    ):
        assert torch.allclose(expected, ours, atol=1e-6)
        assert torch.allclose(0.995 * before + 0.005 * expected, slow, atol=1e-6)
    actions, log_prob = policy.sample_actions(batch.observations, noise=policy_key.normal(32, 2))
    policy_loss = (log_prob - critics(batch.observations, actions).amin(0)).mean()
    assert torch.allclose(result.policy_loss, policy_loss, atol=1e-5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    optimizer.zero_grad()
    policy_loss.backward()
    optimizer.step()
    for expected, ours in zip(policy.parameters(), state.policy.parameters(), strict=True):
        assert torch.allclose(expected, ours, atol=1e-5)
    direction = -math.copysign(1.0, -(float(log_prob.detach().mean()) - 2.0))  # Adam's first step is lr * sign
    assert float(state.log_entropy_coefficient.detach()) == pytest.approx(0.02 * direction, rel=1e-4)
    assert float(state.entropy_coefficient) == pytest.approx(math.exp(0.02 * direction), rel=1e-4)


def test_td3_targets_are_smoothed_and_move_with_the_policy_only():
    agent, state = made(TD3, target_noise=0.3, target_noise_clip=0.1)
    before = [parameter.clone() for parameter in state.target_critics.parameters()]
    key = RandomKey(2)
    batch = state.engine.update(key, 0).batch
    for old, now in zip(before, state.target_critics.parameters(), strict=True):
        assert torch.equal(old, now)
    values = agent.next_values(state, batch, key)
    assert values.log_prob is None
    _, noise_key = key.split(2)
    with torch.no_grad():
        noise = (0.3 * noise_key.normal(32, 2)).clamp(-0.1, 0.1) * torch.tensor([1.0, 5.0])
        low, high = torch.tensor(ACTIONS.low), torch.tensor(ACTIONS.high)
        actions = (state.target_policy(batch.next_observations) + noise).clamp(low, high)
        expected = state.target_critics(batch.next_observations, actions)
    assert torch.allclose(values.q, expected, atol=1e-5)
    state.engine.update(RandomKey(3), 1)
    moved = zip(before, state.target_critics.parameters(), strict=True)
    assert all(not torch.equal(old, now) for old, now in moved)


def test_td3_policy_descends_the_first_critic():
    agent, state = made(TD3)
    batch = state.replay.sample(32)
    loss, log_prob, _ = agent.policy_loss(state, batch, RandomKey(0))
    expected = -state.critics(batch.observations, state.policy(batch.observations))[0].mean()
    assert log_prob is None
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG])
def test_linear_learning_rates_fall_to_nothing_at_the_last_step(agent):
    rates = {"learning_rate": 0.02, "policy_learning_rate": 0.01, "entropy_learning_rate": 0.04}
    agent, state = made(agent, **rates, learning_rate_schedule="linear", learning_starts=10)
    first = {"critics": 0.02, "policy": 0.01, "entropy_coefficient": 0.04}
    assert agent.config.training.steps == 8000
    for steps, share in ((2000, 0.75), (6000, 0.25), (8000, 0.0), (9000, 0.0)):
        before = copy.deepcopy(state.critics.state_dict())
        state.steps, state.learned_steps = steps, steps - 1
        agent.optimize_model(RLState(state, None, RandomKey(steps), 0, 0, None))
        for name, optimizer in state.optimizers.items():
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([share * first[name]])
        unchanged = [torch.equal(before[name], now) for name, now in state.critics.state_dict().items()]
        assert all(unchanged) if share == 0 else not any(unchanged)
    assert state.updates == 4


def test_constant_learning_rates_are_left_alone():
    agent, state = made(learning_rate=0.02)
    state.optimizers["critics"].param_groups[0]["lr"] = 0.3  # a user's own
    state.steps, state.learned_steps = 5000, 4999
    agent.optimize_model(RLState(state, None, RandomKey(0), 0, 0, None))
    assert [state.optimizers[name].param_groups[0]["lr"] for name in ("critics", "policy")] == [0.3, 0.02]


@pytest.mark.parametrize("agent", [SAC, TD3])
def test_policy_gradients_do_not_reach_the_critics(agent):
    agent, state = made(agent)
    seen = []
    step = state.optimizers["policy"].step

    def watch():
        seen.append([(p.requires_grad, p.grad.clone()) for p in state.critics.parameters()])
        assert all(p.grad is not None for p in state.policy.parameters())
        return step()

    after_critics = []
    critics_step = state.optimizers["critics"].step
    state.optimizers["critics"].step = lambda: (
        after_critics.append([p.grad.clone() for p in state.critics.parameters()]),
        critics_step(),
    )
    state.optimizers["policy"].step = watch
    state.engine.update(RandomKey(0), 1)
    for (needed, gradient), own in zip(seen[0], after_critics[0], strict=True):
        assert not needed
        assert torch.equal(gradient, own)
    assert all(p.requires_grad for p in state.critics.parameters())


def test_the_policy_learns_on_a_batch_of_its_own_if_asked():
    for policy_batch, draws in [("critic", 32), ("fresh", 64)]:
        _, state = made(policy_batch=policy_batch)
        before = state.replay.stats()["samples"]
        state.engine.update(RandomKey(0), 1)
        assert state.replay.stats()["samples"] - before == draws


def test_gradients_are_clipped_to_the_norm():
    _, state = made(max_gradient_norm=1e-3, huber_delta=0.5)
    state.engine.update(RandomKey(0), 1)
    for network in (state.critics, state.policy):
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_huber_importance_weights_and_priorities_follow_the_equations():
    _, state = made(huber_delta=0.3)
    for index in range(3):
        state.engine.update(RandomKey(index), 0)
    written = []
    state.replay.update_priorities = lambda handles, td_error: written.append((handles, td_error)) or 0
    critics, target_critics = copy.deepcopy(state.critics), copy.deepcopy(state.target_critics)
    key = RandomKey(5)
    result = state.engine.update(key, 0)
    batch = result.batch
    assert float(batch.importance_weights.min()) < 1.0
    with torch.no_grad():
        noise = key.split(1)[0].normal(32, 2)
        actions, log_prob = state.policy.sample_actions(batch.next_observations, noise=noise)
        value = target_critics(batch.next_observations, actions).amin(0) - log_prob
        target = (batch.rewards + batch.discounts * value).expand(2, 32)
        q = critics(batch.observations, batch.actions)
        errors = torch.nn.functional.huber_loss(q, target, delta=0.3, reduction="none")
    assert torch.equal(q, result.q)
    assert torch.allclose(result.critic_loss, (batch.importance_weights * errors.sum(0)).mean(), rtol=1e-5)
    assert torch.equal(written[0][0], batch.handles)
    assert torch.allclose(written[0][1], (q - target).abs().mean(0), atol=1e-5)


def test_q_future_replaces_the_minimum():
    def second_only(target_critics, next_observations, next_actions):
        return target_critics(next_observations, next_actions)[1]

    agent, state = made(q_future=second_only)
    batch = state.replay.sample(32)
    values = agent.next_values(state, batch, RandomKey(0))
    actions, _ = policy_actions(state.policy, batch.next_observations, (32, 2), RandomKey(0))
    assert torch.equal(values.q, state.target_critics(batch.next_observations, actions)[1:])
    agent, state = made(q_future=lambda critics, o, a: critics(o, a).sum())
    with pytest.raises(ValueError, match=r"q_future gave shape \[\]; it must be \[32\]"):
        agent.next_values(state, batch, RandomKey(0))


def test_more_critics_than_two():
    config = AgentConfig(hyperparameters=Hyperparameters(critics=5, hidden_sizes=(8,)))
    state, _ = SAC(config).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=ACTIONS)
    assert state.critics(torch.zeros(4, 3), torch.zeros(4, 2)).shape == (5, 4)


def test_constants_of_the_target_networks_do_not_drift():
    _, state = made(TD3)
    for index in range(20):
        state.engine.update(RandomKey(index), 1)
    assert torch.equal(state.policy.action_scale, state.target_policy.action_scale)
    assert torch.equal(state.policy.action_center, state.target_policy.action_center)


# Learning what is known ---------------------------------------------------------------------------------------


def two_steps(terminated):
    """Two states in a row, rewards 1 and 2 whatever is done; then the end, or the time limit."""

    def function(observation, action):
        first = observation[0] > 0
        return np.array([-1.0], np.float32), 1.0 if first else 2.0, terminated and not first

    return FunctionFeed(
        function,
        initial_observation=np.array([1.0], np.float32),
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        step_limit=2,
        name="chain",
    )


@pytest.mark.parametrize("agent", ["sac", "td3"])
@pytest.mark.parametrize("terminated", [True, False])
def test_a_two_step_chain_is_learned_to_two_percent(tmp_path, agent, terminated):
    """Termination: Q*(second) = 2, Q*(first) = 1 + 0.8 * 2. Truncation: the second goes on, 2 / 0.2."""
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            agent=agent,
            hidden_sizes=(32,),
            batch_size=32,
            learning_rate=3e-3,
            tau=0.1,
            discount=0.8,
            exploration_noise=1.0,
            entropy_coefficient=0.0,
            learning_starts=100,
            replay_capacity=2000,
        ),
        training=Training(steps=2000, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(tmp_path), tensorboard=False, checkpoint_interval=None),
    )
    trainer = AgentTrainer(config, two_steps(terminated))
    trainer.train()
    second = 2.0 if terminated else 2.0 / (1 - 0.8)
    expected = torch.tensor([1.0 + 0.8 * second, second])
    with torch.no_grad():
        for action in (-0.5, 0.0, 0.5):
            q = trainer.critics(torch.tensor([[1.0], [-1.0]]), torch.full((2, 1), action))
            assert torch.allclose(q, expected.expand(2, 2), rtol=0.02), (q, expected)


class SharedBodyPolicy(PolicyModel):
    """A user's policy on dict observations; the library's sampling, the user's network."""

    def __init__(self):
        super().__init__(ACTIONS.low, ACTIONS.high)
        self.body = torch.nn.Linear(5, 4)

    def forward(self, observations):
        flat = torch.cat((observations["position"], observations["image"].flatten(1).float() / 255), 1)
        mean, log_std = self.body(flat).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class DictCritics(torch.nn.Module):
    """A user's critics on dict observations."""

    def __init__(self):
        super().__init__()
        self.inner = TwinQ(5, 2, (16,), critics=3)

    def forward(self, observations, actions):
        flat = torch.cat((observations["position"], observations["image"].flatten(1).float() / 255), 1)
        return self.inner(flat, actions)


@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_a_users_policy_and_critics_train_on_nested_observations(tmp_path, agent):
    space = spaces.Dict(position=spaces.Box(-1.0, 1.0, (1,), np.float32), image=spaces.Box(0, 255, (2, 2), np.uint8))

    def function(observation, action):
        return observation, -float((action[0] - 0.5) ** 2) - float((action[1] / 10 - 0.2) ** 2)

    feed = FunctionFeed(
        function,
        initial_observation={"position": np.ones(1, np.float32), "image": np.full((2, 2), 9, np.uint8)},
        observation_space=space,
        action_space=ACTIONS,
        step_limit=5,
    )
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            agent=agent, batch_size=64, learning_starts=100, learning_rate=0.01, discount=0.0, replay_capacity=2000
        ),
        training=Training(steps=700, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(tmp_path), tensorboard=False),
    )
    policy = SharedBodyPolicy()
    with torch.no_grad():
        policy.body.bias[:2] = -1.0  # starts far from the best actions
    trainer = AgentTrainer(config, feed, policy=policy, critics=DictCritics())
    assert trainer.policy is policy
    before = trainer.evaluate(1).mean_return
    after = trainer.train().mean_return
    assert before < -2.0
    assert after > -0.5


def test_sac_refuses_a_policy_without_log_probabilities():
    class Silent(DeterministicPolicy):
        def sample_actions(self, observations, deterministic=False, *, noise=None):
            return self(observations), None

    _, state = made(policy=Silent(3, ACTIONS.low, ACTIONS.high))
    with pytest.raises(TypeError, match="no log_prob"):
        state.engine.update(RandomKey(0), 1)
