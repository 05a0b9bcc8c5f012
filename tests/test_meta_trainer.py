"""MetaLearnerTrainer: what its steps leave alone, what they carry over, and what goes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from meta_parts import walk_feed

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Service, Training
from angle_rl.meta import MetaEntropy, MetaLearner
from angle_rl.meta_trainer import MetaLearnerTrainer


def small(folder, steps=120, *, engine="auto", **hyperparameters):
    defaults = {
        "hidden_sizes": (16,),
        "batch_size": 8,
        "learning_starts": 20,
        "replay_capacity": 1000,
        "entropy_coefficient": 0.2,
        "meta_update_interval": 3,
    }
    return AgentConfig(
        hyperparameters=Hyperparameters(**(defaults | hyperparameters)),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=2, engine=engine),
        service=Service(run_folder=str(folder), tensorboard=False, log_interval=10),
    )


def everything(trainer):
    """All that a run learns, its optimisers' moments, its random state, counters and replay; not what is meta."""
    tensors, values = trainer._exported()
    kept = {n: t.clone() for n, t in tensors.items() if not n.startswith(("meta.", "feed."))}
    facts = {name: value for name, value in values.items() if name not in ("config", "meta")}
    return kept, json.loads(json.dumps(facts))


def assert_same(first, second):
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert tensor.equal(second[0][name]), name


