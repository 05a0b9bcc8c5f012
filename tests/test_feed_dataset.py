"""A data set as a feed: every row in order, with the action recorded, into the replay and nothing else."""

from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from angle_rl.agents import SAC
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import DatasetFeed, FunctionFeed, HistoryFeed, make_evaluation_feed, make_feed, offline
from angle_rl.replay import ReplayBuffer
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey

BOX = spaces.Box(-2.0, 2.0, (1,), np.float32)


def recorded(rows=23, lengths=(4, 3, 6)):
    """Episodes of these lengths in turn, the last cut by the end; terminated and truncated by turns."""
    observations, successors, terminated, truncated = [], [], [], []
    episode = time = 0
    for _ in range(rows):
        observations.append([episode, time])
        time += 1
        successors.append([episode, time])
        ended = time == lengths[episode % len(lengths)]
        terminated.append(ended and episode % 2 == 0)
        truncated.append(ended and episode % 2 == 1)
        if ended:
            episode, time = episode + 1, 0
    return {
        "observations": np.array(observations, np.float32),
        "next_observations": np.array(successors, np.float32),
        "actions": np.linspace(-2, 2, rows, dtype=np.float32)[:, None],
        "rewards": np.arange(rows, dtype=np.float32),
        "terminated": np.array(terminated),
        "truncated": np.array(truncated),
    }


def one_pass(feed):
    """The rows of one pass in the order of the data set, as a trainer would store them."""
    state, key = feed.init(RandomKey(0))
    rows = [[] for _ in range(feed.num_environments)]
    while sum(map(len, rows)) < len(feed):
        before, actions = state, feed.recorded_actions
        state, key = feed.step(key, before, actions)
        for i in np.flatnonzero(state.stepped):
            rows[i].append(
                (
                    before.observation[i].tolist(),
                    actions[i].tolist(),
                    state.reward[i],
                    state.final_observation[i].tolist(),
                    bool(state.terminated[i]),
                    bool(state.truncated[i]),
                )
            )
    return [row for part in rows for row in part], state, key


def rows_of(data):
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    return [tuple(column.tolist() for column in row) for row in zip(*(data[name] for name in names), strict=True)]


@pytest.mark.parametrize("n", [1, 2, 5, 23])
def test_every_row_comes_once_in_a_pass_as_it_was_recorded(n):
    data = recorded()
    feed = DatasetFeed(data, action_space=BOX, num_environments=n)
    expected = rows_of(data)
    found, state, key = one_pass(feed)
    assert [row[:5] for row in found] == [row[:5] for row in expected]
    cut = {int(edge) - 1 for edge in np.linspace(0, 23, n + 1)[1:]}
    for index, (row, original) in enumerate(zip(found, expected, strict=True)):
        assert row[5] == (original[5] or (index in cut and not original[4])), index
    while not np.array_equal(feed.recorded_actions[0], data["actions"][0]):  # parts that still have a row
        state, key = feed.step(key, state, feed.recorded_actions)
    assert one_pass(feed)[0] == found


def test_the_next_observation_shown_is_the_successor_unless_an_episode_ended():
    feed = DatasetFeed(recorded(), action_space=BOX, num_environments=3)
    state, key = feed.init(RandomKey(0))
    for _ in range(20):
        state, key = feed.step(key, state, feed.recorded_actions)
        on = ~(state.terminated | state.truncated)
        assert np.array_equal(state.observation[on], state.final_observation[on])


def test_rows_that_do_not_follow_one_another_are_cut():
    data = recorded(8, (100,))
    order = np.array([0, 1, 2, 5, 6, 3, 4, 7])
    shuffled = {name: array[order] for name, array in data.items()}
    found, _, _ = one_pass(DatasetFeed(shuffled, action_space=BOX))
    assert [row[5] for row in found] == [False, False, True, False, True, False, True, True]


def test_rows_of_a_stream_are_put_together_and_its_end_is_cut():
    data = {name: np.repeat(array[:4], 2, axis=0) for name, array in recorded(4, (100,)).items()}
    data["streams"] = np.tile([7, 3], 4)
    data["rewards"] = np.arange(8.0)
    data["next_observations"][6:] = data["observations"][0]  # what the next stream begins with
    found, _, _ = one_pass(DatasetFeed(data, action_space=BOX))
    assert [row[2] for row in found] == [1, 3, 5, 7, 0, 2, 4, 6]
    assert [row[5] for row in found] == [False, False, False, True] * 2


