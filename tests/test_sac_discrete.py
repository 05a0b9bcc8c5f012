"""SAC for discrete actions: exact sums over the actions, sampling, refusals, and what is known being learned."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.agents import SAC, Agent, DiscreteSAC
from angle_rl.agents.sac_discrete import CategoricalPolicy, DiscreteQ
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.models import TwinQ
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey, RLState, reset_state

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Discrete(4, start=2)


def config_of(**hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "sac_discrete", "hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000}
            | hyperparameters
        )
    )


def made(policy=None, critics=None, **hyperparameters):
    """An agent and its first state, with some random transitions in the replay."""
    agent = DiscreteSAC(config_of(**hyperparameters))
    state, _ = agent.init(
        RandomKey(1), observation_space=OBSERVATIONS, action_space=ACTIONS, policy=policy, critics=critics
    )
    generator = np.random.default_rng(0)
    n = 200
    state.replay.insert(
        generator.normal(size=(n, 3)).astype(np.float32),
        generator.integers(2, 6, n),
        generator.normal(size=n).astype(np.float32),
        generator.normal(size=(n, 3)).astype(np.float32),
        generator.random(n) < 0.2,
    )
    return agent, state


def test_a_critic_gives_the_value_of_the_action_that_was_taken():
    critics = DiscreteQ(3, 4, start=2, hidden_sizes=(8,), critics=3)
    observations, actions = RandomKey(1).normal(5, 3), torch.tensor([2, 3, 4, 5, 2])
    every, q = critics.action_values(observations), critics(observations, actions)
    assert (every.shape, q.shape) == ((3, 5, 4), (3, 5))
    for row, action in enumerate(actions.tolist()):
        assert torch.equal(q[:, row], every[:, row, action - 2])
    assert not torch.equal(every[0], every[1])


def test_actions_are_sampled_as_their_probabilities_say():
    policy = CategoricalPolicy(1, 4, start=2, hidden_sizes=(4,))
    expected = np.array([0.5, 0.0, 0.2, 0.3])
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor(expected).clamp_min(1e-30).log())
        n = 20_000
        actions, log_prob = policy.sample_actions(torch.zeros(n, 1), noise=RandomKey(3).normal(n))
    assert actions.dtype == torch.int64
    counts = np.bincount(actions.numpy() - 2, minlength=4)
    assert counts[1] == 0
    expected_counts = n * expected[[0, 2, 3]]
    chi_square = ((counts[[0, 2, 3]] - expected_counts) ** 2 / expected_counts).sum()
    assert chi_square < 13.8  # two degrees of freedom: one in a thousand
    np.testing.assert_allclose(log_prob.exp().numpy(), expected[actions.numpy() - 2], rtol=1e-5)
    best, log_prob = policy.sample_actions(torch.zeros(3, 1), True)
    assert best.tolist() == [2, 2, 2]
    extremes, _ = policy.sample_actions(torch.zeros(2, 1), noise=torch.tensor([-40.0, 40.0]))
    assert extremes.tolist() == [2, 5]


def test_target_policy_loss_and_coefficient_follow_the_equations():
    agent, state = made(replay="uniform", learning_rate=0.01)
    assert isinstance(agent, Agent)
    state.entropy_coefficient = torch.tensor(0.7)
    batch = state.replay.sample(32)
    with torch.no_grad():
        probabilities = torch.softmax(state.policy(batch.next_observations).double(), -1).numpy()
        q = state.target_critics.action_values(batch.next_observations).double().numpy()
    values = np.zeros(32)
    for row in range(32):
        for action in range(4):
            p = probabilities[row, action]
            values[row] += p * (min(q[0, row, action], q[1, row, action]) - 0.7 * math.log(p))
    future = agent.next_values(state, batch, RandomKey(0))
    assert (future.log_prob, future.entropy_coefficient) == (None, 0.0)
    np.testing.assert_allclose(future.q.detach().numpy(), values[None], rtol=1e-4, atol=1e-6)

    loss, log_prob, _ = agent.policy_loss(state, batch, RandomKey(0))
    with torch.no_grad():
        probabilities = torch.softmax(state.policy(batch.observations).double(), -1).numpy()
        smallest = state.critics.action_values(batch.observations).double().numpy().min(0)
    negative_entropy = (probabilities * np.log(probabilities)).sum(-1)
    expected = (0.7 * negative_entropy - (probabilities * smallest).sum(-1)).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(log_prob.detach().numpy(), negative_entropy, rtol=1e-4)

    result = state.engine.update(RandomKey(5), 1)
    entropy = -float(result.log_prob.mean())
    direction = math.copysign(1.0, 0.98 * math.log(4) - entropy)  # too little entropy: the coefficient grows
    assert float(state.entropy_coefficient) == pytest.approx(math.exp(0.01 * direction), rel=1e-4)


def test_the_policy_step_leaves_the_critics_alone():
    agent, state = made()
    loss = agent.policy_loss(state, state.replay.sample(32), RandomKey(0)).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in state.critics.parameters())
    assert all(parameter.grad is not None for parameter in state.policy.parameters())


def test_actions_before_and_after_learning_starts_are_in_the_space():
    for learning_starts in (0, 100):
        agent, state = made(learning_starts=learning_starts)
        observation = np.zeros((500, 3), np.float32)
        rl_state = RLState(state, reset_state(observation, 500), RandomKey(2), 0, 0, None)
        actions, _ = agent.select_action(rl_state, 0)
        assert (actions.dtype, actions.shape) == (np.int64, (500,))
        assert set(actions.tolist()) == {2, 3, 4, 5}
        again, _ = agent.select_action(rl_state, 0)
        np.testing.assert_array_equal(actions, again)


@pytest.mark.parametrize(
    ("space", "options", "says"),
    [
        (spaces.Box(-1.0, 1.0, (2,)), {}, "DiscreteSAC needs Discrete actions"),
        (spaces.Discrete(1), {}, "at least 2"),
        (ACTIONS, {"target_entropy": 1.5}, r"target_entropy is 1.5; with 4 actions .* log\(4\) = 1.386"),
        (ACTIONS, {"exploration_process": "ou"}, "exploration_process is 'ou'; DiscreteSAC samples"),
    ],
)
def test_what_it_cannot_do_is_refused(space, options, says):
    with pytest.raises(ValueError, match=says):
        DiscreteSAC(config_of(**options)).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=space)


def test_wrong_parts_are_refused():
    with pytest.raises(TypeError, match="critics is a TwinQ, which has no action_values"):
        made(critics=TwinQ(3, 1))
    with pytest.raises(ValueError, match="q_future is given"):
        DiscreteSAC(config_of(), lambda critics, observations, actions: critics(observations, actions))
    with pytest.raises(ValueError, match="SAC needs continuous"):
        SAC(AgentConfig()).init(RandomKey(0), observation_space=OBSERVATIONS, action_space=ACTIONS)


# Runs ---------------------------------------------------------------------------------------------------------


def corridor():
    """Five places in a row; action 3 goes right, 2 left; each step costs 1, and the right end ends it."""

    def function(observation, action):
        place = float(np.clip(observation[0] + (0.5 if action == 3 else -0.5), -1, 1))
        return np.array([place], np.float32), -1.0, place >= 1.0

    return FunctionFeed(
        function,
        initial_observation=np.array([-1.0], np.float32),
        action_space=spaces.Discrete(2, start=2),
        step_limit=30,
        name="corridor",
    )


def run_config(folder, steps, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "sac_discrete", "hidden_sizes": (32,), "batch_size": 32, "learning_rate": 3e-3}
            | {"learning_starts": 100, "replay_capacity": 2000, "tau": 0.05, "discount": 0.9, "target_entropy": 0.1}
            | hyperparameters
        ),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(folder), tensorboard=False, checkpoint_interval=None),
    )


def test_a_corridor_is_walked_the_short_way(tmp_path):
    trainer = AgentTrainer(run_config(tmp_path, 800), corridor())
    assert trainer.evaluate(1).mean_return == -30.0
    evaluation = trainer.train()
    assert evaluation.returns == (-4.0,)


def learned(trainer):
    """All tensors of a checkpoint but the replay's, whose rows go to new streams after a resume."""
    tensors, _ = trainer.agent.export_state(trainer.rl_state.agent_state)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("replay.")}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"learning_starts": 20, "batch_size": 8}
    whole = AgentTrainer(run_config(tmp_path / "whole", 90, **options), corridor())
    halfway = []
    step = whole.agent.optimize_model
    whole.agent.optimize_model = lambda state: halfway.append(state.environment_state) or step(state)
    whole.train()
    ends = [index + 1 for index, seen in enumerate(halfway) if seen.terminated[0] or seen.truncated[0]]
    stop = next(index for index in ends if index > 40)  # where an episode ends, since a resume begins a new one
    half = AgentTrainer(run_config(tmp_path / "half", stop, **options), corridor())
    half.train()
    resumed = AgentTrainer.resume(half.run_folder, run_config(tmp_path / "half", 90, **options), feed=corridor())
    resumed.train()
    exports = [learned(trainer) for trainer in (whole, resumed)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        assert torch.equal(tensor, exports[1][name]), name