class Spoiled(MetaEntropy):
    """Its loss is NaN in the steps named."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.calls = steps, 0

    def meta_gradient(self, learning, inputs):
        self.calls += 1
        loss, gradients = super().meta_gradient(learning, inputs)
        return (loss * float("nan"), gradients) if self.calls in self.steps else (loss, gradients)


class Greedy(MetaLearner):
    """Wants transitions and does nothing with them."""

    name = "greedy"
    needs_transitions = True

    def begin(self, learning, key):
        return {"x": torch.zeros(())}

    def meta_gradient(self, learning, inputs):
        self.seen = inputs
        return torch.zeros(()), {"x": torch.zeros(())}


# The loop ------------------------------------------------------------------------------------------------------


def test_a_meta_step_comes_at_every_multiple_of_its_interval(tmp_path):
    trainer = MetaLearnerTrainer(small(tmp_path), MetaEntropy(), walk_feed())
    assert trainer.meta is trainer
    trainer.train()
    assert trainer.meta_steps == 40 - 6  # multiples of 3 up to 120, without those up to 20
    assert trainer.skipped_meta_steps == 0


@pytest.mark.parametrize(("interval", "steps"), [("auto", 10), (None, 0)])
def test_auto_is_every_tenth_step_and_none_is_off(tmp_path, interval, steps):
    trainer = MetaLearnerTrainer(small(tmp_path, meta_update_interval=interval), MetaEntropy(), walk_feed())
    trainer.train()
    assert trainer.meta_steps == steps


def test_a_trainer_that_holds_a_meta_trainer_does_as_the_meta_trainer_itself(tmp_path):
    own = MetaLearnerTrainer(small(tmp_path / "own"), MetaEntropy(learning_rate=0.1), walk_feed())
    own.train()
    meta = MetaLearnerTrainer(small(tmp_path / "unused"), MetaEntropy(learning_rate=0.1), walk_feed())
    holder = AgentTrainer(small(tmp_path / "holder"), walk_feed(), meta=meta)
    assert holder.meta is meta
    holder.train()
    assert meta.meta_steps == own.meta_steps
    assert float(holder.rl_state.agent_state.entropy_coefficient) != pytest.approx(0.2)
    # The holder's meta trainer was bound twice, and so draws with other keys.
    assert own.learners[0].hyperparameters().keys() == meta.learners[0].hyperparameters().keys()


def test_the_hyperparameter_that_was_learned_is_the_agents(tmp_path):
    trainer = MetaLearnerTrainer(small(tmp_path), MetaEntropy(learning_rate=0.05), walk_feed())
    trainer.train()
    learned = trainer.learners[0].hyperparameters()["entropy_coefficient"]
    assert learned != pytest.approx(0.2, rel=0.01)
    assert float(trainer.rl_state.agent_state.entropy_coefficient) == pytest.approx(learned, rel=1e-6)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_learning_rate_of_0_leaves_the_run_as_it_is_without(tmp_path, engine):
    config = small(tmp_path / "meta", engine=engine)
    with_it = MetaLearnerTrainer(config, MetaEntropy(learning_rate=0.0), walk_feed())
    without = AgentTrainer(config.replace(run_folder=str(tmp_path / "plain")), walk_feed())
    for trainer in (with_it, without):
        trainer.train()
    assert with_it.meta_steps > 0
    assert_same(everything(with_it), everything(without))


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_meta_step_changes_nothing_but_what_it_learns(tmp_path, engine):
    trainer = MetaLearnerTrainer(small(tmp_path, engine=engine), MetaEntropy(learning_rate=0.1), walk_feed())
    trainer.train()
    state = trainer.rl_state.agent_state
    networks = [state.policy, state.critics, state.target_critics]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    before = everything(trainer)
    identities = [id(parameter) for parameter in parameters]
    learned = trainer.learners[0].hyperparameters()
    metrics = trainer.update_meta_learning_model(state.last_update.batch.observations, state.last_update.q)
    assert trainer.learners[0].hyperparameters() != learned
    assert np.isfinite(metrics["meta/loss/entropy"])
    assert_same(before, everything(trainer))
    assert [id(parameter) for network in networks for parameter in network.parameters()] == identities
    assert all(parameter.requires_grad == parameter.is_leaf for parameter in state.policy.parameters())
    assert all(parameter.grad.eq(7.0).all() for parameter in parameters)
    assert torch.rand(4).equal(expected)


def test_runs_repeat_themselves(tmp_path):
    runs = []
    for number in range(2):
        trainer = MetaLearnerTrainer(small(tmp_path / str(number)), MetaEntropy(learning_rate=0.1), walk_feed())
        trainer.train()
        runs.append((everything(trainer), trainer.learners[0].hyperparameters()))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# Checkpoints, metrics ------------------------------------------------------------------------------------------


def test_a_checkpoint_carries_what_was_learned(tmp_path):
    first = MetaLearnerTrainer(small(tmp_path), MetaEntropy(learning_rate=0.1), walk_feed())
    first.train()
    second = MetaLearnerTrainer(small(tmp_path), MetaEntropy(learning_rate=0.1), walk_feed())
    second.load(first.run_folder)
    assert second.learners[0].hyperparameters() == first.learners[0].hyperparameters()
    assert second.rl_state.agent_state.entropy_coefficient.equal(first.rl_state.agent_state.entropy_coefficient)
    assert (second.meta_steps, second._meta_key) == (first.meta_steps, first._meta_key)
    states, q = torch.rand(8, 1), torch.zeros(2, 8)
    one, other = (t.update_meta_learning_model(states, q) for t in (first, second))
    assert one["meta/loss/entropy"] == other["meta/loss/entropy"]  # the ring of reset observations came back, too
    assert first.learners[0].hyperparameters() == second.learners[0].hyperparameters()


def test_checkpoints_with_and_without_meta_learners_are_told_apart(tmp_path):
    plain = AgentTrainer(small(tmp_path / "plain"), walk_feed())
    plain.train()
    meta = MetaLearnerTrainer(small(tmp_path / "meta"), MetaEntropy(learning_rate=0.1), walk_feed())
    meta.train()
    before = everything(plain)
    with pytest.raises(ValueError, match="has meta-learners, and this trainer has none"):
        plain.load(meta.run_folder)
    assert_same(everything(plain), before)
    with pytest.raises(ValueError, match="has no meta-learners, and this trainer has some"):
        meta.load(plain.run_folder)
    plain.load(meta.run_folder, without_meta=True)
    assert all(p.equal(q) for p, q in zip(plain.policy.parameters(), meta.policy.parameters(), strict=True))


def test_metrics_and_a_plot_show_what_is_learned(tmp_path):
    trainer = MetaLearnerTrainer(small(tmp_path), MetaEntropy(learning_rate=0.1), walk_feed())
    trainer.train()
    lines = [json.loads(line) for line in (trainer.run_folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "meta/entropy_coefficient" in line]
    assert found[0]["meta/entropy_coefficient"] != found[-1]["meta/entropy_coefficient"]
    assert {"meta/loss/entropy", "meta/skipped", "meta/time_share"} <= found[-1].keys()
    assert 0 < found[-1]["meta/time_share"] < 1
    assert (trainer.run_folder / "hyperparameters.png").read_bytes()[:4] == b"\x89PNG"
    plain = AgentTrainer(small(tmp_path / "plain"), walk_feed())
    plain.train()
    assert not (plain.run_folder / "hyperparameters.png").exists()


# What goes wrong -----------------------------------------------------------------------------------------------


def test_a_meta_loss_that_is_not_finite_is_skipped_and_counted(tmp_path):
    learner = Spoiled({2, 3})
    trainer = MetaLearnerTrainer(small(tmp_path), learner, walk_feed())
    trainer.train()
    assert trainer.skipped_meta_steps == 2
    assert trainer.meta_steps == learner.calls
    assert np.isfinite(learner.hyperparameters()["entropy_coefficient"])
    only = Spoiled({1})
    skipping = MetaLearnerTrainer(small(tmp_path / "only"), only, walk_feed())
    before = {name: p.detach().clone() for name, p in only.meta_parameters().items()}
    skipping.update_meta_learning_model(torch.rand(8, 1), torch.zeros(2, 8))
    assert all(p.detach().equal(before[name]) for name, p in only.meta_parameters().items())


def test_states_that_are_too_few_are_refused(tmp_path):
    trainer = MetaLearnerTrainer(small(tmp_path), MetaEntropy(), walk_feed())
    for rows in (0, 1):
        with pytest.raises(ValueError, match=f"states has {rows} rows; at least 2"):
            trainer.update_meta_learning_model(torch.rand(rows, 1), torch.zeros(2, rows))
    assert trainer.meta_steps == 0


def test_transitions_come_from_the_replay_or_the_caller(tmp_path):
    learner = Greedy()
    trainer = MetaLearnerTrainer(small(tmp_path), learner, walk_feed())
    states, q = torch.rand(8, 1), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"greedy needs transitions.*pass batch= and validation_batch="):
        trainer.update_meta_learning_model(states, q)
    assert trainer.meta_steps == 0
    trainer.train()
    trainer.update_meta_learning_model(states, q)
    assert not learner.seen.batch.handles.equal(learner.seen.validation_batch.handles)
    given = trainer.replay.sample(4)
    trainer.update_meta_learning_model(states, q, batch=given, validation_batch=given)
    assert learner.seen.batch is given


@pytest.mark.parametrize(
    ("changes", "learner", "message"),
    [
        ({"entropy_coefficient": "auto"}, MetaEntropy, "entropy_coefficient is 'auto' and MetaEntropy learns it"),
        ({"entropy_coefficient": 0.0}, MetaEntropy, "entropy_coefficient is 0.0; MetaEntropy begins with one above 0"),
        ({"agent": "td3", "entropy_coefficient": "auto"}, MetaEntropy, "TD3 has no entropy coefficient"),
        ({}, lambda: None, "learner is None and the config's meta"),
        ({}, list, "learner is empty"),
        ({}, lambda: [MetaEntropy(), MetaEntropy()], "two learners set entropy_coefficient"),
        ({}, lambda: MetaEntropy(learning_rate=-1.0), r"learning_rate is -1.0; it must lie in \[0, inf\)"),
        ({}, lambda: MetaEntropy(inner="newton"), "inner is 'newton'; it must be one of sgd, adam, rmsprop"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, changes, learner, message):
    with pytest.raises(ValueError, match=message):
        MetaLearnerTrainer(small(tmp_path, **changes), learner(), walk_feed())


def test_discrete_actions_have_no_mean_to_look_through(tmp_path):
    config = small(tmp_path, agent="sac_discrete").replace(environment="CartPole-v1")
    with pytest.raises(ValueError, match="actions are discrete"):
        MetaLearnerTrainer(config, MetaEntropy())


def test_wrong_kinds_are_refused(tmp_path):
    with pytest.raises(TypeError, match="learner is a int; it must be a MetaLearner"):
        MetaLearnerTrainer(small(tmp_path), [3], walk_feed())
    with pytest.raises(TypeError, match="its own meta trainer"):
        MetaLearnerTrainer(small(tmp_path), MetaEntropy(), walk_feed(), meta=object())
    with pytest.raises(ValueError, match="the config's meta is 'entropy'; a MetaLearnerTrainer trains it"):
        AgentTrainer(small(tmp_path, meta="entropy"), walk_feed())
    for interval in (0, -1):
        with pytest.raises(ValueError, match="meta_update_interval"):
            small(tmp_path, meta_update_interval=interval)
