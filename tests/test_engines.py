"""What agents hand to engines, and how many updates an engine is asked for at a time."""

from __future__ import annotations

import copy
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.agents.noise import random_subset
from angle_rl.agents.state import LATER_COUNTERS, LossNotFiniteError
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.engines import TorchEngine
from angle_rl.feed import FunctionFeed
from angle_rl.models import TwinQ
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey, RLState

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
NAMES = {SAC: "sac", DiscreteSAC: "sac_discrete", TD3: "td3", DDPG: "ddpg", DQN: "dqn"}


def made(kind=SAC, *, q_future=None, rows=200, **hyperparameters):
    """An agent, its first state with random transitions in the replay, and what its engine was made of."""
    base = next(base for base in kind.__mro__ if base in NAMES)
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": NAMES[base], "hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000} | hyperparameters
        )
    )
    discrete = base in (DQN, DiscreteSAC)
    action_space = spaces.Discrete(4, start=-1) if discrete else ACTIONS
    agent = kind(config) if q_future is None else kind(config, q_future)
    state, _ = agent.init(RandomKey(1), observation_space=OBSERVATIONS, action_space=action_space)
    generator = np.random.default_rng(0)
    if rows > 0:
        state.replay.insert(
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.integers(-1, 3, rows)
            if discrete
            else generator.uniform(ACTIONS.low, ACTIONS.high, (rows, 2)).astype(np.float32),
            generator.normal(size=rows).astype(np.float32),
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.random(rows) < 0.2,
        )
    return agent, state


def spec_of(agent, state):
    return agent._spec() if isinstance(agent, DQN) else agent._spec(state)


def tensors_of(agent, state):
    return {name: tensor.clone() for name, tensor in agent.export_state(state)[0].items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Plain data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "next_value", "policy_loss", "target_noise", "target_entropy"),
    [
        (SAC, {}, "soft", "soft", (0.0, 0.0), -2.0),
        (SAC, {"target_entropy": -0.5}, "soft", "soft", (0.0, 0.0), -0.5),
        (SAC, {"entropy_coefficient": 0.2}, "soft", "soft", (0.0, 0.0), None),
        (TD3, {"target_noise": 0.3, "target_noise_clip": 0.4}, "smoothed", "deterministic", (0.3, 0.4), None),
        (DDPG, {}, "deterministic", "deterministic", (0.0, 0.0), None),
        (DQN, {}, "double", "none", (0.0, 0.0), None),
        (DQN, {"double_q": False}, "maximum", "none", (0.0, 0.0), None),
        (DiscreteSAC, {}, "other", "other", (0.0, 0.0), 0.98 * np.log(4)),
    ],
)
def test_agents_say_their_equations_as_plain_data(kind, options, next_value, policy_loss, target_noise, target_entropy):
    spec = spec_of(*made(kind, rows=0, **options))
    assert (spec.next_value, spec.policy_loss) == (next_value, policy_loss)
    assert (spec.target_noise, spec.target_noise_clip) == target_noise
    assert spec.target_entropy == pytest.approx(target_entropy)


def test_an_equation_of_ones_own_is_another():
    class OwnTarget(SAC):
        def next_values(self, state, batch, key):
            return super().next_values(state, batch, key)

    class OwnFuture(TD3):
        def future_q(self, state, batch, next_actions):
            return super().future_q(state, batch, next_actions)

    class OwnLoss(SAC):
        def policy_loss(self, state, batch, key):
            return super().policy_loss(state, batch, key)

    class OwnFollowing(TD3):
        def after_policy_step(self, state, learned):
            pass

    class OwnChoice(DQN):
        def next_values(self, state, batch):
            return super().next_values(state, batch)

    class Renamed(SAC):
        """A subclass that changes no equation."""

    def first_only(target_critics, next_observations, next_actions):
        return target_critics(next_observations, next_actions)[0]

    for kind, expected in [
        (OwnTarget, ("other", "soft")),
        (OwnFuture, ("other", "deterministic")),
        (OwnLoss, ("soft", "other")),
        (OwnFollowing, ("smoothed", "other")),
        (OwnChoice, ("other", "none")),
        (Renamed, ("soft", "soft")),
    ]:
        spec = spec_of(*made(kind, rows=0))
        assert (spec.next_value, spec.policy_loss) == expected, kind
    assert spec_of(*made(q_future=first_only, rows=0)).next_value == "other"
    agent, state = made(rows=0)
    agent.next_values = lambda state, batch, key: None
    assert spec_of(agent, state).next_value == "other"


