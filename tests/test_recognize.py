"""Which updates the native engine takes, and which engine is made of them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from angle_rl import _core
from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.config import AgentConfig, Hyperparameters, Training
from angle_rl.engines import NativeEngine, TorchEngine, describe_engine, make_engine, native_refusal
from angle_rl.engines.recognize import hidden_layers
from angle_rl.models import DeterministicPolicy, QNetwork, SquashedGaussianPolicy, TwinQ
from angle_rl.replay import PrioritizedReplayBuffer
from angle_rl.types import RandomKey

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
NAMES = {SAC: "sac", DiscreteSAC: "sac_discrete", TD3: "td3", DDPG: "ddpg", DQN: "dqn"}


def asked(kind=SAC, *, q_future=None, observations=OBSERVATIONS, training=None, policy=None, q=None, **options):
    """Spec and update of a new agent, and the agent's state."""
    hyperparameters = {"hidden_sizes": (8,), "batch_size": 4, "replay_capacity": 100, "agent": NAMES[kind]} | options
    config = AgentConfig(
        hyperparameters=Hyperparameters(**hyperparameters),
        training=Training(**({"engine": "torch"} | (training or {}))),
    )
    actions = spaces.Discrete(3) if kind in (DQN, DiscreteSAC) else ACTIONS
    agent = kind(config) if q_future is None else kind(config, q_future)
    parts = {"critics": q} if policy is None else {"critics": q, "policy": policy}
    state, _ = agent.init(RandomKey(0), observation_space=observations, action_space=actions, **parts)
    spec = agent._spec() if kind is DQN else agent._spec(state)
    return spec, agent._update_parts(state), state


def refusal_of(change, kind=SAC, **options):
    """What is said of a new agent's update after ``change(update)``."""
    spec, update, _ = asked(kind, **options)
    assert native_refusal(spec, update) is None
    found = change(update)
    update = found if found is not None else update
    return native_refusal(spec, update)


# What is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SAC, {}),
        (SAC, {"critics": 16, "hidden_sizes": (8, 8, 8), "replay": "uniform", "entropy_coefficient": 0.1}),
        (SAC, {"huber_delta": 1.0, "max_gradient_norm": 1.0, "n_step": 3, "policy_batch": "fresh"}),
        (TD3, {}),
        (DDPG, {"critics": 3}),
        (DQN, {}),
        (DQN, {"double_q": False, "dueling": True, "hidden_sizes": (8, 8)}),
        (SAC, {"activation": "gelu", "layer_norm": True, "hidden_sizes": (8, 6)}),
        (TD3, {"activation": "tanh"}),
        (DQN, {"activation": "silu", "layer_norm": True, "dueling": True}),
    ],
)
def test_our_own_networks_and_adam_are_taken(kind, options):
    spec, update, _ = asked(kind, **options)
    assert native_refusal(spec, update) is None


def test_float64_networks_and_schedulers_of_learning_rates_are_taken():
    policy, critics = SquashedGaussianPolicy(3, ACTIONS.low, ACTIONS.high, (8,)).double(), TwinQ(3, 2, (8,)).double()
    spec, update, _ = asked(policy=policy, q=critics)
    assert native_refusal(spec, update) is None
    torch.optim.lr_scheduler.ExponentialLR(update.optimizers["policy"], 0.9)
    assert native_refusal(spec, update) is None


def groups(update):
    """One group a parameter, each with a rate of its own."""
    parameters = update.critics.parameters()
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 10.0**-n} for n, p in enumerate(parameters)], weight_decay=0.1)
    return dataclasses.replace(update, optimizers={**update.optimizers, "critics": optimizer})


def test_parameter_groups_and_adamw_are_taken():
    assert refusal_of(groups) is None


# What is refused ----------------------------------------------------------------------------------------------


class OwnSAC(SAC):
    def policy_loss(self, state, batch, key):
        return super().policy_loss(state, batch, key)


class OwnPolicy(SquashedGaussianPolicy):
    pass


class OwnReplay(PrioritizedReplayBuffer):
    pass


