"""The trainer: order of calls, seeds, evaluation, resume, and what goes wrong."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import SAC, TD3
from angle_rl.agents.state import LossNotFiniteError
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.evaluation import interrupts
from angle_rl.feed import FunctionFeed
from angle_rl.models import PolicyModel
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.trainer import AgentTrainer

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


def walk(observation, action):
    """A point that the action moves, punished for its distance from 0."""
    observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
    return observation, -float(np.abs(observation).sum())


def walk_feed(function=walk, step_limit=10, **options):
    return FunctionFeed(
        function,
        initial_observation=np.array([0.5], np.float32),
        action_space=BOX,
        step_limit=step_limit,
        **options,
    )


def small(folder, steps=120, seed=0, hyperparameters=None, training=None, **service):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"hidden_sizes": (16,), "batch_size": 8, "learning_starts": 20, "replay_capacity": 1000}
            | (hyperparameters or {})
        ),
        training=Training(
            **{"steps": steps, "seed": seed, "evaluation_interval": None, "evaluation_episodes": 2} | (training or {})
        ),
        service=Service(run_folder=str(folder), tensorboard=False, **service),
    )


def parameters(trainer):
    networks = [trainer.policy, trainer.critics, trainer.target_critics, trainer.target_policy]
    return {
        f"{number}.{name}": tensor.clone()
        for number, network in enumerate(networks)
        if network is not None
        for name, tensor in network.state_dict().items()
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# The loop -----------------------------------------------------------------------------------------------------


class Recorder(SAC):
    """SAC that writes down which callback saw what."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = []

    def init(self, random_key, **options):
        self.calls.append("init")
        return super().init(random_key, **options)

    def reset(self, random_key, rl_state):
        self.calls.append(("reset", rl_state.episode, rl_state.environment_state.stepped.tolist()))
        return super().reset(random_key, rl_state)

    def select_action(self, rl_state, iteration):
        self.calls.append(("select_action", iteration))
        return super().select_action(rl_state, iteration)

    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        assert next_rl_state.iteration == rl_state.iteration
        self.calls.append("record_observation")
        return super().record_observation(rl_state, action, reward, terminated, next_rl_state)

    def optimize_model(self, rl_state):
        self.calls.append("optimize_model")
        return super().optimize_model(rl_state)


def test_the_callbacks_come_in_order_and_reset_sees_the_old_episode(tmp_path):
    config = small(tmp_path, steps=6, hyperparameters={"learning_starts": 4})
    agent = Recorder(config)
    AgentTrainer(config, walk_feed(step_limit=3), agent=agent).train()
    step = lambda iteration: [("select_action", iteration), "record_observation", "optimize_model"]  # noqa: E731
    episode = [*step(0), *step(1), *step(2)]
    resets = [("reset", 0, [False]), ("reset", 0, [True]), ("reset", 1, [True])]
    assert agent.calls == ["init", resets[0], *episode, resets[1], *episode, resets[2]]


class MetaRecorder:
    def __init__(self):
        self.calls = []
        self.trainer = None

    def update_meta_learning_model(self, states, q):
        self.calls.append((self.trainer.rl_state.agent_state.steps, tuple(states.shape), tuple(q.shape)))
        assert not q.requires_grad


@pytest.mark.parametrize(
    ("interval", "environments", "expected"),
    [
        (None, 1, []),
        (7, 1, [21, 28, 35]),
        (3, 4, [24, 24, 28, 32, 36, 36]),  # 4 steps at a time: multiples 21, 24 | 27 | 30 | 33, 36
        (1, 1, list(range(21, 37))),
    ],
)
def test_the_meta_step_fires_as_often_as_its_multiple_is_crossed(tmp_path, interval, environments, expected):
    config = small(
        tmp_path,
        steps=36,
        hyperparameters={"meta_update_interval": interval},
        training={"parallel_environments": environments},
    )
    meta = MetaRecorder()
    trainer = AgentTrainer(config, walk_feed(num_environments=environments), meta=meta)
    meta.trainer = trainer
    assert trainer.meta is meta
    trainer.train()
    assert [steps for steps, _, _ in meta.calls] == expected
    assert all(shapes == ((8, 1), (2, 8)) for _, *shapes in meta.calls for shapes in [tuple(shapes)])