@pytest.mark.parametrize("kind", NAMES)
def test_the_default_networks_have_the_configs_layers_and_learn(kind):
    _, plain = made(kind, rows=0)
    agent, state = made(kind, activation="silu", layer_norm=True)
    networks = [state.critics] if kind is DQN else [state.critics, state.policy]
    for network, before in zip(networks, [plain.critics, plain.policy], strict=False):
        names = {type(module).__name__ for module in network.modules()}
        assert getattr(network, "activation", "") == "silu" or "SiLU" in names
        assert "ReLU" not in names
        assert len(list(network.parameters())) > len(list(before.parameters()))
    before = tensors_of(agent, state)
    assert state.engine.update(RandomKey(3), 0 if kind is DQN else 1).finite
    after = tensors_of(agent, state)
    learned = [name for name in after if name.startswith(("critics.", "policy."))]
    assert learned
    assert not any(torch.equal(before[name], after[name]) for name in learned)


@pytest.mark.parametrize("kind", NAMES)
def test_an_update_holds_the_states_own_parts(kind):
    agent, state = made(kind, rows=0)
    update = agent._update_parts(state)
    assert update.critics is state.critics
    assert update.target_critics is state.target_critics
    assert update.optimizers is state.optimizers
    assert update.replay is state.replay
    assert update.policy is (None if kind is DQN else state.policy)
    assert update.target_policy is getattr(state, "target_policy", None)
    assert update.first_action == (-1 if kind is DQN else None)
    learned = kind in (SAC, DiscreteSAC)
    assert (update.log_entropy_coefficient is not None) == learned
    assert "entropy_coefficient" in update.optimizers or not learned
    if kind is DQN:
        assert update.bounds is None
        assert update.entropy_coefficient() is None
        with pytest.raises(TypeError, match="no entropy coefficient"):
            update.set_entropy_coefficient(torch.ones(()))
        return
    assert torch.equal(update.bounds.half_range, (update.bounds.high - update.bounds.low) / 2)
    assert update.entropy_coefficient() is state.entropy_coefficient
    given = torch.tensor(0.25)
    update.set_entropy_coefficient(given)
    assert state.entropy_coefficient is given
    assert update.entropy_coefficient() is given


# A random subset of the target critics ----------------------------------------------------------------------


def test_a_subset_is_the_start_of_a_shuffle():
    for number in range(50):
        key = RandomKey(number)
        uniforms, numbers = key.uniform(5).tolist(), list(range(5))
        drawn = []
        for i in range(3):  # the same, by taking out instead of swapping
            place = int(uniforms[i] * (5 - i))
            drawn.append(numbers[i:][place])
            numbers[i], numbers[i + place] = numbers[i + place], numbers[i]
        assert random_subset(5, 3, key) == drawn
        assert sorted(random_subset(5, 5, key)) == [0, 1, 2, 3, 4]


def test_every_subset_is_equally_likely():
    counts = Counter(frozenset(random_subset(5, 2, key)) for key in RandomKey(7).split(5000))
    assert len(counts) == 10
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom, one in a thousand


@pytest.mark.parametrize("kind", [SAC, TD3, DDPG])
def test_the_target_takes_the_minimum_over_the_subset_drawn(kind):
    """Against the same agent without: the rest of its target is drawn with the other half of the key."""
    options = {"critics": 5, "target_noise": 0.3}
    agent, state = made(kind, critic_subset=2, **options)
    assert spec_of(agent, state).critic_subset == 2
    whole, whole_state = made(kind, **options)
    assert spec_of(whole, whole_state).critic_subset is None
    batch, seen = state.replay.sample(32), set()
    for number in range(20):
        key = RandomKey(number)
        subset_key, rest = key.split(2)
        members = random_subset(5, 2, subset_key)
        seen.add(frozenset(members))
        with torch.no_grad():
            values, everything = agent.next_values(state, batch, key), whole.next_values(whole_state, batch, rest)
        assert torch.equal(values.q, everything.q[members])
        assert (values.log_prob is None) == (kind is not SAC)
        if values.log_prob is not None:
            assert torch.equal(values.log_prob, everything.log_prob)
    assert len(seen) > 5
    assert state.engine.update(RandomKey(1), 1).finite


