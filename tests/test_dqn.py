"""DQN: targets, losses and priorities against NumPy, its target network, keys, checkpoints, and a chain to learn."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import DQN, Agent
from angle_rl.agents.state import LossNotFiniteError
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.models import QNetwork
from angle_rl.replay import PrioritizedReplayBuffer
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey, RLState, reset_state

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Discrete(4, start=-1)


def config(folder="runs", *, training=None, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "dqn", "hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000, "learning_starts": 0}
            | hyperparameters
        ),
        training=Training(
            **{"steps": 2_000, "evaluation_interval": None, "evaluation_episodes": 1, "engine": "torch"}
            | (training or {})
        ),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False),
    )


def made(observation_space=OBSERVATIONS, action_space=ACTIONS, *, critics=None, rows=200, **hyperparameters):
    """An agent and its state, with random transitions in the replay and a target network unlike the online one."""
    agent = DQN(config(**hyperparameters))
    state, _ = agent.init(RandomKey(1), observation_space=observation_space, action_space=action_space, critics=critics)
    generator = np.random.default_rng(0)
    if rows:
        state.replay.insert(
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.integers(-1, 3, rows),
            generator.normal(size=rows).astype(np.float32),
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.random(rows) < 0.3,
        )
        with torch.no_grad():
            for parameter in state.target_critics.parameters():
                parameter.add_(torch.from_numpy(generator.normal(size=parameter.shape).astype(np.float32)), alpha=0.3)
    return agent, state


def values_of(network, observations):
    with torch.no_grad():
        return network(observations).numpy().astype(np.float64)


def here(state, n=1, *, key=0):
    observation = np.random.default_rng(5).normal(size=(n, 3)).astype(np.float32)
    return RLState(state, reset_state(observation, n), RandomKey(key), 0, 0, None)


def tensors_of(agent, state):
    return {name: tensor.clone() for name, tensor in agent.export_state(state)[0].items()}


# The equations ------------------------------------------------------------------------------------------------


def test_it_is_an_agent():
    assert isinstance(DQN(config()), Agent)


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("dueling", [True, False])
@pytest.mark.parametrize(("huber_delta", "replay"), [(None, "prioritized"), (0.5, "prioritized"), (0.5, "uniform")])
def test_an_update_follows_the_equations(monkeypatch, double_q, dueling, huber_delta, replay):
    _, state = made(
        double_q=double_q, dueling=dueling, huber_delta=huber_delta, replay=replay, learning_rate=0.01, tau=0.25
    )
    assert isinstance(state.critics, QNetwork)
    assert state.critics.dueling == dueling
    written = []
    if replay == "prioritized":
        state.replay.update_priorities(np.arange(200), np.linspace(0.1, 5, 200, dtype=np.float32))
        keep = PrioritizedReplayBuffer.update_priorities
        monkeypatch.setattr(
            PrioritizedReplayBuffer, "update_priorities", lambda *given: written.append(given[1:]) or keep(*given)
        )
    critics, target_critics = copy.deepcopy(state.critics), copy.deepcopy(state.target_critics)
    result = state.engine.update(RandomKey(0), 0)

    batch = result.batch
    next_online, next_target = (values_of(net, batch.next_observations) for net in (critics, target_critics))
    taken, target, differs = np.empty(32), np.empty(32), 0
    for row in range(32):
        best = np.argmax((next_online if double_q else next_target)[row])
        differs += best != np.argmax(next_target[row])
        # 1-step rows: the discount is 0.99, or 0 after a true end.
        assert float(batch.discounts[row]) in (0.0, pytest.approx(0.99))
        target[row] = float(batch.rewards[row]) + float(batch.discounts[row]) * next_target[row, best]
        taken[row] = values_of(critics, batch.observations)[row, int(batch.actions[row]) + 1]
    assert (differs > 0) == double_q
    assert 0 < int((batch.discounts == 0).sum()) < 32
    size = np.abs(target - taken)
    error = size**2 if huber_delta is None else np.where(size <= 0.5, size**2 / 2, 0.5 * (size - 0.25))
    weights = batch.importance_weights.numpy().astype(float)
    assert (weights.min() < 1) == (replay == "prioritized")
    assert float(result.critic_loss) == pytest.approx((weights * error).mean(), rel=1e-4)
    assert np.allclose(result.q.numpy(), taken[None], atol=1e-5)
    if replay == "prioritized":
        ((handles, td_error),) = written
        assert torch.equal(torch.as_tensor(handles), batch.handles)
        assert np.allclose(np.asarray(td_error), size, atol=1e-5)

    # The same step with autograd and Adam, and the soft step of the targets.
    q = critics(batch.observations)[torch.arange(32), batch.actions + 1]
    difference = (q - torch.from_numpy(target)).abs()
    loss = (
        difference.square()
        if huber_delta is None
        else torch.nn.functional.huber_loss(q.double(), torch.from_numpy(target), reduction="none", delta=0.5)
    )
    optimizer = torch.optim.Adam(critics.parameters(), lr=0.01)
    (loss * torch.from_numpy(weights)).mean().backward()
    optimizer.step()
    for expected, ours, old, slow in zip(
        critics.parameters(),
        state.critics.parameters(),
        target_critics.parameters(),
        state.target_critics.parameters(),
        strict=True,
    ):
        assert torch.allclose(expected, ours, atol=1e-4)
        assert torch.allclose(0.75 * old + 0.25 * ours, slow, atol=1e-6)


def test_n_step_targets_sum_rewards_and_stop_at_a_true_end():
    """Five steps in a row, the last one terminal: rows of up to three rewards, and what remains of the future."""
    agent, state = made(rows=0, n_step=3, discount=0.5, replay="uniform", batch_size=64)
    rewards = np.array([1, 2, 4, 8, 16], np.float32)
    observations = np.arange(18, dtype=np.float32).reshape(6, 3) / 10
    for i in range(5):
        state.replay.insert(observations[i : i + 1], [0], rewards[i : i + 1], observations[i + 1 : i + 2], [i == 4])
    batch = state.replay.sample(64)
    future = agent.next_values(state, batch)
    target = batch.rewards + batch.discounts * future.q[0]
    q = values_of(state.target_critics, torch.from_numpy(observations))
    expected = {0: 1 + 1 + 1 + q[3].max() / 8, 1: 2 + 2 + 2 + q[4].max() / 8, 2: 4 + 4 + 4, 3: 8 + 8, 4: 16}
    rows = (batch.observations[:, 0] * 10 / 3).round().int().tolist()
    assert set(rows) == set(expected)
    for row, value in zip(rows, target.tolist(), strict=True):
        assert value == pytest.approx(expected[row], abs=1e-5)


# Targets, counts, meta ----------------------------------------------------------------------------------------


def stepped(agent, state, steps, *, key=0):
    """The runner's loop on random transitions; after each step its number and whether the target is the online net."""
    generator = np.random.default_rng(9)
    rl_state, equal = here(state, key=key), []
    for _ in range(steps):
        action, rl_state = agent.select_action(rl_state, rl_state.iteration)
        after = reset_state(generator.normal(size=(1, 3)).astype(np.float32), 1)
        after = after._replace(stepped=np.array([True]), reward=generator.normal(size=1))
        next_state = rl_state._replace(environment_state=after)
        rl_state = agent.record_observation(rl_state, action, after.reward, after.terminated, next_state)
        rl_state = agent.optimize_model(rl_state)
        pairs = zip(state.critics.parameters(), state.target_critics.parameters(), strict=True)
        equal.append(all(torch.equal(*pair) for pair in pairs))
    return rl_state, equal


