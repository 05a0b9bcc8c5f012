"""MetaGradient: its gradients, its bounds, where what it learned arrives, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from meta_parts import Bound, batch_of, check_gradients, learning_of_agent, meta_inputs
from test_meta_trainer import assert_same, everything, small, walk_feed

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Training
from angle_rl.agents import DDPG, DQN
from angle_rl.agents.learning import set_hyperparameters
from angle_rl.meta import MetaGradient
from angle_rl.meta.gradient import BOUNDS, critics_loss, discounted
from angle_rl.meta.inner import frozen
from angle_rl.meta_trainer import MetaLearnerTrainer
from angle_rl.types import RandomKey

ALL = ("discount", "reward_scale", "loss_weights", "entropy_coefficient", "critic_learning_rate")
WITHOUT_ENTROPY = ("discount", "reward_scale", "loss_weights", "critic_learning_rate")
FOR_ONE_CRITIC = ("discount", "reward_scale", "critic_learning_rate")
SETS = {"sac": ALL, "td3": WITHOUT_ENTROPY, "ddpg": FOR_ONE_CRITIC, "dqn": FOR_ONE_CRITIC}
REFERENCE = {"discount": 0.95, "reward_scale": 1.3}


def learning_of(agent, **hyperparameters):
    """What an agent of this name shows, in float64; SAC's entropy coefficient is fixed."""
    if agent in ("sac", "td3"):
        fixed = {"entropy_coefficient": 0.2} if agent == "sac" else {}
        return learning_of_agent(agent, **(fixed | hyperparameters))
    defaults = {"hidden_sizes": (8, 8), "batch_size": 16, "activation": "tanh", "learning_rate": 0.05}
    settings = Hyperparameters(agent=agent, **(defaults | hyperparameters))
    config = AgentConfig(hyperparameters=settings, training=Training(engine="torch"))
    bound, options = Bound(), {"observation_space": spaces.Box(-1, 1, (3,))}
    if agent == "ddpg":
        state, _ = DDPG(config).init(
            RandomKey(1), **options, action_space=spaces.Box(np.float32([-2, -1]), np.float32([1, 3])), meta=bound
        )
        for name in state.networks:
            getattr(state, name).double()
    else:
        torch.manual_seed(0)
        critics = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
        state, _ = DQN(config).init(
            RandomKey(1), **options, action_space=spaces.Discrete(4), critics=critics, meta=bound
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # targets of their own
        for parameter in state.target_critics.parameters():
            parameter += 0.2
    for parameter in state.critics.parameters():  # one step old
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    state.optimizers["critics"].step()
    state.optimizers["critics"].zero_grad(set_to_none=True)
    return bound.learning


def inputs_of(agent, **replaced):
    inputs = meta_inputs(transitions=True)
    if agent == "dqn":
        training, validation = (
            one._replace(actions=one.handles % 4) for one in (inputs.batch, inputs.validation_batch)
        )
        inputs = inputs._replace(batch=training, validation_batch=validation)
    return inputs._replace(**replaced)


def begun(parameters=("discount",), agent="sac", learning=None, **options):
    learner = MetaGradient(parameters, **options)
    learning = learning_of(agent) if learning is None else learning
    learner.adopt(learner.begin(learning, RandomKey(0)))
    return learner, learning


# Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("agent", "parameters"),
    [(agent, part) for agent, names in SETS.items() for part in (*[(name,) for name in names], names)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_each_hyperparameter_has_the_gradient_of_the_loss(agent, parameters, inner):
    learner = MetaGradient(parameters, inner=inner, reference=REFERENCE)
    check_gradients(learner, learning_of(agent), inputs_of(agent), step=1e-4)


@pytest.mark.parametrize("options", [{"huber_delta": 0.5}, {"critics": 3}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_the_gradient_is_right_for_other_critics_and_errors(agent, options):
    learning = learning_of(agent, **options)
    check_gradients(MetaGradient(SETS[agent], reference=REFERENCE), learning, inputs_of(agent), step=1e-4)


@pytest.mark.parametrize("double_q", [False, True])
def test_dqns_target_is_of_the_network_that_learns_or_of_the_target(double_q):
    learning = learning_of("dqn", double_q=double_q)
    learner, _ = begun(agent="dqn", learning=learning)
    batch = inputs_of("dqn").batch
    other = {name: -3.0 * tensor for name, tensor in frozen(learning.networks["critics"]).items()}
    values = learning.next_values(batch, RandomKey(0), critics=other).q
    own = learning.next_values(batch, RandomKey(0)).q
    assert torch.equal(values, own) != double_q  # the replaced network chooses, where it is to choose
    check_gradients(learner, learning, inputs_of("dqn"), step=1e-4)


@pytest.mark.parametrize("delta", [None, 0.4])
def test_the_loss_is_numpys(delta):
    """mean(w sum_k c_k error(Q_k - y)) with y = scale r + [discounts > 0] discount^steps (min Q' - alpha log pi)."""
    learner, learning = begun(ALL, learning=learning_of("sac", huber_delta=delta))
    learning.set_hyperparameters({"discount": 0.7, "reward_scale": 3.0, "loss_weight_0": 0.5, "loss_weight_1": 1.5})

    def error(difference):
        size = np.abs(difference)
        return size**2 if delta is None else np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))

    with torch.no_grad():
        for raw, move in zip(learner.meta_parameters().values(), (0.3, -0.2, 0.5, 0.1, 0.0), strict=True):
            raw += move
            raw.view(-1)[-1] -= 0.4
    eta = learner.hyperparameters()
    batch, key = batch_of(7), RandomKey(3)
    future = learning.next_values(batch, key)
    q = learning.q_values(batch.observations, batch.actions, None).detach().numpy()
    value = future.q.detach().numpy().min(0) - eta["entropy_coefficient"] * future.log_prob.detach().numpy()
    not_ended = batch.discounts.numpy() > 0
    target = eta["reward_scale"] * batch.rewards.numpy() + not_ended * eta["discount"] * value
    weights = np.array([[eta["loss_weight_0"]], [eta["loss_weight_1"]]])
    expected = np.mean(batch.importance_weights.numpy() * (weights * error(q - target)).sum(0))
    parameters = {n: p.requires_grad_() for n, p in frozen(learning.networks["critics"]).items()}
    assert learner.inner_loss(learning, parameters, batch, key).item() == pytest.approx(expected, rel=1e-6)
    fixed = 1.0 * batch.rewards.numpy() + not_ended * 0.99 * (
        future.q.detach().numpy().min(0) - 0.2 * future.log_prob.detach().numpy()
    )
    expected = np.mean(batch.importance_weights.numpy() * error(q - fixed).sum(0))
    found = learner.outer_loss(learning, parameters, inputs_of("sac", validation_batch=batch), key)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_target_is_a_constant_to_the_critics():
    """The gradient by the critics is that of the squared error alone, and in double Q-learning these critics choose."""
    for agent in ("sac", "dqn"):
        learner, learning = begun(agent=agent)
        batch = inputs_of(agent).batch
        own = frozen(learning.networks["critics"])
        parameters = {name: (-3.0 * tensor).requires_grad_() for name, tensor in own.items()}
        loss = learner.inner_loss(learning, parameters, batch, RandomKey(1))
        with torch.no_grad():
            future = learning.next_values(batch, RandomKey(1), critics=parameters)
            value = future.q.amin(0)
            if future.log_prob is not None:
                value = value - future.entropy_coefficient * future.log_prob
            target = batch.rewards + batch.discounts * value
        q = learning.q_values(batch.observations, batch.actions, parameters)
        plain = (batch.importance_weights * (q - target).square().sum(0)).mean()
        for one, other in zip(
            torch.autograd.grad(loss, list(parameters.values()), retain_graph=True),
            torch.autograd.grad(plain, list(parameters.values())),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_ended_rows_stay_ended_and_the_discount_goes_to_the_power_of_steps():
    batch = batch_of(1)._replace(steps=torch.arange(16) % 3 + 1)
    discount = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = discounted(batch, discount)
    expected = torch.where(batch.discounts > 0, 0.5 ** batch.steps.double(), 0.0)
    assert torch.equal(found, expected)
    slope = torch.where(batch.discounts > 0, batch.steps * 0.5 ** (batch.steps - 1).double(), 0.0).sum()
    assert torch.autograd.grad(found.sum(), discount)[0].item() == pytest.approx(slope.item())
    assert discounted(batch_of(1, dtype=torch.float32), discount).dtype == torch.float32


def test_what_is_not_learned_is_as_it_is_now():
    learner, learning = begun(("discount",))
    batch, key = batch_of(7), RandomKey(3)
    parameters = {n: p.requires_grad_() for n, p in frozen(learning.networks["critics"]).items()}
    before = learner.inner_loss(learning, parameters, batch, key)
    learning.set_hyperparameters({"reward_scale": 2.0, "loss_weight_0": 0.5, "loss_weight_1": 1.5})
    expected = critics_loss(
        learning,
        parameters,
        batch,
        key,
        reward_scale=2.0,
        entropy_coefficient=torch.tensor(0.2),
        loss_weights=torch.tensor([0.5, 1.5]),
    )
    after = learner.inner_loss(learning, parameters, batch, key)
    assert after.item() == pytest.approx(expected.item(), rel=1e-6)
    assert after.item() != pytest.approx(before.item(), rel=1e-3)


# Between the bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "configured",
    [{}, {"discount": 0.5, "entropy_coefficient": 3.0, "learning_rate": 3e-4}, {"discount": 0.999}],
    ids=str,
)
def test_it_begins_with_what_is_configured(configured):
    learner, learning = begun(ALL, learning=learning_of("sac", **configured))
    assert learner.hyperparameters() == {}
    for name, raw in learner.meta_parameters().items():
        assert raw.dtype == torch.float64
        value = learner.ranges[name].value(raw.detach())
        if name == "loss_weights":
            assert value.tolist() == [1.0, 1.0]
        else:
            assert value.item() == pytest.approx(learning.hyperparameters[name], rel=1e-13)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("bounds", [None, {"discount": (0.8, 0.995), "critic_learning_rate": (0.04, 0.06)}], ids=str)
def test_no_gradient_leads_out_of_the_bounds(sign, bounds):
    learner, _ = begun(ALL, learning_rate=50.0, bounds=bounds)
    for step in range(40):
        gradients = {name: sign * 1e30 * torch.ones_like(raw) for name, raw in learner.meta_parameters().items()}
        gradients["loss_weights"][0] *= -1
        learner.step(gradients)
        values = learner.hyperparameters()
        for name in set(ALL) - {"loss_weights"}:
            low, high = (bounds or {}).get(name, (BOUNDS[name].low, BOUNDS[name].high))
            assert low <= values[name] <= high, (step, name)
        weights = [values["loss_weight_0"], values["loss_weight_1"]]
        assert sum(weights) == pytest.approx(2.0)
        assert max(weights) / min(weights) <= 100.0 * (1 + 1e-9)
    low, high = (bounds or {}).get("discount", (0.01, 0.9999))
    assert values["discount"] == pytest.approx(low if sign > 0 else high)
    assert 0.0 < values["discount"] < 1.0


def test_only_what_has_changed_is_set():
    learner, _ = begun(("discount", "critic_learning_rate"))
    learner.step({"discount": torch.tensor(1.0, dtype=torch.float64)})
    assert set(learner.hyperparameters()) == {"discount"}


# In a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_what_it_learns_reaches_the_replay_and_the_engine(tmp_path, engine):
    learner = MetaGradient(ALL, learning_rate=0.1)
    trainer = MetaLearnerTrainer(small(tmp_path, engine=engine), learner, walk_feed())
    state = trainer.rl_state.agent_state
    assert state.engine.name == engine
    trainer.train()
    assert trainer.meta_steps > 0
    assert trainer.skipped_meta_steps == 0
    values = learner.hyperparameters()
    assert state.replay.discount == values["discount"] != 0.99
    assert state.reward_scale == values["reward_scale"] != 1.0
    assert state.entropy_coefficient.item() == pytest.approx(values["entropy_coefficient"])
    assert state.loss_weights.tolist() == [values["loss_weight_0"], values["loss_weight_1"]]
    assert {group["lr"] for group in state.optimizers["critics"].param_groups} == {values["critic_learning_rate"]}
    # An update reads them: with what was configured it has another loss.
    key, replay_state = RandomKey(4), state.replay.export_state()
    replay_state = ({name: np.array(array) for name, array in replay_state[0].items()}, replay_state[1])
    learned = state.engine.update(key, 0)
    found = learned.batch.discounts[learned.batch.discounts > 0]
    assert found.numpy() == pytest.approx(values["discount"], rel=1e-6)
    loss = learned.critic_loss.item()
    assert math.isfinite(loss)
    for name in ("discount", "reward_scale", "loss_weight_0"):
        one, other = (
            MetaLearnerTrainer(small(tmp_path / name / str(i), engine=engine), MetaGradient(ALL), walk_feed())
            for i in range(2)
        )
        given = {"discount": 0.5, "reward_scale": 2.0, "loss_weight_0": 1.9}[name]
        losses = []
        for trained, changes in ((one, {}), (other, {name: given})):
            own = trained.rl_state.agent_state
            own.replay.import_state(*replay_state)
            changes = changes | ({"loss_weight_1": 0.1} if name == "loss_weight_0" and changes else {})
            set_hyperparameters(own, changes)
            losses.append(own.engine.update(key, 0).critic_loss.item())
        assert losses[0] != pytest.approx(losses[1], rel=1e-4), name


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_learning_rate_of_0_leaves_a_run_as_it_is_without(tmp_path, engine):
    plain = AgentTrainer(small(tmp_path / "plain", engine=engine, meta_update_interval=None), walk_feed())
    plain.train()
    learner = MetaGradient(ALL, learning_rate=0.0)
    meta = MetaLearnerTrainer(small(tmp_path / "meta", engine=engine), learner, walk_feed())
    meta.train()
    assert meta.meta_steps > 0
    assert meta.learners[0].hyperparameters() == {}
    assert_same(everything(plain), everything(meta))


def test_a_resumed_run_goes_on_with_the_learned_discount(tmp_path):
    def learner():
        return MetaGradient(("discount", "loss_weights", "critic_learning_rate"), learning_rate=0.05)

    part = MetaLearnerTrainer(small(tmp_path / "part", 90), learner(), walk_feed())
    part.train()
    learned = part.learners[0].hyperparameters()
    rest = MetaLearnerTrainer(small(tmp_path / "rest", 91), learner(), walk_feed())
    rest.load(part.run_folder)
    state = rest.rl_state.agent_state
    assert rest.learners[0].hyperparameters() == learned
    assert state.replay.discount == learned["discount"] != 0.99
    assert state.loss_weights.tolist() == [learned["loss_weight_0"], learned["loss_weight_1"]]
    assert state.optimizers["critics"].param_groups[0]["lr"] == learned["critic_learning_rate"]
    rest.train()  # one step more, without a meta step
    assert rest.meta_steps == part.meta_steps
    assert state.last_update.batch.discounts.numpy() == pytest.approx(learned["discount"], rel=1e-6)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path):
    learner = MetaGradient(learning_rate=0.1)
    trainer = MetaLearnerTrainer(small(tmp_path, 40), learner, walk_feed())
    trainer.train()
    state = trainer.rl_state.agent_state
    steps, skipped, before = trainer.meta_steps, trainer.skipped_meta_steps, learner.state_dict()
    newest = state.last_update
    batch = newest.batch._replace(rewards=torch.full_like(newest.batch.rewards, math.nan))
    for given in ({"batch": batch}, {"validation_batch": batch}, {"batch": batch, "validation_batch": newest.batch}):
        metrics = trainer.update_meta_learning_model(newest.batch.observations, newest.q, **given)
        assert not math.isfinite(metrics["meta/loss/gradient"])
    assert (trainer.meta_steps, trainer.skipped_meta_steps) == (steps + 3, skipped + 3)
    after = learner.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    trainer.update_meta_learning_model(newest.batch.observations, newest.q)
    assert trainer.skipped_meta_steps == skipped + 3


def test_the_config_names_it_and_its_parameters(tmp_path):
    config = small(tmp_path, meta="gradient", meta_parameters=("discount", "loss_weights"), meta_learning_rate=0.02)
    (learner,) = MetaLearnerTrainer(config, None, walk_feed()).learners
    assert isinstance(learner, MetaGradient)
    assert learner.sets == ("discount", "loss_weights")
    assert learner.learning_rate == 0.02


def test_metrics_show_each_weight(tmp_path):
    trainer = MetaLearnerTrainer(small(tmp_path), MetaGradient(("loss_weights",), learning_rate=0.1), walk_feed())
    trainer.train()
    weights = trainer.rl_state.agent_state.loss_weights.tolist()
    metrics = trainer.meta_metrics()
    assert [metrics["meta/loss_weight_0"], metrics["meta/loss_weight_1"]] == weights


# What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"parameters": ()}, "parameters is empty"),
        ({"parameters": ("discount", "discount")}, "'discount' more than once"),
        ({"parameters": ("tau",)}, "parameters holds 'tau'; it may hold discount, reward_scale"),
        ({"parameters": ("policy_learning_rate",)}, "parameters holds 'policy_learning_rate'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"inner": "lion"}, "inner is 'lion'"),
        ({"bounds": {"reward_scale": (0.1, 1)}}, "bounds holds 'reward_scale', which is not among the parameters"),
        ({"bounds": {"discount": (0.0, 0.9)}}, "bounds of discount are 0.0 and 0.9"),
        ({"bounds": {"discount": (0.5, 1.1)}}, "at most 1"),
        ({"bounds": {"discount": (0.9, 0.5)}}, "they must rise"),
        ({"bounds": {"discount": (math.nan, 0.5)}}, "bounds of discount are nan"),
        ({"parameters": ("reward_scale",), "bounds": {"reward_scale": (1, math.inf)}}, "both finite"),
        ({"reference": {"critic_learning_rate": 0.1}}, "reference holds 'critic_learning_rate'"),
        ({"reference": {"discount": 1.5}}, r"reference discount is 1.5; it must lie in \[0, 1\]"),
        ({"reference": {"reward_scale": math.nan}}, r"reference reward_scale is nan; it must lie in \[0, inf\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        MetaGradient(**arguments)


@pytest.mark.parametrize(
    ("parameters", "options", "agent", "hyperparameters", "reason"),
    [
        (("discount",), {}, "sac", {"n_step": 3}, "n_step is 3, and MetaGradient needs 1"),
        (("reward_scale",), {"reference": {"discount": 0.9}}, "sac", {"n_step": 3}, "n_step is 3"),
        (("discount",), {}, "sac", {"discount": 1.0}, "discount begins at 1.0; it must lie between its bounds, 0.01"),
        (("discount",), {"bounds": {"discount": (0.5, 0.9)}}, "sac", {}, "discount begins at 0.99"),
        (("entropy_coefficient",), {}, "sac", {"entropy_coefficient": "auto"}, "entropy_coefficient is 'auto'"),
        (("entropy_coefficient",), {}, "sac", {"entropy_coefficient": 0.0}, "entropy_coefficient begins at 0.0"),
        (("entropy_coefficient",), {}, "td3", {}, "TD3 has no entropy_coefficient"),
        (("discount",), {"reference": {"entropy_coefficient": 0.1}}, "dqn", {}, "DQN has no entropy_coefficient"),
        (("loss_weights",), {}, "dqn", {}, "DQN has 1 critic; loss_weights are for several"),
        (("loss_weights",), {}, "ddpg", {}, "DDPG has 1 critic"),
        (("critic_learning_rate",), {}, "sac", {"learning_rate_schedule": "linear"}, "schedule is 'linear'"),
        (("critic_learning_rate",), {}, "sac", {"learning_rate": 0.5}, "critic_learning_rate begins at 0.5"),
    ],
    ids=str,
)
def test_an_agent_that_does_not_fit_is_refused(parameters, options, agent, hyperparameters, reason):
    learner, learning = MetaGradient(parameters, **options), learning_of(agent, **hyperparameters)
    with pytest.raises(ValueError, match=reason):
        learner.begin(learning, RandomKey(0))
    assert learner.meta_parameters() == {}


def test_summed_rewards_do_where_no_discount_is_asked_for():
    learner, learning = begun(("reward_scale",), learning=learning_of("sac", n_step=3))
    check_gradients(learner, learning, inputs_of("sac"), step=1e-4)


def test_weights_are_set_together_and_where_there_are_critics():
    learning = learning_of("sac")
    for values in ({"loss_weight_1": 1.0}, {"loss_weight_0": 1.0, "loss_weight_2": 1.0}, {"loss_weight_x": 1.0}):
        with pytest.raises(KeyError, match="there is no hyperparameter loss_weight_"):
            learning.set_hyperparameters({"discount": 0.5} | values)
    assert learning.replay.discount == 0.99
    assert learning.loss_weights() is None
    with pytest.raises(KeyError, match="loss_weight_0"):
        learning_of("dqn").set_hyperparameters({"loss_weight_0": 1.0})


def test_counting_critics_asks_a_copy():
    learning = learning_of("sac", critics=4)
    seen = []
    learning.networks["critics"].register_forward_hook(lambda *_: seen.append(1))
    random = torch.random.get_rng_state()
    assert learning.count_critics() == 4
    assert torch.equal(random, torch.random.get_rng_state())