NAMES[OwnSAC] = "sac"


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (SAC, {"q_future": lambda critics, o, a: critics(o, a)}, "target's value is not computed"),
        (DiscreteSAC, {}, "target's value is not computed"),
        (OwnSAC, {}, "policy's loss is not one that it knows"),
        (SAC, {"policy": OwnPolicy(3, ACTIONS.low, ACTIONS.high, (8,))}, "policy is a OwnPolicy, not exactly"),
        (SAC, {"policy": DeterministicPolicy(3, ACTIONS.low, ACTIONS.high, (8,))}, "policy is a DeterministicPolicy"),
        (SAC, {"critics": 17}, "critics are 17, more than 16"),
        (
            SAC,
            {"policy": SquashedGaussianPolicy(3, ACTIONS.low, ACTIONS.high, (8,)).double()},
            "networks mix torch.float32, torch.float64",
        ),
        (
            SAC,
            {
                "policy": SquashedGaussianPolicy(3, ACTIONS.low, ACTIONS.high, (8,)).bfloat16(),
                "q": TwinQ(3, 2, (8,)).bfloat16(),
            },
            "networks are of torch.bfloat16",
        ),
        (SAC, {"observations": spaces.Dict(a=OBSERVATIONS)}, "critics is a EncodedCritics"),
        (SAC, {"observations": spaces.Discrete(4)}, "critics is a EncodedCritics"),
        (DQN, {"q": nn.Linear(3, 3)}, "critics is a Linear, not exactly a QNetwork"),
        (DQN, {"observations": spaces.Dict(a=OBSERVATIONS)}, "not flat vectors"),
        (DQN, {"observations": spaces.Discrete(4)}, "not flat vectors"),
        (DQN, {"observations": spaces.Box(-1, 1, (3,), np.float16)}, "replay's observations are float16"),
        (DQN, {"observations": spaces.Box(-1, 1, (2, 2), np.float32)}, "not as wide"),
    ],
)
def test_what_an_agent_was_made_of_may_be_refused(kind, options, says):
    spec, update, _ = asked(kind, **options)
    assert says in str(native_refusal(spec, update))


def other_optimizer(name, make):
    def change(update):
        network = {"critics": update.critics, "policy": update.policy}[name]
        return dataclasses.replace(update, optimizers={**update.optimizers, name: make(list(network.parameters()))})

    return change


def shared_layer(update):
    weight = update.policy.head.weight
    update.critics.weights[0] = nn.Parameter(update.target_critics.weights[0])
    assert weight.is_leaf


def frozen(update):
    update.policy.head.bias.requires_grad_(False)


def transposed(update):
    bias = update.policy.body[0].weight
    bias.data = bias.data.t().contiguous().t()


def replace_body(update):
    update.policy.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.ReLU())


def without_bias(update):
    update.policy.head = nn.Linear(8, 4, bias=False)


def wrong_chain(update):
    update.policy.body = nn.Sequential(nn.Linear(3, 9), nn.ReLU())


def extra_parameter(update):
    update.critics.temperature = nn.Parameter(torch.zeros(1))


def another_target(update):
    return dataclasses.replace(update, target_critics=TwinQ(3, 2, (9,)))


def another_activation(update):
    return dataclasses.replace(update, target_critics=TwinQ(3, 2, (8,), activation="tanh"))


def another_layer_norm(update):
    return dataclasses.replace(update, target_critics=TwinQ(3, 2, (8,), layer_norm=True))


def own_method(update):
    update.policy.sample_actions = lambda *given, **named: None


def own_sample(update):
    update.replay.sample = lambda *given, **named: None


def own_step(update):
    update.optimizers["critics"].step = lambda: None


def on_meta(update):
    return dataclasses.replace(update, device=torch.device("meta"))


def tensor_rate(update):
    update.optimizers["policy"].param_groups[0]["lr"] = torch.tensor(1e-3)


def nested_replay(update):
    space = spaces.Dict(a=OBSERVATIONS)
    replay = PrioritizedReplayBuffer(10, observation_space=space, action_space=ACTIONS)
    return dataclasses.replace(update, replay=replay)


def integer_replay(update):
    replay = PrioritizedReplayBuffer(10, {"observations": ((3,), np.uint8), "actions": ((2,), np.float32)})
    return dataclasses.replace(update, replay=replay)


def double_replay(update):
    replay = PrioritizedReplayBuffer(10, {"observations": ((3,), np.float64), "actions": ((2,), np.float32)})
    return dataclasses.replace(update, replay=replay)


def wide_replay(update):
    replay = PrioritizedReplayBuffer(10, {"observations": ((4,), np.float32), "actions": ((2,), np.float32)})
    return dataclasses.replace(update, replay=replay)


