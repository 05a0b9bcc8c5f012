"""Bootstrapped: its gradient, its target, what it leaves alone, and runs with it."""

from __future__ import annotations

import math

import pytest
import torch
from meta_parts import BOX, Bound, batch_of, check_gradients, learning_of_agent, meta_inputs, walk_feed
from torch.distributions import Normal, kl_divergence

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Service, Training, meta_trainer
from angle_rl.agents.sac import SAC
from angle_rl.meta import Bootstrapped, MetaEntropy, MetaGradient, MetaLearner
from angle_rl.meta.bootstrapped import gaussian_kl
from angle_rl.meta.inner import frozen, gradients_of
from angle_rl.meta_trainer import MetaLearnerTrainer
from angle_rl.models import PolicyModel
from angle_rl.types import RandomKey


class MetaRate(MetaLearner):
    """Learns the policy's step size, to make the mean actions' values high."""

    name = "rate"
    sets = ("policy_learning_rate",)

    def begin(self, learning, key):
        return {"log_rate": torch.tensor(math.log(0.1), dtype=torch.float64)}

    def inner_rate(self):
        return self.meta_parameters()["log_rate"].exp()

    def inner_loss(self, learning, parameters, batch, key):
        critics = frozen(learning.networks["critics"])
        return learning.policy_loss(batch, key, policy=parameters, critics=critics).loss

    def outer_loss(self, learning, parameters, inputs, key):
        states = inputs.validation_states
        return -learning.q_values(states, learning.actions(states, parameters), None).amin(0).mean()


class MetaScale(MetaLearner):
    """Learns what the critics' targets are multiplied by, against targets as they are."""

    name = "scale"
    trains = "critics"
    needs_transitions = True

    def begin(self, learning, key):
        return {"scale": torch.tensor(1.5, dtype=torch.float64)}

    def loss(self, learning, parameters, batch, key, scale):
        target = batch.rewards + batch.discounts * learning.next_values(batch, key).q.amin(0).detach()
        q = learning.q_values(batch.observations, batch.actions, parameters)
        return (q - scale * target).square().mean()

    def inner_loss(self, learning, parameters, batch, key):
        return self.loss(learning, parameters, batch, key, self.meta_parameters()["scale"])

    def outer_loss(self, learning, parameters, inputs, key):
        return self.loss(learning, parameters, inputs.validation_batch, key, 1.0)


class Held(Bootstrapped):
    """Keeps its first target."""

    kept = None

    def target(self, learning, inputs, reached):
        if self.kept is None:
            self.kept = super().target(learning, inputs, reached)
        return self.kept


CASES = {  # agent, learner, whether it needs transitions
    "sac": ("sac", MetaEntropy, {"entropy_coefficient": 0.2}),
    "td3": ("td3", MetaRate, {}),
    "critics": ("sac", MetaScale, {"entropy_coefficient": 0.2}),
}


def case(name, *, inner="sgd", kind=Bootstrapped, **options):
    """A learner, what it learns about, and the inputs of one meta step."""
    agent, learner, hyperparameters = CASES[name]
    learning = learning_of_agent(agent, **hyperparameters)
    inputs = meta_inputs(transitions=learner.needs_transitions)
    return kind(learner(inner=inner), **options), learning, inputs


def begun(name, **options):
    learner, learning, inputs = case(name, **options)
    learner.adopt(learner.begin(learning, RandomKey(5)))
    return learner, learning, inputs


# Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["kl", "parameters"])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("target_steps", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_gradient_is_that_of_the_distance_to_a_target_held_fixed(name, steps, target_steps, inner, distance):
    options = {"inner": inner, "steps": steps, "target_steps": target_steps, "distance": distance}
    check_gradients(*case(name, kind=Held, **options))


@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("steps", [1, 3])
def test_so_it_is_where_critics_learn(steps, inner):
    check_gradients(*case("critics", kind=Held, inner=inner, steps=steps, target_steps=2))


@pytest.mark.parametrize("agent", ["sac", "td3"])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_so_it_is_around_meta_gradient(agent, inner):
    learner = Held(MetaGradient(("discount", "reward_scale"), inner=inner), steps=2, target_steps=3)
    check_gradients(learner, learning_of_agent(agent), meta_inputs(transitions=True), step=1e-4)


