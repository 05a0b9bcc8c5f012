"""EnvPool's feed against a pool made here that behaves as the real one does, and against the real one where it is."""

import numpy as np
import pytest
from gymnasium import spaces

from angle_rl.feed import DataFeed, EnvPoolFeed, make_evaluation_feed, make_feed
from angle_rl.types import RandomKey

made = []


class Pool:
    """Restarts with the step after an end, in which it gives reward 0; rows come in the order of ``order``."""

    observation_space = spaces.Dict({"x": spaces.Box(-99, 99, (2,), np.float32)})
    action_space = spaces.Discrete(3)

    def __init__(self, task, *, env_type, num_envs, seed, length=3):
        assert env_type == "gymnasium"
        self.n, self.seed, self.length = num_envs, seed, length
        self.order = np.arange(num_envs)[::-1]
        self.closed = False
        made.append(self)

    def shown(self):
        x = np.stack([self.time, self.seed % 50 + np.arange(self.n)], axis=1).astype(np.float32)
        return {"x": x[self.order]}

    def reset(self):
        self.time = -np.arange(self.n)  # the later ones end later
        return self.shown(), {"env_id": self.order.astype(np.int32)}

    def step(self, actions):
        ended = self.time >= self.length
        self.time = np.where(ended, 0, self.time + 1)
        reward = np.where(ended, 0.0, self.time + 10 * actions).astype(np.float32)
        last = self.time == self.length
        odd = np.arange(self.n) % 2 == 1
        info = {"env_id": self.order.astype(np.int32)}
        return self.shown(), reward[self.order], (last & ~odd)[self.order], (last & odd)[self.order], info

    def close(self):
        assert not self.closed
        self.closed = True


def test_transitions_resets_and_seeds():
    made.clear()
    feed = EnvPoolFeed("Some-v1", num_environments=2, make=Pool, length=3)
    assert isinstance(feed, DataFeed)
    assert make_feed(feed) is feed
    state, key = feed.init(RandomKey(0))
    assert made[-1].seed == RandomKey(0).split(2)[0].seed()
    rows = [[], []]
    for _ in range(9):
        before = state
        state, key = feed.step(key, before, np.array([1, 2]))
        for i in range(2):
            rows[i].append(
                (
                    before.observation["x"][i, 0],
                    state.reward[i],
                    state.final_observation["x"][i, 0],
                    state.terminated[i],
                    state.truncated[i],
                    state.stepped[i],
                )
            )
    episode = [(0, 11, 1, False, False, True), (1, 12, 2, False, False, True), (2, 13, 3, True, False, True)]
    assert rows[0][:8] == [*episode, (3, 0, 0, False, False, False), *episode, (3, 0, 0, False, False, False)]
    cut = [(0, 21, 1, False, False, True), (1, 22, 2, False, False, True), (2, 23, 3, False, True, True)]
    assert rows[1] == [
        (-1, 20, 0, False, False, True),
        *cut,
        (3, 0, 0, False, False, False),
        *cut,
        (3, 0, 0, False, False, False),
    ]
    again, _ = feed.reset(RandomKey(0), state)
    first, _ = feed.init(RandomKey(0))
    other, _ = feed.init(RandomKey(1))
    assert np.array_equal(again.observation["x"], first.observation["x"])
    assert not np.array_equal(first.observation["x"], other.observation["x"])
    evaluation = make_evaluation_feed(feed)
    assert (evaluation.num_environments, made[-1].n, made[-1].length) == (1, 1, 3)
    for one in (evaluation, feed, feed):
        one.close()
    assert all(pool.closed for pool in made)


def test_refusals():
    for name in ("seed", "num_envs", "batch_size", "env_type"):
        with pytest.raises(TypeError, match=f"{name} is the feed's"):
            EnvPoolFeed("Some-v1", make=Pool, **{name: 1})
    with pytest.raises(ValueError, match="num_environments is 0"):
        EnvPoolFeed("Some-v1", make=Pool, num_environments=0)
    feed = EnvPoolFeed("Some-v1", make=Pool)
    state, key = feed.init(RandomKey(0))
    with pytest.raises(ValueError, match="actions"):
        feed.step(key, state, np.array([1, 2]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_real_one():
    pytest.importorskip("envpool")
    feed = EnvPoolFeed("CartPole-v1", num_environments=3, max_episode_steps=12, num_threads=1)
    shown = []
    for _ in range(2):
        state, key = feed.init(RandomKey(4))
        ends = {"terminated": 0, "truncated": 0, "resets": 0}
        for t in range(60):
            before = state
            state, key = feed.step(key, before, np.array([0, 1, t % 2]))
            ends["terminated"] += int(state.terminated.sum())
            ends["truncated"] += int(state.truncated.sum())
            ends["resets"] += int((~state.stepped).sum())
            assert np.array_equal(state.reward, state.stepped.astype(float))
            begun = ~state.stepped
            assert np.array_equal(begun, before.terminated | before.truncated)
            assert (np.abs(state.observation[begun]) <= 0.05).all()  # where CartPole begins
            shown.append(state.observation)
        assert ends["terminated"] > 5
        assert ends["truncated"] > 2
        assert 0 <= ends["terminated"] + ends["truncated"] - ends["resets"] <= 3
    assert np.array_equal(shown[:60], shown[60:])
    feed.close()