def wide_actions(update):
    replay = PrioritizedReplayBuffer(10, {"observations": ((3,), np.float32), "actions": ((5,), np.float32)})
    return dataclasses.replace(update, replay=replay)


def own_replay(update):
    return dataclasses.replace(update, replay=OwnReplay(10, observation_space=OBSERVATIONS, action_space=ACTIONS))


CHANGES = [
    (on_meta, "networks are on meta"),
    (lambda update: dataclasses.replace(update, policy=None), "there is no policy"),
    (
        lambda update: dataclasses.replace(update, target_policy=copy.deepcopy(update.policy)),
        "there is a target_policy",
    ),
    (lambda update: update.policy.body[1].register_forward_hook(print) and None, "policy has a hook on its ReLU"),
    (
        lambda update: update.policy.body[0].register_forward_pre_hook(print) and None,
        "policy has a hook on its Linear",
    ),
    (lambda update: update.critics.register_full_backward_hook(print) and None, "critics has a hook on its TwinQ"),
    (
        lambda update: update.target_critics.register_full_backward_pre_hook(print) and None,
        "target_critics has a hook on its TwinQ",
    ),
    (lambda update: update.critics.weights[0].register_hook(print) and None, "critics has a hook on a parameter"),
    (
        lambda update: update.policy.head.bias.register_post_accumulate_grad_hook(print) and None,
        "policy has a hook on a parameter",
    ),
    (lambda update: nn.utils.parametrizations.weight_norm(update.policy.head) and None, "policy has a parametrization"),
    (own_method, "policy has a sample_actions of its own on its SquashedGaussianPolicy"),
    (replace_body, "policy has hidden layers that are not built as our own"),
    (without_bias, "policy has layers that are not built as our own"),
    (wrong_chain, "policy has layers that are not built as our own"),
    (extra_parameter, "critics has parameters that a TwinQ has not"),
    (another_target, "target_critics is built otherwise than critics"),
    (another_activation, "target_critics is built otherwise than critics"),
    (another_layer_norm, "target_critics is built otherwise than critics"),
    (frozen, "do not require gradients"),
    (shared_layer, "networks share the memory of parameters"),
    (transposed, "policy has parameters that are not contiguous"),
    (other_optimizer("critics", lambda p: torch.optim.SGD(p, 0.1)), "the critics' optimizer is a SGD"),
    (other_optimizer("policy", lambda p: torch.optim.Adam(p[1:])), "the policy's optimizer has other parameters"),
    (other_optimizer("policy", lambda p: torch.optim.Adam(p, amsgrad=True)), "the policy's optimizer has amsgrad set"),
    (other_optimizer("policy", lambda p: torch.optim.Adam(p, maximize=True)), "has maximize set"),
    (other_optimizer("critics", lambda p: torch.optim.AdamW(p, capturable=True)), "has capturable set"),
    (other_optimizer("critics", lambda p: torch.optim.Adam(p, differentiable=True)), "has differentiable set"),
    (tensor_rate, "the policy's optimizer has tensors for numbers"),
    (own_step, "the critics' optimizer has a hook or a step of its own"),
    (
        lambda update: update.optimizers["critics"].register_step_post_hook(print) and None,
        "the critics' optimizer has a hook",
    ),
    (lambda update: update.optimizers.pop("entropy_coefficient") and None, "no optimizer of the entropy_coefficient"),
    (lambda update: update.set_entropy_coefficient(None), "there is no entropy coefficient"),
    (lambda update: update.set_entropy_coefficient(torch.ones(2)), "no CPU scalar"),
    (own_replay, "the replay is a OwnReplay"),
    (own_sample, "the replay has a sample of its own"),
    (nested_replay, "observations or actions are nested"),
    (integer_replay, "replay's observations are uint8"),
    (double_replay, "replay's observations are float64, the networks of torch.float32"),
    (wide_replay, "the observations of replay, critics and policy are not of one width"),
    (wide_actions, "the actions of replay, critics and policy are not of one width"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[says for _, says in CHANGES])
def test_each_thing_that_it_does_not_know_is_refused_and_named(change, says):
    assert says in str(refusal_of(change))


def test_hooks_on_everything_are_refused():
    spec, update, _ = asked()
    for register, says in [
        (nn.modules.module.register_module_forward_hook, "all modules have hooks"),
        (register_optimizer_step_post_hook, "all optimizers have hooks"),
    ]:
        handle = register(lambda *given: None)
        try:
            assert native_refusal(spec, update) == says
        finally:
            handle.remove()
    assert native_refusal(spec, update) is None


def test_td3_needs_its_target_policy():
    says = refusal_of(lambda update: dataclasses.replace(update, target_policy=None), TD3)
    assert says == "there is no target_policy"


def test_parts_of_a_dqn_that_were_replaced_are_refused():
    def own_head(update):
        update.critics.advantages = nn.Sequential(nn.Linear(8, 3, bias=False))

    def no_head(update):
        update.critics.advantages = nn.Sequential()

    assert "not built as our own" in refusal_of(own_head, DQN)
    assert "not built as our own" in refusal_of(no_head, DQN)


@pytest.mark.parametrize(
    "body",
    [
        nn.Linear(3, 8),
        nn.Sequential(nn.Linear(3, 8)),
        nn.Sequential(nn.Linear(3, 8), nn.Softplus()),
        nn.Sequential(nn.Linear(3, 8), nn.GELU(approximate="tanh")),
        nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 8), nn.LayerNorm((1, 8)), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Linear(3, 8)),
    ],
)
def test_hidden_layers_of_another_kind_are_none_of_ours(body):
    assert hidden_layers(body) is None