def test_a_subset_that_there_is_not_is_refused():
    for agent, critics, subset, says in [
        ("sac", "auto", 3, r"critic_subset is 3; it must be at most critics \(2\)"),
        ("ddpg", "auto", 2, r"critic_subset is 2; it must be at most critics \(1\)"),
        ("td3", 4, 5, r"critic_subset is 5; it must be at most critics \(4\)"),
        ("sac_discrete", 4, 2, "critic_subset is 2; agent 'sac_discrete' has no such ensemble"),
        ("dqn", "auto", 1, "agent 'dqn' has no such ensemble"),
    ]:
        with pytest.raises(ValueError, match=says):
            Hyperparameters(agent=agent, critics=critics, critic_subset=subset)
    with pytest.raises(ValueError, match="critic_subset is 2 and q_future is given"):
        made(q_future=lambda critics, o, a: critics(o, a), critic_subset=2)
    agent, state = made(critics=4, critic_subset=3)
    state.target_critics = TwinQ(3, 2, (16,), 2)
    with pytest.raises(ValueError, match="critic_subset is 3; there are 2 critics"):
        agent.next_values(state, state.replay.sample(32), RandomKey(0))


# Several updates ----------------------------------------------------------------------------------------------


def test_many_updates_are_one_after_the_other():
    agent, one = made(TD3)
    _, many = made(TD3)
    calls = [(RandomKey(number), number % 2, False) for number in range(5)]
    expected = [one.engine.update(*call) for call in calls]
    for count, result in enumerate(many.engine.update_many(calls)):
        assert torch.equal(result.critic_loss, expected[count].critic_loss)
        assert torch.equal(result.batch.handles, expected[count].batch.handles)
    assert count == 4
    assert_same(tensors_of(agent, one), tensors_of(agent, many))


class Spoiled(DDPG):
    """DDPG whose target is NaN in the updates given."""

    def __init__(self, config, bad=()):
        super().__init__(config)
        self.bad, self.asked = bad, 0

    def next_values(self, state, batch, key):
        values = super().next_values(state, batch, key)
        self.asked += 1
        return values._replace(q=values.q * float("nan")) if self.asked in self.bad else values


def test_many_updates_end_after_one_that_is_not_finite():
    agent, state = made(Spoiled)
    agent.bad = {2}
    results = list(state.engine.update_many([(RandomKey(number), 1, False) for number in range(4)]))
    assert [result.finite for result in results] == [True, False]
    assert agent.asked == 2


def walk(observation, action):
    return np.float32(0.9) * observation + np.float32(0.1) * action[:1], float(-(observation[0] ** 2))


def walk_feed():
    return FunctionFeed(
        walk,
        initial_observation=np.array([0.5], np.float32),
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        step_limit=10,
    )


def small(folder, steps, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "ddpg", "hidden_sizes": (16,), "batch_size": 8, "learning_starts": 20, "replay_capacity": 1000}
            | hyperparameters
        ),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(folder), tensorboard=False, checkpoint_interval=None),
    )


def watched(trainer):
    """How many updates each call of the trainer's engine was asked for, and the arguments of all of them."""
    engine = trainer.rl_state.agent_state.engine
    update_many, sizes, calls = engine.update_many, [], []

    def watch(given):
        sizes.append(len(given))
        calls.extend(given)
        return update_many(given)

    engine.update_many = watch
    return sizes, calls


@pytest.mark.parametrize(
    ("at_a_time", "updates_per_step", "sizes"),
    [
        (1, 1.0, [1] * 23),
        (5, 1.0, [5] * 4 + [3]),
        (23, 1.0, [23]),
        (100, 1.0, [23]),
        (3, 0.5, [3] * 3 + [2]),  # 11 of them: the 21st step has made half an update due
        (4, 2.5, [4] * 14 + [1]),  # 57: what one step leaves over joins the next one's
    ],
)
def test_updates_wait_until_enough_are_due_and_the_rest_comes_last(tmp_path, at_a_time, updates_per_step, sizes):
    config = small(tmp_path, 43, updates_per_call=at_a_time, updates_per_step=updates_per_step)
    trainer = AgentTrainer(config, walk_feed())
    asked, _ = watched(trainer)
    trainer.train()
    assert asked == sizes
    assert trainer.updates == sum(sizes)
    assert trainer.rl_state.agent_state.held_back == 0