def test_no_other_action_is_answered():
    feed = DatasetFeed(recorded(), action_space=BOX, num_environments=2)
    state, key = feed.init(RandomKey(0))
    actions = feed.recorded_actions
    actions[1] += 0.5
    with pytest.raises(ValueError, match=r"actions\[1\] is .* was recorded.*agent=offline\(agent, feed\)"):
        feed.step(key, state, actions)
    state, key = feed.step(key, state, feed.recorded_actions)
    assert state.reward.tolist() == [0, 11]


def test_npz_of_a_replay_and_of_plain_arrays(tmp_path):
    data = recorded()
    np.savez(tmp_path / "plain.npz", **data)
    assert one_pass(DatasetFeed.from_npz(tmp_path / "plain.npz", action_space=BOX))[0][:22] == rows_of(data)[:22]
    space = spaces.Dict({"a": spaces.Box(-9, 99, (2,), np.float32), "b": spaces.Tuple([spaces.Discrete(50)])})
    replay = ReplayBuffer(64, observation_space=space, action_space=BOX)
    for i in range(20):
        observation, successor = (
            {"a": np.full((2, 2), t, np.float32), "b": (np.array([t, t + 1]),)} for t in (i, i + 1)
        )
        replay.insert(
            observation, np.full((2, 1), i / 20), np.full(2, i), successor, np.zeros(2, bool), streams=np.array([0, 1])
        )
    replay.save_npz(tmp_path / "replay.npz")
    feed = DatasetFeed.from_npz(tmp_path / "replay.npz", action_space=BOX, observation_space=space, num_environments=2)
    assert len(feed) == 40
    state, key = feed.init(RandomKey(0))
    for i in range(20):
        assert state.observation["a"][:, 0].tolist() == [i, i]
        assert state.observation["b"][0].tolist() == [i, i + 1]
        state, key = feed.step(key, state, feed.recorded_actions)
        assert state.truncated.tolist() == [i == 19] * 2
    np.savez(tmp_path / "objects.npz", **data, infos=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        DatasetFeed.from_npz(tmp_path / "objects.npz", action_space=BOX)


@dataclass
class Episode:  # what Minari documents of an EpisodeData
    observations: object
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class Minari:  # what Minari documents of a MinariDataset
    observation_space = spaces.Dict(
        {"x": spaces.Box(-99, 99, (2,), np.float32), "y": spaces.Tuple([spaces.Discrete(9)])}
    )
    action_space = BOX
    id = "walk/short-v0"
    env_spec = "there is one"

    def iterate_episodes(self):
        for length in (3, 5):
            yield Episode(
                {"x": np.full((length + 1, 2), length) + np.arange(length + 1)[:, None], "y": (np.arange(length + 1),)},
                np.full((length, 1), length / 10, np.float32),
                np.arange(length, dtype=np.float64),
                np.arange(length) == (length - 1 if length == 5 else -1),
                np.zeros(length, bool),
            )

    def recover_environment(self, eval_env=False):
        assert eval_env
        return gymnasium.make("Pendulum-v1")


def test_minari():
    feed = DatasetFeed.from_minari(Minari(), num_environments=1)
    assert (feed.name, len(feed), feed.observation_space) == ("walk/short-v0", 8, Minari.observation_space)
    state, key = feed.init(RandomKey(0))
    shown = []
    for _ in range(8):
        assert feed.recorded_actions[0, 0] == np.float32(0.3 if len(shown) < 3 else 0.5)
        before = state.observation["y"][0][0]
        state, key = feed.step(key, state, feed.recorded_actions)
        shown.append((before, state.final_observation["y"][0][0], state.terminated[0], state.truncated[0]))
    assert shown == [
        (0, 1, False, False),
        (1, 2, False, False),
        (2, 3, False, True),  # a recording that stops is cut
        (0, 1, False, False),
        (1, 2, False, False),
        (2, 3, False, False),
        (3, 4, False, False),
        (4, 5, True, False),
    ]
    evaluation = make_evaluation_feed(feed)
    assert evaluation.name == "Pendulum-v1"
    evaluation.close()


def walk(observation, action):
    observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
    return observation, -float(np.abs(observation).sum())


def walk_feed():
    return FunctionFeed(walk, initial_observation=np.array([0.5], np.float32), action_space=BOX, step_limit=10)


def test_offline_training_learns_from_the_recorded_rows_alone(tmp_path):
    rng = np.random.default_rng(0)
    rows = 60
    observations = rng.uniform(-1, 1, (rows, 1)).astype(np.float32)
    actions = rng.uniform(-2, 2, (rows, 1)).astype(np.float32)
    successors = np.clip(observations + 0.1 * actions, -1, 1).astype(np.float32)
    data = {
        "observations": observations,
        "actions": actions,
        "rewards": -np.abs(successors[:, 0]),
        "next_observations": successors,
        "terminated": np.zeros(rows, bool),
    }
    feed = DatasetFeed(data, action_space=BOX, num_environments=4, evaluation=walk_feed())
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            hidden_sizes=(16,), batch_size=8, learning_starts=rows, replay_capacity=rows, replay="uniform"
        ),
        training=Training(steps=rows + 100, evaluation_interval=None, evaluation_episodes=2),
        service=Service(run_folder=str(tmp_path), tensorboard=False),
    )
    trainer = AgentTrainer(config, feed, agent=offline(SAC(config), feed))
    evaluation = trainer.train()
    assert evaluation.lengths == (10, 10)
    assert trainer.updates == 100
    batch = trainer.replay.sample(1000)
    found = {
        tuple(np.round([*o, *a, r, *s], 6).tolist())
        for o, a, r, s in zip(
            *(np.asarray(x) for x in (batch.observations, batch.actions, batch.rewards, batch.next_observations)),
            strict=True,
        )
    }
    expected = {
        tuple(np.round([*o, *a, r, *s], 6).tolist())
        for o, a, r, s in zip(observations, actions, data["rewards"].astype(np.float32), successors, strict=True)
    }
    assert found == expected
    trainer.save(tmp_path / "saved")
    online = AgentTrainer(config, walk_feed())  # the agent itself loads it, to go on in an environment
    online.load(tmp_path / "saved")
    assert online.updates == 100


