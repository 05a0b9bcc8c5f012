"""What an agent with critics shows to meta-learners, and how they set its hyperparameters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from angle_rl.agents.noise import policy_actions
from angle_rl.agents.state import ActorCriticState, LearnerState
from angle_rl.config import AgentConfig
from angle_rl.engines.base import NextValues, PolicyLoss
from angle_rl.meta.base import Learning
from angle_rl.meta.inner import Parameters, with_parameters
from angle_rl.models import DeterministicPolicy, SquashedGaussianPolicy
from angle_rl.types import Batch, RandomKey

UNUSED = RandomKey(0)  # for actions that nothing random goes into


def learning_of(
    name: str,
    config: AgentConfig,
    state: LearnerState,
    *,
    q_values: Callable[[Any, Tensor], Tensor],
    next_values: Callable[[Any, Batch, RandomKey], NextValues],
    policy_loss: Callable[[Any, Batch, RandomKey], PolicyLoss] | None,
) -> Learning:
    """An agent's learning, seen from outside.

    Its equations are the agent's own methods, called with its state while the networks have other parameters.
    """
    networks = {"critics": state.critics}
    actor_critic = isinstance(state, ActorCriticState)
    if isinstance(state, ActorCriticState):
        networks["policy"] = state.policy
    policy: Any = networks.get("policy")

    def seen_with(coefficient: Tensor | None) -> Any:
        if coefficient is None:
            return state
        return dataclasses.replace(state, entropy_coefficient=coefficient)  # type: ignore[call-arg]

    def equation(method: Callable[[Any, Batch, RandomKey], Any]) -> Any:
        def evaluate(
            batch: Batch,
            key: RandomKey,
            *,
            policy: Parameters | None = None,
            critics: Parameters | None = None,
            entropy_coefficient: Tensor | None = None,
        ) -> Any:
            given = {"policy": policy, "critics": critics}
            seen = seen_with(entropy_coefficient)
            return with_parameters(networks, given, lambda: method(seen, batch, key))

        return evaluate

    def with_policy(call: Callable[[Any], Any]) -> Any:
        return lambda observations, parameters: with_parameters(
            networks, {"policy": parameters}, lambda: call(observations)
        )

    def mean_actions(observations: Any) -> Tensor:
        return policy_actions(policy, observations, (), UNUSED, deterministic=True)[0]

    return Learning(
        agent=name,
        networks=networks,
        optimizers=state.optimizers,
        replay=state.replay,
        device=state.device,
        continuous=isinstance(state, ActorCriticState) and len(state.bounds.shape) > 0,
        batch_size=config.hyperparameters.batch_size,
        entropy=_entropy_of(state),
        huber_delta=config.hyperparameters.huber_delta,
        learning_rate_schedule=config.hyperparameters.learning_rate_schedule,
        count_critics=lambda: _count_critics(state),
        reward_scale=lambda: state.reward_scale,
        loss_weights=lambda: getattr(state, "loss_weights", None),
        hyperparameters=_configured(config, state),
        set_hyperparameters=lambda values: set_hyperparameters(state, values),
        policy_loss=equation(_no_policy_loss if policy_loss is None else policy_loss),
        next_values=equation(next_values),
        q_values=lambda observations, actions, parameters: with_parameters(
            networks, {"critics": parameters}, lambda: q_values(observations, actions)
        ),
        actions=with_policy(mean_actions),
        policy_output=with_policy(lambda observations: policy(observations)),
        features=with_policy(policy.features) if actor_critic and callable(getattr(policy, "features", None)) else None,
    )


def begin_meta(state: LearnerState, learning: Learning) -> None:
    """Bind what was passed as `meta` to the agent, where it can be. ValueError where it cannot learn about this one."""
    if hasattr(state.meta, "bind"):
        if state.data_parallel:
            raise ValueError("networks are in DistributedDataParallel; meta-learners learn in one process only")
        state.meta.bind(learning)


def shapes_policy_loss(state: LearnerState) -> bool:
    """Whether policy steps descend a loss of what was passed as `meta`, besides the agent's own."""
    return bool(getattr(state.meta, "shapes_policy_loss", False))


def shaped_policy_loss(state: ActorCriticState, batch: Batch, policy_loss: Callable[[], PolicyLoss]) -> PolicyLoss:
    """What policy steps descend: the agent's own loss on a batch, and that of what was passed as `meta`, if any.

    TypeError where there is one and the agent's own does not say which actions it was taken at.
    """
    if not shapes_policy_loss(state):
        return policy_loss()
    if state.meta.reads_features and callable(getattr(state.policy, "features", None)):
        learned, features = _with_features(state.policy, batch.observations, policy_loss)
    else:
        learned, features = policy_loss(), None
    if learned.actions is None:
        raise TypeError("policy_loss gave no actions, which the auxiliary loss of meta reads; let its PolicyLoss do so")
    auxiliary = state.meta.policy_auxiliary_loss(features, batch._replace(actions=learned.actions))
    return learned if auxiliary is None else learned._replace(loss=learned.loss + auxiliary)