def test_targets_are_copied_every_interval():
    agent, state = made(rows=0, target_update_interval=4, batch_size=2)
    before = [parameter.clone() for parameter in state.target_critics.parameters()]
    _, equal = stepped(agent, state, 3)
    assert equal == [False] * 3
    for old, now in zip(before, state.target_critics.parameters(), strict=True):
        assert torch.equal(old, now)
    _, equal = stepped(agent, state, 6)
    assert equal == [True, False, False, False, True, False]


@pytest.mark.parametrize(("per_step", "updates"), [(1, 6), (0.5, 3), (2, 12)])
def test_updates_follow_the_steps_after_learning_starts(per_step, updates):
    agent, state = made(rows=0, learning_starts=4, updates_per_step=per_step, batch_size=2)
    before = tensors_of(agent, state)
    stepped(agent, state, 4)
    assert state.updates == 0
    assert torch.equal(before["critics.body.0.weight"], state.critics.body[0].weight)
    stepped(agent, state, 6)
    assert (state.steps, state.updates, len(state.replay)) == (10, updates, 10)


def test_the_meta_step_sees_the_newest_batch():
    class Meta:
        calls = ()

        def update_meta_learning_model(self, states, q):
            self.calls += ((states.shape, q.shape),)

    agent = DQN(config(meta_update_interval=3, batch_size=2))
    state, _ = agent.init(RandomKey(0), observation_space=OBSERVATIONS, action_space=ACTIONS, meta=Meta())
    stepped(agent, state, 7)
    assert state.meta.calls == (((2, 3), (1, 2)),) * 2


