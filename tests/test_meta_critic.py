"""MetaCritic: its gradient, the loss that it adds to the policy's, and what learns by both."""

from __future__ import annotations

import copy
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from meta_parts import ACTIONS, OBSERVATIONS, Bound, batch_of, check_gradients, learning_of_agent, meta_inputs
from test_meta_trainer import assert_same, everything, small, walk_feed
from test_native_engine import Learner, go_beside
from torch import nn

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, runs
from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.engines import NativeCriticsEngine, NativeEngine, TorchEngine, native_refusal
from angle_rl.meta import MetaCritic
from angle_rl.meta_trainer import MetaLearnerTrainer
from angle_rl.models import PolicyModel
from angle_rl.types import RandomKey

KINDS = {"sac": SAC, "td3": TD3, "ddpg": DDPG, "dqn": DQN, "sac_discrete": DiscreteSAC}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(runs.Run, "plot", lambda run: None)


class Shaping(Bound):
    """Shapes an agent's policy loss by a learner away from where it begins, and never learns."""

    shapes_policy_loss = True

    def __init__(self, learner):
        self.learner = learner
        self.reads_features = learner.reads_features

    def bind(self, learning):
        super().bind(learning)
        self.learner.adopt(self.learner.begin(learning, RandomKey(5)))
        away(self.learner)

    def policy_auxiliary_loss(self, features, batch):
        return self.learner.policy_auxiliary_loss(features, batch)