def _with_features(policy: Any, observations: Any, call: Callable[[], PolicyLoss]) -> tuple[PolicyLoss, Tensor]:
    """``call()``, and the policy's features of these observations: our own policies' from the pass that it makes."""
    if type(policy) not in (SquashedGaussianPolicy, DeterministicPolicy):
        return call(), policy.features(observations)
    found: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        if inputs[0] is observations and output.requires_grad:
            found.append(output)

    handle = policy.body.register_forward_hook(keep)
    try:
        learned = call()
    finally:
        handle.remove()
    return learned, found[-1] if found else policy.features(observations)


def set_hyperparameters(state: LearnerState, values: Mapping[str, float]) -> None:
    """Let an agent learn with these from its next update on.

    "loss_weight_0" and so on, one for each critic, are set together. KeyError for a name that is neither such a one nor
    in `SETTERS`; nothing has changed then.
    """
    own = {name: value for name, value in values.items() if not name.startswith(LOSS_WEIGHT)}
    weights = [f"{LOSS_WEIGHT}{index}" for index in range(len(values) - len(own))]
    can_weigh = isinstance(state, ActorCriticState)
    unknown = set(values) - set(SETTERS) - set(weights if can_weigh else ())
    if unknown:
        names = (*SETTERS, *([f"{LOSS_WEIGHT}0, ..."] if can_weigh else []))
        raise KeyError(f"there is no hyperparameter {min(unknown)} to set; there are {', '.join(names)}")
    for name, value in own.items():
        SETTERS[name](state, value)
    if weights and isinstance(state, ActorCriticState):
        state.loss_weights = torch.tensor([values[name] for name in weights], dtype=torch.float64)


def _set_entropy_coefficient(state: LearnerState, value: float) -> None:
    assert isinstance(state, ActorCriticState)
    state.set_entropy_coefficient(torch.tensor(value, device=state.device))


def _set_discount(state: LearnerState, value: float) -> None:
    state.replay.discount = value


def _set_reward_scale(state: LearnerState, value: float) -> None:
    state.reward_scale = value


def _set_rate(network: str) -> Callable[[LearnerState, float], None]:
    def set_rate(state: LearnerState, value: float) -> None:
        for group in state.optimizers[network].param_groups:
            group["lr"] = value

    return set_rate


LOSS_WEIGHT = "loss_weight_"
"""Before a critic's number: what its part of the critics' loss is multiplied by"""

SETTERS: dict[str, Callable[[Any, float], None]] = {
    "entropy_coefficient": _set_entropy_coefficient,
    "discount": _set_discount,
    "reward_scale": _set_reward_scale,
    "critic_learning_rate": _set_rate("critics"),
    "policy_learning_rate": _set_rate("policy"),
}
"""The hyperparameters that can be set while an agent learns"""


def _configured(config: AgentConfig, state: LearnerState) -> dict[str, float]:
    hyperparameters = config.hyperparameters
    rate = hyperparameters.learning_rate
    values = {"discount": hyperparameters.discount, "reward_scale": 1.0, "critic_learning_rate": rate}
    if isinstance(state, ActorCriticState):
        own = hyperparameters.policy_learning_rate
        values["policy_learning_rate"] = rate if own is None else own
        if _entropy_of(state) == "fixed":
            values["entropy_coefficient"] = float(hyperparameters.entropy_coefficient)
    return values


def _count_critics(state: LearnerState) -> int:
    """How many critics there are: asks a copy of them about an empty row. One that values all actions is one."""
    if not isinstance(state, ActorCriticState):
        return 1
    critics: Any = copy.deepcopy(state.critics).eval()
    dtype = next(critics.parameters()).dtype
    layout = state.replay._batches
    tensors = [torch.zeros(size, dtype=kind, device=state.device) for size, kind in layout.sizes(1)]
    row: Batch = layout.assemble([t.to(dtype) if t.is_floating_point() else t for t in tensors])
    with torch.no_grad():
        return len(critics(row.observations, row.actions))


def _entropy_of(state: LearnerState) -> str:
    if not isinstance(state, ActorCriticState) or state.entropy_coefficient is None:
        return "none"
    return "fixed" if state.log_entropy_coefficient is None else "learned"


def _no_policy_loss(state: Any, batch: Batch, key: RandomKey) -> PolicyLoss:
    raise TypeError("this agent has no policy loss")