def test_a_call_comes_no_earlier_than_its_last_update_is_due(tmp_path):
    config = small(tmp_path, 43, updates_per_call=5)
    agent = DDPG(config)
    state, _ = agent.init(
        RandomKey(0), observation_space=walk_feed().observation_space, action_space=walk_feed().action_space
    )
    state.replay.insert(*(np.zeros(shape, np.float32) for shape in [(43, 1), (43, 1), 43, (43, 1)]), np.zeros(43, bool))
    rl_state = RLState(state, None, RandomKey(1), 0, 0, None)
    taken = []
    for step in range(1, 36):
        state.steps = step
        rl_state = agent.optimize_model(rl_state)
        taken.append(state.updates)
    assert taken == [max(0, step - 20) // 5 * 5 for step in range(1, 36)]
    state.steps = 38
    assert agent.optimize_model(rl_state) == rl_state
    assert (state.updates, state.held_back) == (15, 3)
    agent.finish_updates(rl_state)
    assert (state.updates, state.held_back) == (18, 0)
    agent.finish_updates(rl_state)
    assert state.updates == 18


@pytest.mark.parametrize("updates_per_step", [1.0, 0.4, 1.5])
def test_the_count_is_exact_through_a_resume_and_policy_steps_keep_their_turn(tmp_path, updates_per_step):
    options = {"agent": "td3", "updates_per_call": 4, "updates_per_step": updates_per_step}
    exact = int(61 * Fraction(updates_per_step).limit_denominator(100)) - int(20 * Fraction(updates_per_step))
    first = AgentTrainer(small(tmp_path, 61, **options), walk_feed())
    _, whole = watched(first)
    first.train()
    # Interrupted in the middle of a call's worth: saved with what waits.
    part = AgentTrainer(small(tmp_path / "part", 61, **options), walk_feed())
    _, calls = watched(part)
    step, count = part.feed.step, []

    def cut(*arguments):
        count.append(None)
        if len(count) > 34:
            raise KeyError("cut here")
        return step(*arguments)

    part.feed.step = cut
    with pytest.raises(KeyError):
        part.train()
    held = part.rl_state.agent_state.held_back
    assert part.updates + held == int(34 * updates_per_step) - int(20 * updates_per_step)
    rest = AgentTrainer.resume(part.run_folder, feed=walk_feed())
    assert rest.rl_state.agent_state.held_back == held
    _, more = watched(rest)
    rest.train()
    assert rest.updates == first.updates == exact
    assert [steps for _, steps, _ in [*calls, *more]] == [steps for _, steps, _ in whole]
    assert rest.rl_state.agent_state.policy_updates == first.rl_state.agent_state.policy_updates


def test_an_older_checkpoint_has_none_that_wait():
    agent, state = made()
    tensors, values = agent.export_state(state)
    for name in LATER_COUNTERS:
        del values["counters"][name]
    state.held_back = 3
    agent.import_state(state, tensors, copy.deepcopy(values))
    assert state.held_back == 0


def test_after_a_skipped_update_the_rest_of_a_call_is_planned_anew(tmp_path):
    config = small(tmp_path, 44, updates_per_call=6, target_update_interval=2)
    agent = Spoiled(config, bad={2, 3, 9, 12})
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    engine, seen = trainer.rl_state.agent_state.engine, []
    update = engine.update

    def watch(key, policy_steps, copies):
        result = update(key, policy_steps, copies)
        seen.append((key, copies, result.finite))
        return result

    engine.update = watch
    trainer.train()
    assert len(seen) == len({key for key, _, _ in seen}) == 24
    assert (trainer.updates, trainer.skipped_updates) == (20, 4)
    taken = 0
    for _, copies, finite in seen:  # the second, fourth ... that is taken copies the targets
        assert copies == (taken % 2 == 1)
        taken += finite


def test_the_third_in_a_row_stops_in_the_middle_of_a_call(tmp_path):
    config = small(tmp_path, 60, updates_per_call=8)
    agent = Spoiled(config, bad={2, 3, 4})
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    with pytest.raises(LossNotFiniteError, match="critic loss is nan in 3 updates in a row"):
        trainer.train()
    assert agent.asked == 4
    assert (trainer.updates, trainer.skipped_updates) == (1, 3)


def test_the_engine_of_an_agent_is_torch_by_default():
    assert isinstance(made(rows=0)[1].engine, TorchEngine)


# Gradients that are not finite --------------------------------------------------------------------------------


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient has one entry that is not finite."""

    @staticmethod
    def forward(ctx, values, entry):
        ctx.entry = entry
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = ctx.entry
        return gradient, None


class SpoiledGradient(SAC):
    """SAC whose policy's loss is finite, and its gradient is not, in the policy steps given."""

    bad: tuple[int, ...] = ()
    asked = 0

    def policy_loss(self, state, batch, key):
        learned = super().policy_loss(state, batch, key)
        self.asked += 1
        return (
            learned._replace(loss=BadGradient.apply(learned.loss, float("inf"))) if self.asked in self.bad else learned
        )


def spoil_critics(state, entry):
    """Critics whose q values are as they were, and whose gradients have one entry that is not finite."""
    forward = state.critics.forward
    state.critics.forward = lambda *given: BadGradient.apply(forward(*given), entry)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
def test_a_critic_gradient_that_is_not_finite_stops_the_update_before_its_step(entry, max_gradient_norm):
    agent, state = made(max_gradient_norm=max_gradient_norm)
    assert state.engine.update(RandomKey(0), 1).finite
    spoil_critics(state, entry)
    before, priorities = tensors_of(agent, state), []
    state.replay.update_priorities = lambda *given: priorities.append(given)
    result = state.engine.update(RandomKey(1), 1)
    assert not result.finite
    assert torch.isfinite(result.critic_loss)
    assert result.policy_loss is None
    assert priorities == []
    after = tensors_of(agent, state)
    for name, tensor in before.items():  # the replay has counted a draw
        assert torch.equal(tensor, after[name]) or name.startswith("replay."), name
    assert all(parameter.grad is None for parameter in state.critics.parameters())


def test_a_policy_gradient_that_is_not_finite_leaves_the_critics_step_and_nothing_behind():
    agent, state = made(SpoiledGradient)
    agent.bad = (2,)
    assert state.engine.update(RandomKey(0), 1).finite
    before, priorities = tensors_of(agent, state), []
    state.replay.update_priorities = lambda *given: priorities.append(given)
    result = state.engine.update(RandomKey(1), 1)
    assert not result.finite
    assert torch.isfinite(result.policy_loss)
    assert priorities == []
    after = tensors_of(agent, state)
    for name, tensor in before.items():
        if name.startswith(("policy.", "target_critics.", "optimizers.policy.", "log_entropy", "optimizers.entropy")):
            assert torch.equal(tensor, after[name]), name
        if name.startswith(("critics.", "optimizers.critics.")):
            assert not torch.equal(tensor, after[name]), name
    assert all(parameter.requires_grad for parameter in state.critics.parameters())


def test_gradients_whose_squares_overflow_are_finite():
    _, state = made(DDPG, replay="uniform")
    before = [parameter.clone() for parameter in state.critics.parameters()]
    hook = state.critics.weights[-1].register_hook(lambda gradient: torch.full_like(gradient, 1e19))
    assert state.engine.update(RandomKey(0), 1).finite
    hook.remove()
    assert not any(torch.equal(old, new) for old, new in zip(before, state.critics.parameters(), strict=True))


def test_the_third_gradient_in_a_row_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    config = small(tmp_path, 60)
    trainer = AgentTrainer(config, walk_feed())
    spoil_critics(trainer.rl_state.agent_state, float("nan"))
    with pytest.raises(LossNotFiniteError, match="the critic gradient is not finite in 3 updates in a row"):
        trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (0, 3)
    config = small(tmp_path, 60, agent="sac")
    agent = SpoiledGradient(config)
    agent.bad = (3, 5, 6, 7)
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    with pytest.raises(LossNotFiniteError, match="the policy gradient is not finite in 3 updates in a row"):
        trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (3, 4)