def test_hidden_layers_are_read_in_order():
    body = nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 4), nn.GELU()
    )
    layers = hidden_layers(body)
    assert [layer.activation for layer in layers] == ["tanh", "silu", "gelu"]
    assert [layer.linear for layer in layers] == [body[0], body[3], body[5]]
    assert [layer.norm for layer in layers] == [body[1], None, None]
    assert hidden_layers(QNetwork(OBSERVATIONS, 2, ()).body) == []


# Which engine is made -----------------------------------------------------------------------------------------


def test_auto_takes_native_where_it_can_and_says_why_not():
    spec, update, _ = asked()
    engine = make_engine(spec, update, learner_threads=2)
    assert isinstance(engine, NativeEngine)
    assert engine.threads == 2
    line = describe_engine("auto", engine)
    assert line == f"engine native (auto: our own networks on a CPU; {_core.isa()}, 2 threads)"
    assert isinstance(make_engine(spec, update, "native"), NativeEngine)
    assert isinstance(make_engine(spec, update, "torch"), TorchEngine)
    own_sample(update)
    engine = make_engine(spec, update)
    assert isinstance(engine, TorchEngine)
    line = describe_engine("auto", engine)
    assert line == "engine torch (auto: not native, since the replay has a sample of its own)"
    with pytest.raises(ValueError, match=r"engine is 'native', .*: the replay has a sample of its own; 'torch' takes"):
        make_engine(spec, update, "native")


@pytest.mark.parametrize("kind", [SAC, TD3, DDPG, DQN])
def test_agents_ask_for_the_engine_of_their_config(kind):
    _, _, state = asked(kind, training={"engine": "native", "learner_threads": 3})
    assert isinstance(state.engine, NativeEngine)
    assert state.engine.threads == 3
    _, _, state = asked(kind)
    assert describe_engine("torch", state.engine) == "engine torch (as configured)"
    _, _, state = asked(kind, training={"engine": "auto"})
    assert isinstance(state.engine, NativeEngine)


def test_bfloat16_asks_for_a_cpu_that_has_it(monkeypatch):
    spec, update, _ = asked()
    monkeypatch.setattr(_core, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="has no bfloat16 products"):
        make_engine(spec, update, "native", precision="bfloat16")
    assert isinstance(make_engine(spec, update, precision="bfloat16"), TorchEngine)
    monkeypatch.setattr(_core, "has_bfloat16", lambda: True)
    for network in (update.critics, update.target_critics, update.policy):
        network.double()
    with pytest.raises(ValueError, match=r"torch\.float64 are not computed in bfloat16"):
        make_engine(spec, update, "native", precision="bfloat16")


def test_a_precision_that_the_torch_engine_lacks_is_refused():
    with pytest.raises(ValueError, match=r"precision is 'bfloat16' and engine 'torch'"):
        Training(engine="torch", precision="bfloat16")
    assert Training(precision="bfloat16").engine == "auto"
