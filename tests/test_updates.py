"""Updates on the torch engine: several in one call, and those with gradients that are not finite."""

from __future__ import annotations

import copy
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch
from engine_parts import assert_same, made, small, tensors_of, walk_feed

from angle_rl.agents import DDPG, SAC, TD3
from angle_rl.agents.state import LATER_COUNTERS, LossNotFiniteError
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey, RLState


class Spoiled(DDPG):
    """DDPG whose target is NaN in the updates given."""

    def __init__(self, config, bad=()):
        super().__init__(config)
        self.bad, self.asked = bad, 0

    def next_values(self, state, batch, key):
        values = super().next_values(state, batch, key)
        self.asked += 1
        return values._replace(q=values.q * float("nan")) if self.asked in self.bad else values


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


def test_many_updates_end_after_one_that_is_not_finite():
    agent, state = made(Spoiled)
    agent.bad = {2}
    results = list(state.engine.update_many([(RandomKey(number), 1, False) for number in range(4)]))
    assert [result.finite for result in results] == [True, False]
    assert agent.asked == 2


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


def test_what_waits_is_taken_at_the_end_of_a_run_by_episodes_too_and_kept_by_an_interrupt(tmp_path):
    trainer = AgentTrainer(small(tmp_path, 100, updates_per_call=7), walk_feed())
    trainer.train(num_episodes=4)  # of 10 steps
    assert (trainer.updates, trainer.rl_state.agent_state.held_back) == (20, 0)
    trainer = AgentTrainer(small(tmp_path, 100, updates_per_call=7), walk_feed())
    step, count = trainer.feed.step, []

    def interrupting(*arguments):
        count.append(None)
        if len(count) == 40:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    trainer.feed.step = interrupting
    assert trainer.train() is None
    assert (trainer.steps, trainer.updates, trainer.rl_state.agent_state.held_back) == (40, 14, 6)
    rest = AgentTrainer.resume(trainer.run_folder, feed=walk_feed())
    rest.train()
    assert (rest.steps, rest.updates) == (100, 80)


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