def with_a_gradient(learner, learning, inputs, reached):
    """The target, written down again, with all its gradients: L - 1 inner steps, one on the outer loss."""
    state, inner = reached, learner.learner
    count = learner.steps + learner.target_steps - 1
    keys = inputs.key.split(1 + 2 * count)
    given = batch_of(11) if inputs.batch is None else inputs.batch
    for index in range(learner.steps, count):
        rows = given._make(part[index::count] for part in given)
        state = inner.inner_step(learning, state, rows, keys[1 + 2 * index])
    loss = inner.outer_loss(learning, state.parameters, inputs, keys[0])
    gradients = gradients_of(loss, state.parameters, differentiable=True)
    configured = torch.tensor(0.05, dtype=torch.float64)
    return inner.inner_optimizer(learning).step(state, gradients, configured).parameters


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("name", CASES)
def test_no_gradient_passes_through_the_target(name, inner):
    learner, learning, inputs = begun(name, inner=inner, steps=2, target_steps=3)
    if name == "td3":  # what was learned so far: the step on the fixed objective has the configured one
        learning.optimizers["policy"].param_groups[0]["lr"] = 0.3
    loss, gradients = learner.meta_gradient(learning, inputs)
    reached = learner.after_steps(learning, inputs)
    target = learner.target(learning, inputs, reached)
    full = with_a_gradient(learner, learning, inputs, reached)
    assert target.keys() == full.keys() == dict(learning.networks[learner.trains].named_parameters()).keys()
    for tensor_name, tensor in target.items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, full[tensor_name], rtol=1e-12, atol=1e-12)
        assert not tensor.equal(reached.parameters[tensor_name])
    through = learner.gradients(learner.distance_to(learning, inputs, reached.parameters, full))
    torch.testing.assert_close(loss, through[0])
    for parameter, gradient in gradients.items():
        assert abs(float(through[1][parameter] / gradient) - 1) > 1e-2


def test_steps_learn_from_rows_and_noise_of_their_own():
    learner, learning, inputs = begun("critics", steps=2, target_steps=3)
    seen = []
    original = learner.learner.inner_loss
    learner.learner.inner_loss = lambda learning, parameters, batch, key: (
        seen.append((batch, key)) or original(learning, parameters, batch, key)
    )
    learner.meta_gradient(learning, inputs)
    assert len(seen) == 4
    assert sorted(handle for batch, _ in seen for handle in batch.handles.tolist()) == list(range(16))
    assert len({key.value for _, key in seen} | {inputs.key.value}) == 5


def test_further_steps_draw_from_the_replay_where_it_has_rows():
    bound = Bound()
    hyperparameters = Hyperparameters(hidden_sizes=(8,), batch_size=6, entropy_coefficient=0.2)
    config = AgentConfig(hyperparameters=hyperparameters, training=Training(engine="torch"))
    state, _ = SAC(config).init(RandomKey(1), observation_space=BOX, action_space=BOX, meta=bound)
    learning, rows = bound.learning, torch.linspace(-1, 1, 40).unsqueeze(1)
    state.replay.insert(rows, rows, rows[:, 0], rows, torch.zeros(40, dtype=torch.bool))
    inputs = meta_inputs(torch.float32)._replace(states=rows[:5], validation_states=rows[5:9], initial_states=rows[9:])
    learner = Bootstrapped(MetaEntropy(), steps=2, target_steps=2)
    learner.adopt(learner.begin(learning, RandomKey(5)))
    seen = []
    original = learner.learner.inner_loss
    learner.learner.inner_loss = lambda learning, parameters, batch, key: (
        seen.append(batch.observations) or original(learning, parameters, batch, key)
    )
    before = state.replay.sample(6, key=RandomKey(2)).handles
    first = learner.meta_gradient(learning, inputs)
    assert [len(part) for part in seen] == [5, 6, 6]
    assert seen[0].equal(rows[:5])
    assert not seen[1].equal(seen[2])
    assert all(bool((part[:, None] == rows).all(-1).any(-1).all()) for part in seen)
    assert learner.meta_gradient(learning, inputs)[0] == first[0]  # the keys decide
    assert state.replay.sample(6, key=RandomKey(2)).handles.equal(before)


# Distances -----------------------------------------------------------------------------------------------------


def test_the_divergence_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    means, log_stds = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (Normal(mean, log_std.exp()) for mean, log_std in zip(means, log_stds, strict=True))
    expected = kl_divergence(first, second).sum(-1)
    torch.testing.assert_close(gaussian_kl((means[0], log_stds[0]), (means[1], log_stds[1])), expected)
    near = (means[0].float(), log_stds[0].float() + 1e-4)
    found = gaussian_kl((means[0].float(), log_stds[0].float()), near)
    torch.testing.assert_close(found, torch.full_like(found, 3e-8), rtol=0.1, atol=0)