def test_an_agent_that_acts_by_itself_is_stopped(tmp_path):
    feed = DatasetFeed(recorded(), action_space=BOX)
    config = AgentConfig(
        hyperparameters=Hyperparameters(hidden_sizes=(8,), batch_size=4, learning_starts=10),
        training=Training(steps=20, evaluation_interval=None),
        service=Service(run_folder=str(tmp_path), tensorboard=False),
    )
    with pytest.warns(UserWarning, match="without evaluation"), pytest.raises(ValueError, match="offline"):
        AgentTrainer(config, feed).train()


def test_a_reset_goes_on_where_the_data_set_stands():
    feed = DatasetFeed(recorded(), action_space=BOX)
    state, key = feed.init(RandomKey(0))
    for episode in range(3):
        while not (state.terminated | state.truncated)[0]:
            state, key = feed.step(key, state, feed.recorded_actions)
        state, key = feed.reset(key, state)
        assert state.observation[0].tolist() == [episode + 1, 0]
        assert not state.stepped[0]
    state, _ = feed.init(key)
    assert state.observation[0].tolist() == [0, 0]


def test_a_history_of_a_data_set():
    feed = DatasetFeed(recorded(), action_space=BOX)
    history = HistoryFeed(feed, 2)
    state, key = history.init(RandomKey(0))
    for _ in range(5):
        state, key = history.step(key, state, feed.recorded_actions)
    assert state.observation[0].tolist() == [[1, 0], [1, 1]]


def test_refusals():
    data = recorded()

    def without(*names):
        return {name: array for name, array in data.items() if name not in names}

    for changed, message in [
        (without("observations"), "lack 'observations'"),
        (without("next_observations"), r"lack \['next_observations'\]"),
        (without("actions", "terminated"), r"lack \['actions', 'terminated'\]"),
        (data | {"timeouts": data["truncated"]}, r"hold \['timeouts'\]"),
        (data | {"actions": data["actions"][:-1]}, r"actions has shape \[22, 1\]; rewards has 23 rows"),
        (data | {"rewards": np.where(np.arange(23) == 5, np.nan, 0)}, r"rewards\[5\] is nan"),
        (data | {"actions": np.zeros((23, 2))}, "actions has shape"),
        ({name: array[:0] for name, array in data.items()} | {"observations": np.zeros((1, 2))}, "no rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            DatasetFeed(changed, action_space=BOX)
    for n in (0, 24):
        with pytest.raises(ValueError, match=f"num_environments is {n}"):
            DatasetFeed(data, action_space=BOX, num_environments=n)
    with pytest.raises(TypeError, match="action_space"):
        DatasetFeed(data, action_space=spaces.Dict({"a": BOX}))
    assert make_evaluation_feed(DatasetFeed(data, action_space=BOX)) is None
    assert make_feed(feed := DatasetFeed(data, action_space=BOX)) is feed