@pytest.mark.parametrize(
    ("agent", "ratio", "interval", "environments", "updates", "policy_updates"),
    [
        ("sac", 1.0, "auto", 1, 80, 80),
        ("sac", 2.0, "auto", 1, 160, 160),
        ("sac", 2.0, 1, 1, 160, 80),
        ("sac", 0.5, "auto", 1, 40, 40),
        ("sac", 0.5, 1, 1, 40, 80),
        ("sac", 1.0, None, 1, 80, 0),
        ("sac", 1.0, 8, 4, 80, 10),
        ("td3", 1.0, "auto", 4, 80, 40),
        ("td3", 0.25, 4, 2, 20, 20),
    ],
)
def test_updates_and_policy_steps_follow_the_environment_steps(
    tmp_path, agent, ratio, interval, environments, updates, policy_updates
):
    config = small(
        tmp_path,
        steps=100,
        hyperparameters={"agent": agent, "updates_per_step": ratio, "policy_update_interval": interval},
        training={"parallel_environments": environments},
    )
    trainer = AgentTrainer(config, walk_feed(num_environments=environments))
    trainer.train()
    assert trainer.steps == len(trainer.replay) == 100
    assert trainer.updates == updates
    assert trainer.rl_state.agent_state.policy_updates == policy_updates
    assert trainer.skipped_updates == 0


class HaltingFeed:
    """A feed of two environments, of which the second spends every other step on a reset."""

    def __init__(self):
        self.inner = walk_feed(num_environments=2)
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space
        self.num_environments, self.name, self.odd = 2, "halting", False

    def init(self, random_key):
        return self.inner.init(random_key)

    def reset(self, random_key, environment_state):
        return self.inner.reset(random_key, environment_state)

    def step(self, random_key, environment_state, actions):
        seen, random_key = self.inner.step(random_key, environment_state, actions)
        self.odd = not self.odd
        return seen._replace(stepped=np.array([True, self.odd])), random_key

    def close(self):
        pass


def test_steps_count_transitions_and_not_resets(tmp_path):
    trainer = AgentTrainer(small(tmp_path, steps=60), HaltingFeed(), evaluation_feed=walk_feed())
    trainer.train()
    assert trainer.steps == len(trainer.replay) == trainer.replay.stats()["inserts"] == 60
    assert trainer.updates == 40


def test_random_actions_until_learning_starts(tmp_path):
    actions = []

    def function(observation, action):
        actions.append(float(action[0]))
        return walk(observation, action)

    trainer = AgentTrainer(small(tmp_path, steps=201, hyperparameters={"learning_starts": 200}), walk_feed(function))
    with torch.no_grad():
        for parameter in trainer.policy.head.parameters():
            parameter.fill_(3.0)  # acts near the upper bound
    trainer.train()
    assert abs(np.mean(actions[:200])) < 0.15
    assert np.std(actions[:200]) == pytest.approx(1 / np.sqrt(3), rel=0.1)
    assert actions[200] > 0.9


# Seeds --------------------------------------------------------------------------------------------------------