def test_the_target_comes_first_in_the_divergence():
    learner, learning, inputs = begun("sac")
    reached = learner.after_steps(learning, inputs)
    target = learner.target(learning, inputs, reached)
    with torch.no_grad():
        outputs = [learning.policy_output(inputs.validation_states, at) for at in (target, reached.parameters)]
    first, second = (Normal(mean, log_std.exp()) for mean, log_std in outputs)
    expected = kl_divergence(first, second).sum(-1).mean()
    other = kl_divergence(second, first).sum(-1).mean()
    assert abs(float(expected / other) - 1) > 1e-4
    loss, _ = learner.meta_gradient(learning, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_distances_of_actions_and_of_parameters():
    learner, learning, inputs = begun("td3")
    reached = learner.after_steps(learning, inputs)
    target = learner.target(learning, inputs, reached)
    actions = [learning.actions(inputs.validation_states, at) for at in (target, reached.parameters)]
    expected = (actions[0] - actions[1]).square().sum(1).mean()
    torch.testing.assert_close(learner.meta_gradient(learning, inputs)[0], expected.detach())
    learner.distance = "parameters"
    began = dict(learning.networks["policy"].named_parameters())
    left, way = (
        torch.cat([(target[name] - tensor.detach()).reshape(-1) for name, tensor in at.items()])
        for at in (reached.parameters, began)
    )
    loss, _ = learner.meta_gradient(learning, inputs)
    torch.testing.assert_close(loss, left.square().mean() / way.square().mean())


def test_a_target_that_nothing_moves_is_at_no_distance():
    learner, learning, inputs = begun("td3", distance="parameters")
    learner.learner.inner_loss = learner.learner.outer_loss = lambda learning, parameters, *_: (
        0.0 * sum(tensor.sum() for tensor in parameters.values())
    )
    loss, gradients = learner.meta_gradient(learning, inputs)
    assert (float(loss), float(gradients["log_rate"])) == (0.0, 0.0)


def test_the_distance_follows_what_is_trained():
    assert Bootstrapped(MetaEntropy()).distance == "kl"
    assert Bootstrapped(MetaScale()).distance == "parameters"


def test_a_step_size_much_too_small_grows_since_the_target_lies_further_on():
    learner, learning, inputs = begun("td3", steps=2, target_steps=3)
    learner.learner._optimizer.param_groups[0]["lr"] = 0.05
    for index in range(30):
        _, gradients = learner.meta_gradient(learning, inputs._replace(key=RandomKey(index)))
        learner.step(gradients)
    assert learner.meta_parameters()["log_rate"].detach().exp() > 0.2  # from 0.1
    assert learner.has_learned()


# What it leaves alone, and hands on --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_meta_gradient_changes_nothing(name):
    learner, learning, inputs = begun(name, inner="adam", steps=2, target_steps=2)
    for network in learning.networks.values():
        for index, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5) if index % 2 else None

    def everything():
        kept = {f"meta.{name}": tensor for name, tensor in learner.state_dict().items()}
        kept |= {f"meta.{name}.grad": tensor.grad for name, tensor in learner.meta_parameters().items()}
        for part, network in learning.networks.items():
            kept |= {f"{part}.{name}": tensor for name, tensor in network.state_dict().items()}
            kept |= {f"{part}.{name}.grad": tensor.grad for name, tensor in network.named_parameters()}
            for index, slots in learning.optimizers[part].state_dict()["state"].items():
                kept |= {f"{part}.{index}.{slot}": value for slot, value in slots.items()}
        kept["random"] = torch.get_rng_state()
        return {name: None if tensor is None else tensor.clone() for name, tensor in kept.items()}

    before = everything()
    learner.meta_gradient(learning, inputs)
    after = everything()
    assert before.keys() == after.keys()
    for kept, tensor in before.items():
        assert (after[kept] is None) == (tensor is None), kept
        assert tensor is None or after[kept].equal(tensor), kept