# Losses that are not finite ------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped_and_the_third_in_a_row_raises():
    agent, state = made(batch_size=8)
    with torch.no_grad():
        state.critics.advantages[-1].bias.fill_(torch.nan)
    rl_state = here(state)
    before = tensors_of(agent, state)
    for count in (1, 2):
        state.steps += 1
        agent.optimize_model(rl_state)
        assert (state.skipped_updates, state.updates) == (count, 0)
    after = tensors_of(agent, state)
    for name in before:
        if not name.startswith("replay."):
            assert torch.equal(before[name], after[name]) or "bias" in name, name
    state.steps += 1
    with pytest.raises(LossNotFiniteError, match="critic loss is nan in 3 updates in a row"):
        agent.optimize_model(rl_state)


# Acting and keys ----------------------------------------------------------------------------------------------


def test_actions_are_greedy_mixed_with_uniform_ones_and_come_from_the_key():
    agent, state = made(exploration_epsilon=0.4)
    rl_state = here(state, 4_000, key=3)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    actions, after = agent.select_action(rl_state, 0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert actions.dtype == np.int64
    assert actions.shape == (4_000,)
    greedy = values_of(state.critics, torch.from_numpy(rl_state.environment_state.observation)).argmax(1) - 1
    assert np.mean(actions == greedy) == pytest.approx(0.6 + 0.4 / 4, abs=0.03)
    assert set(actions[actions != greedy].tolist()) == {-1, 0, 1, 2}
    assert np.array_equal(agent.select_action(rl_state, 0)[0], actions)
    assert not np.array_equal(agent.select_action(after, 0)[0], actions)


def test_actions_are_uniform_until_learning_starts():
    agent, state = made(learning_starts=10, exploration_epsilon=0.0)
    rl_state = here(state, 4_000)
    counts = np.bincount(agent.select_action(rl_state, 0)[0] + 1, minlength=4)
    assert counts == pytest.approx([1000] * 4, abs=120)
    state.steps = 10
    greedy = values_of(state.critics, torch.from_numpy(rl_state.environment_state.observation)).argmax(1) - 1
    assert np.array_equal(agent.select_action(rl_state, 0)[0], greedy)
    policy_actions, log_prob = state.policy.sample_actions(
        torch.from_numpy(rl_state.environment_state.observation), True
    )
    assert np.array_equal(policy_actions.numpy(), greedy)
    assert log_prob.shape == (4_000,)


def test_the_same_key_makes_the_same_networks_and_another_key_others():
    def first(key):
        state, _ = DQN(config()).init(RandomKey(key), observation_space=OBSERVATIONS, action_space=ACTIONS)
        return state.critics.body[0].weight

    before = torch.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(before, torch.get_rng_state())


# Refusals -----------------------------------------------------------------------------------------------------


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match="q_future is given; DQN has no q_future"):
        DQN(config(), q_future=max)
    given = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    for change, error, says in [
        ({"action_space": spaces.Box(-1, 1, (1,))}, ValueError, "DQN needs finitely many actions"),
        ({"policy": torch.nn.Linear(1, 1)}, ValueError, "policy is given; DQN has no policy"),
        ({"critics": max}, TypeError, "critics is a builtin_function_or_method"),
        ({"observation_space": spaces.Text(4)}, ValueError, "Text"),
        ({"replay": 3}, TypeError, "replay is a int"),
    ]:
        with pytest.raises(error, match=says):
            DQN(config()).init(RandomKey(0), **(given | change))