class Plain(PolicyModel):
    """A policy of a user's own, without features."""

    def __init__(self, observation_dim=1):
        super().__init__([-1.0], [1.0])
        self.layers = nn.Sequential(nn.Linear(observation_dim, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, observations):
        return self.layers(observations).chunk(2, -1)


class Featured(Plain):
    """The same with features, three of them."""

    def features(self, observations):
        return self.layers[0](observations)[:, :3]


class Flat(Plain):
    """Features that are no matrix."""

    def features(self, observations):
        return self.layers[0](observations).sum(-1)


def away(learner, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.meta_parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def network_of(learner):
    """Its meta-parameters in a module of torch's."""
    parameters = {name: tensor.detach() for name, tensor in learner.meta_parameters().items()}
    layers = []
    for layer in range(len(parameters) // 2):
        weight = parameters[f"weights.{layer}"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        linear.load_state_dict({"weight": weight, "bias": parameters[f"biases.{layer}"]})
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Softplus())


def trainer_of(folder, learner=None, steps=60, *, parts=None, **options):
    return MetaLearnerTrainer(small(folder, steps, **options), learner or MetaCritic(), walk_feed(), **(parts or {}))


# The meta step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "inner", "use_features"),
    [
        ("sac", "sgd", True),
        ("sac", "adam", True),
        ("sac", "adam", False),
        ("sac", "rmsprop", True),
        ("td3", "sgd", True),
        ("td3", "sgd", False),
        ("td3", "adam", True),
    ],
)
def test_it_has_the_gradient_of_its_loss(agent, inner, use_features):
    learning = learning_of_agent(agent, **({"entropy_coefficient": 0.2} if agent == "sac" else {}))
    if inner == "sgd":  # a step that moves more than rounding does
        learning.optimizers["policy"].param_groups[0]["lr"] = 2.0
    learner = MetaCritic(inner=inner, hidden_sizes=(6, 5), use_features=use_features)
    check_gradients(learner, learning, meta_inputs(transitions=True), step=1e-4, most=3)


def test_its_loss_is_what_the_second_step_adds():
    """Both gradients at the first parameters, written down once more for TD3."""
    learning, inputs = learning_of_agent("td3"), meta_inputs(transitions=True)
    learning.optimizers["policy"].param_groups[0]["lr"] = 0.7
    learner = MetaCritic(hidden_sizes=(6,))
    learner.adopt(learner.begin(learning, RandomKey(1)))
    away(learner)
    network, policy, critics = network_of(learner), learning.networks["policy"], learning.networks["critics"]

    def loss_of(policy, observations):
        return -critics(observations, policy(observations))[0].mean()

    states = inputs.batch.observations
    seen = torch.cat([policy.features(states), states, policy(states)], 1)
    first = torch.autograd.grad(loss_of(policy, states), list(policy.parameters()))
    second = torch.autograd.grad(network(seen).mean(), list(policy.parameters()))
    old, new = copy.deepcopy(policy), copy.deepcopy(policy)
    with torch.no_grad():
        for one, two, by_loss, by_network in zip(old.parameters(), new.parameters(), first, second, strict=True):
            one -= 0.7 * by_loss
            two -= 0.7 * by_loss + 0.7 * by_network
    states = inputs.validation_batch.observations
    expected = (loss_of(new, states) - loss_of(old, states)).tanh().detach()
    assert abs(float(expected)) > 1e-4
    found, _ = learner.meta_gradient(learning, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_it_begins_at_nothing_and_learns_from_there(agent):
    learning, inputs = learning_of_agent(agent), meta_inputs(transitions=True)
    learner = MetaCritic()
    learner.adopt(learner.begin(learning, RandomKey(1)))
    batch = batch_of(3)
    features = learning.features(batch.observations, None)
    assert float(learner.policy_auxiliary_loss(features, batch).detach()) == 0.0
    loss, gradients = learner.meta_gradient(learning, inputs)
    assert float(loss) == 0.0
    assert float(gradients["weights.2"].norm()) > 0
    losses = []
    for _ in range(30):
        loss, gradients = learner.meta_gradient(learning, inputs)
        losses.append(float(loss))
        learner.step(gradients)
    assert losses[-1] < losses[10] < 0.0
    assert float(learner.policy_auxiliary_loss(features, batch).detach()) != 0.0


def test_it_begins_from_the_key():
    learning = learning_of_agent("sac", double=False)
    torch.manual_seed(1)
    first = MetaCritic().begin(learning, RandomKey(1))
    torch.manual_seed(2)
    again = MetaCritic().begin(learning, RandomKey(1))
    assert all(tensor.equal(again[name]) for name, tensor in first.items())
    assert not first["weights.0"].equal(MetaCritic().begin(learning, RandomKey(2))["weights.0"])
    assert {name: list(tensor.shape) for name, tensor in first.items()} == {
        "weights.0": [64, 8 + 3 + 2],
        "biases.0": [64],
        "weights.1": [64, 64],
        "biases.1": [64],
        "weights.2": [1, 64],
        "biases.2": [1],
    }
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    bound = 1 / math.sqrt(13)
    assert 0.9 * bound < float(first["weights.0"].abs().max()) <= bound
    assert not first["weights.2"].any()
    without = MetaCritic(use_features=False, hidden_sizes=()).begin(learning, RandomKey(1))
    assert {name: list(tensor.shape) for name, tensor in without.items()} == {"weights.0": [1, 5], "biases.0": [1]}


def test_the_auxiliary_loss_reaches_the_policy_and_no_meta_parameter():
    learning = learning_of_agent("sac")
    learner = MetaCritic()
    learner.adopt(learner.begin(learning, RandomKey(1)))
    away(learner)
    batch = batch_of(3)
    features = learning.features(batch.observations, None).detach().requires_grad_()
    batch.actions.requires_grad_()
    learner.policy_auxiliary_loss(features, batch).backward()
    assert features.grad.any()
    assert batch.actions.grad.any()
    assert all(parameter.grad is None for parameter in learner.meta_parameters().values())


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_meta_step_changes_nothing_but_what_it_learns(tmp_path, engine):
    trainer = trainer_of(tmp_path, engine=engine)
    trainer.train()
    state, learner = trainer.rl_state.agent_state, trainer.learners[0]
    parameters = [p for network in (state.policy, state.critics) for p in network.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    before, learned, random = everything(trainer), learner.state_dict(), torch.get_rng_state()
    trainer.update_meta_learning_model(state.last_update.batch.observations, state.last_update.q)
    assert any(not tensor.equal(learned[name]) for name, tensor in learner.state_dict().items())
    assert_same(before, everything(trainer))
    assert torch.get_rng_state().equal(random)
    assert all(parameter.grad.eq(7.0).all() for parameter in parameters)


# The policy's step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "interval"), [("sac", None), ("sac", 3), ("td3", 3), ("ddpg", 3)])
def test_with_a_learning_rate_of_0_a_run_is_the_same_to_the_last_bit(tmp_path, agent, interval):
    """And so the loss that it begins with adds nothing to any policy step."""
    options = {"agent": agent, "meta_update_interval": interval, "engine": "torch"}
    shaped = trainer_of(tmp_path / "meta", MetaCritic(learning_rate=0.0), **options)
    plain = AgentTrainer(small(tmp_path / "plain", 60, **options), walk_feed())
    for trainer in (shaped, plain):
        trainer.train()
    assert plain.rl_state.agent_state.policy_updates > 10
    assert shaped.meta_steps == (0 if interval is None else 14)
    assert_same(everything(shaped), everything(plain))


@pytest.mark.parametrize(("agent", "engine"), [("sac", "torch"), ("sac", "auto"), ("td3", "auto"), ("ddpg", "auto")])
def test_once_it_has_learned_policies_learn_otherwise(tmp_path, agent, engine):
    options = {"agent": agent, "engine": engine}
    shaped = trainer_of(tmp_path / "meta", MetaCritic(learning_rate=0.01), **options)
    without = trainer_of(tmp_path / "without", MetaCritic(learning_rate=0.0), **options)
    for trainer in (shaped, without):
        trainer.train()
        assert trainer.skipped_meta_steps == 0
    assert isinstance(shaped.rl_state.agent_state.engine, TorchEngine if engine == "torch" else NativeCriticsEngine)
    assert shaped.learners[0].has_learned()
    assert not shaped.policy.head.weight.equal(without.policy.head.weight)


@pytest.mark.parametrize("use_features", [True, False])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_policy_steps_descend_both_losses(name, use_features):
    shaping = Shaping(MetaCritic(use_features=use_features))
    learner = Learner(name, meta=shaping)
    state, batch, key = learner.state, learner.state.replay.sample(40), RandomKey(3)
    own = learner.agent.policy_loss(state, batch, key)
    parts = [state.policy.features(batch.observations)] if use_features else []
    seen = torch.cat([*parts, batch.observations, own.actions], 1)
    auxiliary = network_of(shaping.learner)(seen).mean() - math.log(2)
    passes = []
    handle = state.policy.body.register_forward_hook(lambda *given: passes.append(given))
    both = learner.agent._update_parts(state).policy_loss(batch, key)
    handle.remove()
    assert len(passes) == 1
    assert not state.policy.body._forward_hooks
    assert abs(float(auxiliary.detach())) > 1e-3
    torch.testing.assert_close(both.loss, own.loss + auxiliary)
    parameters = list(state.policy.parameters())
    expected = torch.autograd.grad(own.loss + auxiliary, parameters)
    for gradient, truth in zip(torch.autograd.grad(both.loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sac", "td3", "ddpg"])
def test_native_critics_give_the_torch_engines_numbers(name):
    reference = Learner(name, meta=Shaping(MetaCritic()))
    native = Learner(name, meta=Shaping(MetaCritic()), engine="native")
    assert isinstance(native.state.engine, NativeCriticsEngine)
    assert isinstance(Learner(name, engine="native").state.engine, NativeEngine)
    go_beside(reference, native, 12, policy_every=2 if name == "td3" else 1)
    spec, update = native.agent._spec(native.state), native.agent._update_parts(native.state)
    assert "policy's loss is not one that it knows" in native_refusal(spec, update)


def test_features_are_those_that_a_loss_of_ones_own_learns_by():
    """Whatever passes it makes besides."""

    class Own(SAC):
        def policy_loss(self, state, batch, key):
            state.policy(batch.observations[:3])
            learned = super().policy_loss(state, batch, key)
            with torch.no_grad():
                state.policy(batch.observations)
            return learned

    class Detached(Own):
        def policy_loss(self, state, batch, key):
            return super().policy_loss(state, batch._replace(observations=batch.observations.clone()), key)

    losses = []
    for kind in (SAC, Own, Detached):
        learner = Learner("sac", kind=kind, meta=Shaping(MetaCritic()))
        loss = learner.agent._update_parts(learner.state).policy_loss(batch_of_rows(learner), RandomKey(3)).loss
        losses.append((loss, torch.autograd.grad(loss, list(learner.state.policy.parameters()))))
    for loss, gradients in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0])
        for gradient, truth in zip(gradients, losses[0][1], strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-6)


def batch_of_rows(learner):
    return learner.state.replay.sample(40, key=RandomKey(1))


@pytest.mark.parametrize("policy", [Plain, Featured])
def test_policies_of_ones_own_are_shaped_by_the_features_that_they_have(tmp_path, policy):
    trainer = trainer_of(tmp_path, MetaCritic(learning_rate=0.01), parts={"policy": policy()})
    trainer.train()
    assert trainer.skipped_meta_steps == 0
    assert trainer.learners[0].has_learned()
    width = trainer.learners[0].meta_parameters()["weights.0"].shape[1]
    assert width == 2 + (3 if policy is Featured else 0)


def test_it_learns_while_the_agent_acts(tmp_path):
    trainers = [trainer_of(tmp_path / name, parts={"overlap": name == "apart"}) for name in ("apart", "one")]
    for trainer in trainers:
        trainer.train()
        assert all(bool(parameter.isfinite().all()) for parameter in trainer.policy.parameters())
    apart, one = trainers
    assert isinstance(apart.rl_state.agent_state.engine, NativeCriticsEngine)
    assert (apart.meta_steps, apart.updates) == (one.meta_steps, one.updates)
    assert apart.learners[0].has_learned()


# Checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_carries_its_network(tmp_path):
    first = trainer_of(tmp_path)
    first.train()
    second = trainer_of(tmp_path)
    second.load(first.run_folder)
    assert second.learners[0].has_learned()
    for _ in range(2):
        ours, theirs = first.learners[0].state_dict(), second.learners[0].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
        states, q = torch.rand(8, 1), torch.zeros(2, 8)
        one, other = (trainer.update_meta_learning_model(states, q) for trainer in (first, second))
        assert one["meta/loss/critic"] == other["meta/loss/critic"]
    other = trainer_of(tmp_path / "other", MetaCritic(hidden_sizes=(8,)))
    before = other.learners[0].state_dict()
    with pytest.raises(ValueError, match=r"weights\.0 has shape"):
        other.load(first.run_folder)
    assert all(tensor.equal(before[name]) for name, tensor in other.learners[0].state_dict().items())


def test_the_config_names_it(tmp_path):
    config = small(tmp_path, meta="critic", meta_learning_rate=0.25)
    (learner,) = MetaLearnerTrainer(config, feed=walk_feed()).learners
    assert isinstance(learner, MetaCritic)
    assert learner.learning_rate == 0.25


# What goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "observations", "actions", "says"),
    [
        ("dqn", OBSERVATIONS, spaces.Discrete(3), "DQN has no policy"),
        ("sac_discrete", OBSERVATIONS, spaces.Discrete(3), "actions of DiscreteSAC are not continuous"),
        ("sac", spaces.Dict(a=OBSERVATIONS), ACTIONS, "observations are nested"),
        ("sac", spaces.Box(0, 255, (36, 36, 1), np.uint8), ACTIONS, r"observations are uint8\[36, 36, 1\]"),
        ("td3", spaces.Box(-1, 1, (2, 2)), ACTIONS, r"observations are float32\[2, 2\]"),
        ("sac", spaces.Discrete(4), ACTIONS, r"observations are int64\[\]"),
    ],
)
def test_agents_that_it_cannot_shape_are_refused(agent, observations, actions, says):
    config = AgentConfig(hyperparameters=Hyperparameters(agent=agent, batch_size=16, replay_capacity=100))
    with pytest.raises(ValueError, match=says):
        KINDS[agent](config).init(
            RandomKey(1), observation_space=observations, action_space=actions, meta=Shaping(MetaCritic())
        )


def test_features_that_are_no_matrix_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"features have shape \[2\] for 2 observations"):
        trainer_of(tmp_path, parts={"policy": Flat()})
    trainer_of(tmp_path, MetaCritic(use_features=False), parts={"policy": Flat()})


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"hidden_sizes is \(8, 0\); every width must be at least 1"):
        MetaCritic(hidden_sizes=(8, 0))
    with pytest.raises(ValueError, match="learning_rate is -1"):
        MetaCritic(learning_rate=-1.0)
    with pytest.raises(ValueError, match="inner is 'newton'"):
        MetaCritic(inner="newton")


def test_without_transitions_it_says_what_it_needs(tmp_path):
    trainer = trainer_of(tmp_path)
    before = trainer.learners[0].state_dict()
    with pytest.raises(ValueError, match="critic needs transitions, and there is no replay to draw them from"):
        trainer.update_meta_learning_model(torch.rand(8, 1), torch.zeros(2, 8))
    assert all(tensor.equal(before[name]) for name, tensor in trainer.learners[0].state_dict().items())
    batch, other = (
        b._replace(observations=b.observations[:, :1], next_observations=b.next_observations[:, :1])
        for b in (batch_of(seed, dtype=torch.float32) for seed in (1, 2))
    )
    metrics = trainer.update_meta_learning_model(
        torch.rand(8, 1), torch.zeros(2, 8), batch=batch, validation_batch=other
    )
    assert metrics["meta/loss/critic"] == 0.0
    assert trainer.learners[0].has_learned()


def test_a_policy_loss_that_names_no_actions_is_an_error(tmp_path):
    class Silent(SAC):
        def policy_loss(self, state, batch, key):
            return super().policy_loss(state, batch, key)._replace(actions=None)

    config = small(tmp_path)
    trainer = MetaLearnerTrainer(config, MetaCritic(), walk_feed(), agent=Silent(config))
    with pytest.raises(TypeError, match="policy_loss gave no actions"):
        trainer.train()
    with pytest.raises(TypeError, match="SAC's policy_loss gave no actions"):
        trainer.update_meta_learning_model(torch.rand(8, 1), torch.zeros(2, 8))


def test_actions_with_several_axes_are_taken_flat():
    class Matrix(PolicyModel):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def sample_actions(self, observations, deterministic=False, *, noise=None):
            actions = self.layer(observations).tanh().view(-1, 2, 2)
            return actions, torch.zeros(len(actions))

        def forward(self, observations):
            return self.sample_actions(observations)[0]

    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 1)

        def forward(self, observations, actions):
            return self.layer(torch.cat([observations, actions.flatten(1)], 1)).squeeze(-1).unsqueeze(0)

    shaping = Shaping(MetaCritic())
    config = AgentConfig(hyperparameters=Hyperparameters(agent="td3", batch_size=16, replay_capacity=100))
    TD3(config).init(
        RandomKey(1),
        observation_space=OBSERVATIONS,
        action_space=gymnasium.spaces.Box(-1, 1, (2, 2)),
        policy=Matrix(),
        critics=Values(),
        meta=shaping,
    )
    learner, inputs = shaping.learner, meta_inputs(torch.float32, transitions=True)
    assert learner.meta_parameters()["weights.0"].shape == (64, 3 + 4)
    loss, gradients = learner.meta_gradient(shaping.learning, inputs)
    assert bool(loss.isfinite())
    assert float(gradients["weights.0"].norm()) > 0