def test_it_holds_what_the_learner_holds():
    inner = MetaEntropy(learning_rate=0.1, inner="adam")
    learner = Bootstrapped(inner)
    learning = learning_of_agent("sac", entropy_coefficient=0.2)
    assert (learner.name, learner.sets, learner.needs_transitions) == ("bootstrapped", inner.sets, False)
    assert (learner.learning_rate, learner.inner, learner.trains) == (0.1, "adam", "policy")
    assert (learner.meta_parameters(), learner.hyperparameters()) == ({}, {})
    learner.adopt(learner.begin(learning, RandomKey(5)))
    assert learner.meta_parameters() == inner.meta_parameters()
    learner.step({"log_entropy_coefficient": torch.tensor(1.0, dtype=torch.float64)})
    assert learner.hyperparameters() == inner.hyperparameters()
    assert learner.hyperparameters()["entropy_coefficient"] == pytest.approx(0.2 * math.exp(-0.1), rel=1e-6)
    other = MetaEntropy()  # a state of the learner, with or without the other around it
    other.adopt(other.begin(learning, RandomKey(5)))
    other.load_state_dict(learner.state_dict())
    assert other.hyperparameters() == learner.hyperparameters()
    with pytest.raises(ValueError, match="scale"):
        learner.load_state_dict(learner.state_dict() | {"parameters.scale": torch.zeros(())})
    needs = Bootstrapped(MetaScale())
    assert (needs.needs_transitions, needs.trains) == (True, "critics")
    assert needs.policy_auxiliary_loss(None, batch_of(1)) is None


# Bad input -----------------------------------------------------------------------------------------------------


class NoLosses(MetaLearner):
    name = "none"


class NoOuterLoss(MetaLearner):
    def inner_loss(self, learning, parameters, batch, key):
        return torch.zeros(())


@pytest.mark.parametrize(
    ("learner", "options", "error", "text"),
    [
        (object(), {}, TypeError, "object"),
        (NoLosses(), {}, ValueError, "inner_loss"),
        (NoOuterLoss(), {}, ValueError, "outer_loss"),
        (Bootstrapped(MetaEntropy()), {}, ValueError, "Bootstrapped"),
        (MetaEntropy(), {"steps": 0}, ValueError, r"steps is 0; .*\[1, inf\)"),
        (MetaEntropy(), {"steps": 1.5}, ValueError, "steps is 1.5"),
        (MetaEntropy(), {"target_steps": -1}, ValueError, "target_steps is -1"),
        (MetaEntropy(), {"distance": "euclid"}, ValueError, "'euclid'; it must be None or one of kl, parameters"),
        (MetaScale(), {"distance": "kl"}, ValueError, "critics; take 'parameters'"),
    ],
)
def test_bad_arguments_are_refused(learner, options, error, text):
    with pytest.raises(error, match=text):
        Bootstrapped(learner, **options)


def test_fewer_rows_than_steps_are_refused():
    learner, learning, inputs = begun("sac", steps=10, target_steps=8)
    with pytest.raises(ValueError, match="16 rows to train on; 17 inner steps"):
        learner.meta_gradient(learning, inputs)


def test_an_agent_that_the_learner_refuses_is_refused():
    with pytest.raises(ValueError, match="TD3 has no entropy coefficient"):
        Bootstrapped(MetaEntropy()).begin(learning_of_agent("td3"), RandomKey(0))


def test_a_policy_whose_divergence_nobody_knows_is_refused():
    learner, learning, inputs = begun("sac")
    object.__setattr__(learning, "policy_output", lambda observations, parameters: {"logits": observations})
    with pytest.raises(ValueError, match="gives a dict; 'kl' reads"):
        learner.meta_gradient(learning, inputs)


# Runs ----------------------------------------------------------------------------------------------------------


def small(folder, steps=80, **hyperparameters):
    defaults = {
        "hidden_sizes": (16,),
        "batch_size": 8,
        "learning_starts": 20,
        "replay_capacity": 1000,
        "entropy_coefficient": 0.2,
        "meta_update_interval": 5,
    }
    return AgentConfig(
        hyperparameters=Hyperparameters(**defaults | hyperparameters),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=2),
        service=Service(run_folder=str(folder), tensorboard=False),
    )


def parameters(trainer):
    """The networks' parameters."""
    return [tensor.clone() for part in (trainer.policy, trainer.critics) for tensor in part.state_dict().values()]


def same(first, second):
    return all(one.equal(other) for one, other in zip(parameters(first), parameters(second), strict=True))


def entropy_coefficient(trainer):
    return float(trainer.rl_state.agent_state.entropy_coefficient)