class OwnPolicy(PolicyModel):
    """A user's policy: its sample_actions draws from torch's default generator."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, observations):
        mean, log_std = self.linear(observations).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def sample_actions(self, observations, deterministic=False):
        mean, log_std = self(observations)
        draw = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
        raw = mean + log_std.exp() * draw
        normal = torch.distributions.Normal(mean, log_std.exp())
        log_prob = (normal.log_prob(raw) - torch.log(1 - raw.tanh() ** 2 + 1e-6)).sum(-1)
        return raw.tanh(), log_prob


def own_policy():
    torch.manual_seed(3)
    return OwnPolicy()


@pytest.mark.parametrize("agent", ["sac", "td3"])
@pytest.mark.parametrize("replay", ["prioritized", "uniform"])
@pytest.mark.parametrize("policy", [lambda: None, own_policy], ids=["default", "own"])
def test_the_seed_decides_everything_and_global_generators_are_left_alone(tmp_path, agent, replay, policy):
    def run(seed, disturb):
        chosen = policy()
        torch.manual_seed(disturb)
        np.random.seed(disturb)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        config = small(tmp_path, seed=seed, hyperparameters={"agent": agent, "replay": replay})
        trainer = AgentTrainer(config, walk_feed(), policy=chosen)
        trainer.train()
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
        return parameters(trainer)

    first, second, other = run(5, 1), run(5, 2), run(6, 1)
    assert_same(first, second)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_evaluating_does_not_change_training(tmp_path):
    quiet = AgentTrainer(small(tmp_path), walk_feed())
    quiet.train()
    busy = AgentTrainer(small(tmp_path, training={"evaluation_interval": 7}), walk_feed())
    busy.evaluate(1)
    busy.train()
    assert_same(parameters(quiet), parameters(busy))


def test_evaluation_runs_whole_episodes_from_the_same_states(tmp_path):
    feed = FunctionFeed(
        lambda observation, action: (observation, float(observation[0])),
        initial_observation=lambda key: key.uniform(1).numpy().astype(np.float32),
        action_space=BOX,
        step_limit=5,
    )
    trainer = AgentTrainer(small(tmp_path), feed)
    first, second = trainer.evaluate(3), trainer.evaluate(3)
    assert first == second
    assert first.lengths == (5, 5, 5)
    assert len(set(first.returns)) == 3
    assert first.mean_return == pytest.approx(np.mean(first.returns))
    with pytest.raises(ValueError, match="episodes is 0"):
        trainer.evaluate(0)


# Checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["sac", "td3"])
@pytest.mark.parametrize("replay", ["prioritized", "uniform"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, agent, replay):
    options = {"agent": agent, "replay": replay, "replay_capacity": 50}
    whole = AgentTrainer(small(tmp_path / "whole", steps=120, hyperparameters=options), walk_feed())
    whole.train()
    half = AgentTrainer(small(tmp_path / "half", steps=70, hyperparameters=options), walk_feed())
    half.train()
    config = small(tmp_path / "half", steps=120, hyperparameters=options)
    resumed = AgentTrainer.resume(half.run_folder, config, feed=walk_feed())
    assert (resumed.steps, resumed.updates) == (70, 50)
    assert_same(parameters(half), parameters(resumed))
    resumed.train()
    assert resumed.run_folder == half.run_folder
    assert (resumed.steps, resumed.updates, resumed.rl_state.episode) == (120, 100, 12)
    assert_same(parameters(whole), parameters(resumed))
    for name, optimizer in whole.optimizers.items():
        state, other = optimizer.state_dict()["state"], resumed.optimizers[name].state_dict()["state"]
        for index, slots in state.items():
            assert_same(slots, other[index])


def test_falling_learning_rates_fall_on_from_a_checkpoint(tmp_path):
    options = {"learning_rate": 0.01, "learning_rate_schedule": "linear"}
    whole = AgentTrainer(small(tmp_path / "whole", hyperparameters=options, checkpoint_interval=70), walk_feed())
    whole.train()
    rest = AgentTrainer(small(tmp_path / "rest", hyperparameters=options), walk_feed())
    rest.load(whole.run_folder / "checkpoints" / "step-00000070")
    assert rest.steps == 70
    rest.train()
    assert rest.steps == 120
    assert_same(parameters(whole), parameters(rest))
    assert [optimizer.param_groups[0]["lr"] for optimizer in rest.optimizers.values()] == [0.0] * 3


def test_save_and_load(tmp_path):
    trainer = AgentTrainer(small(tmp_path), walk_feed())
    trainer.train()
    trainer.save(tmp_path / "here")
    other = AgentTrainer(small(tmp_path, seed=9), walk_feed())
    other.load(tmp_path / "here")
    assert_same(parameters(trainer), parameters(other))
    assert float(other.rl_state.agent_state.entropy_coefficient) == float(
        trainer.rl_state.agent_state.entropy_coefficient
    )


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    AgentTrainer(small(tmp_path), walk_feed()).save(tmp_path / "sac")
    td3 = AgentTrainer(small(tmp_path, hyperparameters={"agent": "td3"}), walk_feed())
    wide = AgentTrainer(small(tmp_path, hyperparameters={"hidden_sizes": (32,)}), walk_feed())
    fixed = AgentTrainer(small(tmp_path, hyperparameters={"entropy_coefficient": 0.1}), walk_feed())
    for trainer, message in [(td3, "saved by SAC"), (wide, "has shape"), (fixed, "log_entropy_coefficient")]:
        before = parameters(trainer)
        with pytest.raises(ValueError, match=message):
            trainer.load(tmp_path / "sac")
        assert_same(before, parameters(trainer))
    with pytest.raises(ValueError):
        td3.load(tmp_path / "nothing")
    tensors = next((tmp_path / "sac").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        AgentTrainer(small(tmp_path), walk_feed()).load(tmp_path / "sac")


# What goes wrong ----------------------------------------------------------------------------------------------


class SpoiledSAC(SAC):
    """SAC whose target is NaN in the updates given."""

    def __init__(self, config, bad):
        super().__init__(config)
        self.bad = bad
        self.asked = 0

    def next_values(self, state, batch, key):
        values = super().next_values(state, batch, key)
        self.asked += 1
        return values._replace(q=values.q * float("nan")) if self.asked in self.bad else values


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path):
    config = small(tmp_path, steps=40)
    agent = SpoiledSAC(config, bad={1, 2, 5, 6, 20})
    trainer = AgentTrainer(config, walk_feed(), agent=agent)
    trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (15, 5)
    assert all(torch.isfinite(tensor).all() for tensor in parameters(trainer).values())


def test_a_skipped_update_changes_nothing(tmp_path):
    config = small(tmp_path, steps=21)
    trainer = AgentTrainer(config, walk_feed(), agent=SpoiledSAC(config, bad={1}))
    before = parameters(trainer)
    priorities = []
    trainer.replay.update_priorities = lambda *arguments: priorities.append(arguments)
    trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (0, 1)
    assert priorities == []
    assert_same(before, parameters(trainer))
    assert float(trainer.rl_state.agent_state.entropy_coefficient) == 1.0


@pytest.mark.parametrize(("interval", "says"), [(None, "there is no checkpoint yet"), (10, "step-00000020")])
def test_the_third_in_a_row_stops_the_run(tmp_path, interval, says):
    config = small(tmp_path, steps=60, checkpoint_interval=interval)
    trainer = AgentTrainer(config, walk_feed(), agent=SpoiledSAC(config, bad={2, 3, 5, 6, 7, 8}))
    with pytest.raises(LossNotFiniteError, match=rf"critic loss is nan in 3 updates in a row.*{says}"):
        trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (2, 5)


def test_a_policy_loss_that_is_not_finite_is_counted_across_the_updates_between(tmp_path):
    class Spoiled(TD3):
        def policy_loss(self, state, batch, key):
            learned = super().policy_loss(state, batch, key)
            return learned._replace(loss=learned.loss * float("inf"))

    config = small(tmp_path, steps=60, hyperparameters={"agent": "td3"})
    trainer = AgentTrainer(config, walk_feed(), agent=Spoiled(config))
    policy = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    with pytest.raises(LossNotFiniteError, match=r"policy loss is -?inf in 3 updates"):
        trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (3, 3)
    assert_same(policy, trainer.policy.state_dict())


def test_a_feed_that_cannot_be_made_twice_trains_without_evaluation(tmp_path):
    trainer = AgentTrainer(small(tmp_path, steps=30), HaltingFeed())
    with pytest.warns(UserWarning, match="no second halting can be made to evaluate on; pass evaluation_feed="):
        assert trainer.train() is None
    assert trainer.updates == 10
    with pytest.raises(ValueError, match="evaluation_feed has 2 environments"):
        AgentTrainer(small(tmp_path), walk_feed(), evaluation_feed=HaltingFeed()).evaluate(1)


def test_an_environment_that_raises_leaves_a_saved_run(tmp_path):
    class Broken(Exception):
        pass

    def function(observation, action, time_step):
        if function.left == 0:
            raise Broken("gears")
        function.left -= 1
        return walk(observation, action)

    function.left = 33
    trainer = AgentTrainer(small(tmp_path), walk_feed(function))
    with pytest.raises(Broken, match="gears"):
        trainer.train()
    assert trainer.steps == 33
    resumed = AgentTrainer.resume(trainer.run_folder, feed=walk_feed())
    assert (resumed.steps, len(resumed.replay)) == (33, 33)


def test_a_reward_that_is_not_finite_names_the_environment(tmp_path):
    def function(observation, action, time_step):
        return observation, float("nan") if time_step == 4 else 0.0

    trainer = AgentTrainer(small(tmp_path), walk_feed(function, name="leaky"))
    with pytest.raises(ValueError, match="environment 0 of leaky gave the reward nan after 4 steps"):
        trainer.train()
    assert (trainer.run_folder / "checkpoints" / "step-00000004").is_dir()


def test_one_interrupt_saves_and_ends(tmp_path):
    def function(observation, action, time_step):
        function.steps += 1
        if function.steps == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return walk(observation, action)

    function.steps = 0
    before = signal.getsignal(signal.SIGINT)
    trainer = AgentTrainer(small(tmp_path), walk_feed(function))
    assert trainer.train() is None
    assert trainer.steps == 30
    assert (trainer.run_folder / "checkpoints" / "step-00000030").is_dir()
    assert (trainer.run_folder / "learning_curve.png").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_is_immediate():
    with interrupts() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_contradictions_are_refused(tmp_path):
    config = small(tmp_path)
    box = {"observation_space": walk_feed().observation_space, "action_space": BOX}
    with pytest.raises(ValueError, match=r"replay has discount 0\.9.*0\.99"):
        AgentTrainer(config, walk_feed(), replay=PrioritizedReplayBuffer(10, **box, discount=0.9))
    with pytest.raises(ValueError, match=r"replay has n_step 3, the config 1"):
        AgentTrainer(config, walk_feed(), replay=PrioritizedReplayBuffer(10, **box, n_step=3))
    with pytest.raises(ValueError, match="uniform"):
        AgentTrainer(config, walk_feed(), replay=ReplayBuffer(10, **box))
    with pytest.raises(TypeError, match="meta"):
        AgentTrainer(config, walk_feed(), meta=object())
    with pytest.raises(TypeError, match="replay is a object, which has no insert"):
        AgentTrainer(config, walk_feed(), replay=object())
    with pytest.raises(TypeError, match="policy"):
        AgentTrainer(config, walk_feed(), policy=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="config"):
        AgentTrainer({})
    with pytest.raises(ValueError, match=r"Discrete.*continuous"):
        AgentTrainer(small(tmp_path, training={"environment": "CartPole-v1"}))
    with pytest.raises(ValueError, match="Pendulum-v1"):
        AgentTrainer(small(tmp_path, training={"environment": "Pendulun-v1"}))
    with pytest.raises(ValueError, match="device is 'cdua'"):
        AgentTrainer(small(tmp_path, training={"device": "cdua"}))
    with pytest.raises(ValueError, match="q_future and agent"):
        AgentTrainer(config, walk_feed(), agent=TD3(config), q_future=lambda *_: None)


def test_an_empty_replay_is_still_the_one_that_is_used(tmp_path):
    box = {"observation_space": walk_feed().observation_space, "action_space": BOX}
    replay = PrioritizedReplayBuffer(64, **box)
    trainer = AgentTrainer(small(tmp_path, steps=30), walk_feed(), replay=replay)
    trainer.train()
    assert trainer.replay is replay
    assert len(replay) == 30


def test_the_run_folder_holds_what_a_run_leaves(tmp_path):
    config = small(tmp_path, steps=60, log_interval=20, training={"evaluation_interval": 25})
    trainer = AgentTrainer(config, walk_feed(name="walk"))
    trainer.train()
    folder = tmp_path / "walk-sac-0"
    assert trainer.run_folder == folder
    assert AgentConfig.from_json((folder / "config.json").read_text()) == config
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "learning_curve.png"}
    text = (folder / "metrics.jsonl").read_text()
    assert text.count("evaluation/mean_return") == 3
    assert text.count("loss/critic") == 2  # at 40 and 60: nothing was learned at 20
    assert dataclasses.asdict(config)["training"]["steps"] == trainer.steps