def test_a_network_of_one_s_own_serves_and_its_shape_is_checked():
    agent, state = made(critics=torch.nn.Linear(3, 4))
    stepped(agent, state, 3)
    assert state.updates == 3
    _, state = made(critics=torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"critics gave shape \[32, 5\]; it must be \[32, 4\]"):
        state.engine.update(RandomKey(0), 0)


# Checkpoints --------------------------------------------------------------------------------------------------


def test_a_restored_state_goes_on_bit_for_bit():
    options = {"dueling": True, "target_update_interval": 7, "n_step": 2, "rows": 0, "exploration_epsilon": 0.5}
    agent, state = made(**options)
    stepped(agent, state, 15)
    tensors, values = tensors_of(agent, state), agent.export_state(state)[1]
    other_agent, other = made(**options)
    other_agent.import_state(other, tensors, copy.deepcopy(values))
    assert (other.steps, other.updates) == (state.steps, state.updates) == (15, 15)
    stepped(agent, state, 10, key=4)
    stepped(other_agent, other, 10, key=4)
    ours, theirs = tensors_of(agent, state), tensors_of(other_agent, other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert any(name.startswith("optimizers.critics.") for name in ours)
    assert any(not torch.equal(ours[name], tensors[name]) for name in ours if name.startswith("critics."))


def test_an_import_that_does_not_fit_changes_nothing():
    agent, state = made(batch_size=4)
    stepped(agent, state, 3)
    tensors, values = tensors_of(agent, state), agent.export_state(state)[1]
    stepped(agent, state, 3)
    now, counts = tensors_of(agent, state), (state.steps, state.updates)
    weight = "critics.body.0.weight"
    slot = next(name for name in tensors if name.endswith("0.exp_avg"))
    for bad_tensors, bad_values, says in [
        ({k: t for k, t in tensors.items() if k != weight}, values, f"has no {weight}"),
        (tensors | {weight: torch.zeros(2, 2)}, values, f"{weight} has shape"),
        (tensors | {slot: torch.zeros(7)}, values, r"exp_avg has shape \[7\]"),
        (tensors | {"optimizers.critics.99.exp_avg": torch.zeros(7)}, values, "optimizer has"),
        (tensors | {"policy.weight": torch.zeros(1)}, values, "holds policy.weight"),
        (tensors, values | {"counters": {}}, "has no steps"),
        (tensors, {"counters": values["counters"]}, "has no replay"),
    ]:
        with pytest.raises(ValueError, match=says):
            agent.import_state(state, bad_tensors, bad_values)
        assert counts == (state.steps, state.updates)
        for name, tensor in tensors_of(agent, state).items():
            assert torch.equal(tensor, now[name]), name


# Whole runs ---------------------------------------------------------------------------------------------------


class Corridor(gymnasium.Env):
    """Places 0 to 3 as a Dict of a picture and a number: action 5 leads on and pays 1 at the end, 4 pays 0.1."""

    observation_space = spaces.Dict(
        picture=spaces.Box(0, 255, (6, 6, 1), np.uint8), place=spaces.Discrete(4), odd=spaces.MultiDiscrete([2, 2])
    )
    action_space = spaces.Discrete(2, start=4)

    def show(self):
        picture = np.zeros((6, 6, 1), np.uint8)
        picture[self.place] = 255
        return {"picture": picture, "place": self.place, "odd": np.array([self.place % 2, self.steps % 2])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        ended = bool(action == 5 and self.place == 3)
        reward = 0.1 if action == 4 else float(ended)
        self.place = min(self.place + int(action) - 4, 3)
        return self.show(), reward, ended, self.steps >= 10 and not ended, {}


def test_a_corridor_is_learned_from_nested_observations(tmp_path):
    """Against the optimum by hand: 1 at the end, 0.7 of what follows before; 0.1 for staying is worth less."""
    trainer = AgentTrainer(
        config(
            tmp_path,
            training={"steps": 1_200, "parallel_environments": 2},
            discount=0.7,
            learning_starts=100,
            learning_rate=3e-3,
            exploration_epsilon=0.5,
            target_update_interval=40,
            dueling=True,
            updates_per_step=0.5,
        ),
        feed=Corridor,
    )
    evaluation = trainer.train()
    assert evaluation.returns == (1.0,)
    assert trainer.updates == 550
    environment = Corridor()
    observation, _ = environment.reset(seed=0)
    for best in (0.7**3, 0.7**2, 0.7, 1.0):
        tree = {name: torch.as_tensor(np.asarray(value)[None]) for name, value in observation.items()}
        q = values_of(trainer.critics, tree)[0]
        assert q[1] == pytest.approx(best, abs=0.05)
        assert q[1] > q[0]
        observation, *_ = environment.step(np.int64(5))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    class TenSteps(Corridor):
        def step(self, action):
            observation, reward, _, _, infos = super().step(action)
            return observation, reward, False, self.steps >= 10, infos

    options = {"batch_size": 8, "learning_starts": 5}
    whole = AgentTrainer(config(tmp_path / "whole", training={"steps": 60}, **options), feed=TenSteps)
    whole.train()
    part = AgentTrainer(config(tmp_path / "part", training={"steps": 30}, **options), feed=TenSteps)
    part.train()
    rest = AgentTrainer(config(tmp_path / "rest", training={"steps": 60}, **options), feed=TenSteps)
    rest.load(part.run_folder)
    rest.train()
    ours = tensors_of(whole.agent, whole.rl_state.agent_state)
    theirs = tensors_of(rest.agent, rest.rl_state.agent_state)
    for name in ours:
        # Rows that follow a resume go to streams of their own, which is all that may differ.
        assert torch.equal(ours[name], theirs[name]) or name.startswith("replay."), name


def test_a_linear_learning_rate_falls_to_nothing_at_the_last_step():
    agent, state = made(learning_rate=0.02, learning_rate_schedule="linear")
    for steps, share in ((1, 1 - 1 / 2000), (1500, 0.25), (2000, 0.0), (2100, 0.0)):
        before = copy.deepcopy(state.critics.state_dict())
        state.steps, state.learned_steps = steps, steps - 1
        agent.optimize_model(RLState(state, None, RandomKey(steps), 0, 0, None))
        assert state.optimizers["critics"].param_groups[0]["lr"] == pytest.approx(0.02 * share)
        unchanged = [torch.equal(before[name], now) for name, now in state.critics.state_dict().items()]
        assert all(unchanged) if share == 0 else not any(unchanged)


def test_the_interval_of_the_targets_counts_environment_steps():
    agent, state = made(target_update_interval=10, updates_per_step=0.5, learning_starts=4, batch_size=2)
    asked = []
    update = state.engine.update

    def watch(key, policy_steps, copy_targets):
        asked.append(copy_targets)
        return update(key, policy_steps, copy_targets)

    state.engine.update = watch
    state.steps = 44
    agent.optimize_model(RLState(state, None, RandomKey(1), 0, 0, None))
    assert len(asked) == 20
    assert [number for number, copied in enumerate(asked, 1) if copied] == [5, 10, 15, 20]