def test_learning_rate_0_leaves_a_run_as_it_was_and_another_does_not(tmp_path):
    plain = AgentTrainer(small(tmp_path / "plain", meta_update_interval=None), walk_feed())
    plain.train()
    runs = {}
    for rate in (0.0, 0.05):
        learner = Bootstrapped(MetaEntropy(learning_rate=rate), steps=2, target_steps=2)
        runs[rate] = MetaLearnerTrainer(small(tmp_path / str(rate)), learner, walk_feed())
        runs[rate].train()
        assert (runs[rate].meta_steps, runs[rate].skipped_meta_steps) == (12, 0)
    assert same(plain, runs[0.0])
    assert not same(plain, runs[0.05])
    assert entropy_coefficient(runs[0.0]) == entropy_coefficient(plain)
    assert entropy_coefficient(runs[0.05]) != entropy_coefficient(plain)
    metrics = runs[0.05].meta_metrics()
    assert metrics["meta/loss/bootstrapped"] > 0
    assert metrics["meta/entropy_coefficient"] == pytest.approx(entropy_coefficient(runs[0.05]), rel=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"meta": "bootstrapped", "meta_parameters": ("entropy_coefficient",), "meta_learning_rate": 0.05}
    whole = MetaLearnerTrainer(small(tmp_path / "whole", **options), feed=walk_feed())
    assert isinstance(whole.learners[0], Bootstrapped)
    assert isinstance(whole.learners[0].learner, MetaEntropy)
    assert whole.learners[0].learning_rate == 0.05
    whole.train()
    half = MetaLearnerTrainer(small(tmp_path / "half", 50, **options), feed=walk_feed())
    half.train()
    resumed = MetaLearnerTrainer.resume(half.run_folder, small(tmp_path / "half", **options), feed=walk_feed())
    assert resumed.learners[0].hyperparameters() == half.learners[0].hyperparameters() != {}
    resumed.train()
    assert resumed.meta_steps == whole.meta_steps == 12
    assert same(whole, resumed)
    for name, tensor in whole.learners[0].state_dict().items():
        assert resumed.learners[0].state_dict()[name].equal(tensor), name


def test_the_config_wraps_meta_gradient_for_other_parameters(tmp_path, monkeypatch):
    monkeypatch.setitem(meta_trainer.LEARNERS, "gradient", lambda config: MetaScale())
    config = small(tmp_path, meta="bootstrapped", meta_parameters=("discount",))
    learner = MetaLearnerTrainer(config, feed=walk_feed()).learners[0]
    assert isinstance(learner, Bootstrapped)
    assert isinstance(learner.learner, MetaScale)


class FirstNaN(MetaEntropy):
    """Whose first objective is not a number."""

    calls = 0

    def outer_loss(self, learning, parameters, inputs, key):
        self.calls += 1
        return super().outer_loss(learning, parameters, inputs, key) * (math.nan if self.calls == 1 else 1.0)


def test_a_target_that_is_not_finite_is_skipped(tmp_path):
    learner = Bootstrapped(FirstNaN(learning_rate=0.05))
    trainer = MetaLearnerTrainer(small(tmp_path, 25), learner, walk_feed())
    trainer.train()
    assert (trainer.meta_steps, trainer.skipped_meta_steps) == (1, 1)
    assert not learner.has_learned()
    assert entropy_coefficient(trainer) == pytest.approx(0.2)
    assert all(bool(tensor.isfinite().all()) for tensor in parameters(trainer))
    trainer.update_meta_learning_model(torch.rand(8, 1), torch.zeros(2, 8))
    assert (trainer.meta_steps, trainer.skipped_meta_steps) == (2, 1)
    assert learner.has_learned()


class OwnPolicy(PolicyModel):
    """A policy of one's own, with a part that does not learn."""

    def __init__(self):
        super().__init__([-1.0], [1.0])
        self.base = torch.nn.Linear(1, 4).requires_grad_(False)
        self.top = torch.nn.Linear(4, 2)

    def forward(self, observations):
        mean, log_std = self.top(self.base(observations).tanh()).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


def test_a_policy_of_ones_own_with_frozen_parts(tmp_path):
    torch.manual_seed(0)
    learner = Bootstrapped(MetaEntropy(learning_rate=0.05), steps=2)
    trainer = MetaLearnerTrainer(small(tmp_path, 40), learner, walk_feed(), policy=OwnPolicy())
    trainer.train()
    assert (trainer.meta_steps, trainer.skipped_meta_steps) == (4, 0)
    assert learner.has_learned()
