"""MetaGradient: the hyperparameters of the critics' loss under which a critics' step serves a fixed loss best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from angle_rl import ops
from angle_rl.meta.base import Learning, MetaInputs, MetaLearner, require, validation_batch
from angle_rl.meta.inner import Kind, Parameters, frozen
from angle_rl.types import Batch, RandomKey


@dataclass(frozen=True)
class Range:
    """A hyperparameter between two bounds, as a function of a number without any: a sigmoid, of the hyperparameter
    itself or, where it is a `scale`, of its logarithm.
    """

    low: float
    high: float
    scale: bool = True

    def value(self, raw: Tensor) -> Tensor:
        """The hyperparameter, of the shape of `raw`, between the bounds; differentiable."""
        low, high = self._ends()
        inside = low + (high - low) * raw.sigmoid()
        return inside.exp() if self.scale else inside

    def raw(self, value: float) -> float:
        """Where `value` gives this, which lies between the bounds and is neither."""
        low, high = self._ends()
        share = ((math.log(value) if self.scale else value) - low) / (high - low)
        return math.log(share / (1.0 - share))

    def number(self, raw: Tensor) -> float:
        """`value` as a number, never out of the bounds by rounding."""
        return min(max(self.value(raw.detach()).item(), self.low), self.high)

    def _ends(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.scale else (self.low, self.high)


BOUNDS: dict[str, Range] = {
    "discount": Range(0.01, 0.9999, scale=False),
    "reward_scale": Range(0.1, 10.0),
    "loss_weights": Range(0.1, 10.0),
    "entropy_coefficient": Range(1e-4, 10.0),
    "critic_learning_rate": Range(1e-6, 0.1),
}
"""What can be learned, and between which bounds it stays where no others are asked for"""

LIMITS = {"discount": 1.0}
"""The largest bound that may be asked for, where there is one"""

REFERENCES = ("discount", "reward_scale", "entropy_coefficient")
"""What the outer loss may be fixed at"""

LOSS_WEIGHT = "loss_weight_"


class MetaGradient(MetaLearner):
    """Learns hyperparameters eta of the critics' loss, from the configured ones on.

    Xu, van Hasselt and Silver 2018 (arXiv:1805.09801) and Zahavy et al. 2020 (arXiv:2002.12928):
    phi'(eta) = U(phi, grad L_Q(phi; training batch, eta)), and the meta loss is L_Q(phi'; validation batch, eta_bar)
    with eta_bar fixed. L_Q = mean(w sum over critics k of c_k error(Q_k - y)), with the agent's own error, its next
    values and the importance weights w as drawn; y and its networks are constants to phi.

    Each of eta is a function of a float64 meta-parameter of its name that keeps it between bounds, see `BOUNDS`:

    - "discount", a sigmoid between the bounds. y has ``discount ** steps``, so each row must be one step (`n_step` 1).
    - "reward_scale", on all rewards; a sigmoid of its logarithm, as of all below.
    - "loss_weights", c_k, one for each of several critics: numbers between the bounds, divided by their mean.
    - "entropy_coefficient", where the agent has a fixed one.
    - "critic_learning_rate", the size of the inner step and of the critics' own. (The policy's has no part in L_Q, so
      it cannot be learned in this way.)

    Args:
        parameters: names out of these, each once.
        learning_rate, inner: as of `MetaLearner`.
        bounds: by name a pair (low, high), 0 < low < high, in place of those in `BOUNDS`.
        reference: eta_bar, numbers by name: "discount", "reward_scale", "entropy_coefficient". What it leaves out is
            what the config says, and loss weights are 1.

    Raises ValueError for names or numbers out of range; `begin` where a configured value does not lie between its
    bounds, or the agent lacks what is to be learned, learns it in another way, or sums rewards of several steps.
    """

    name = "gradient"
    trains = "critics"
    needs_transitions = True

    def __init__(
        self,
        parameters: Sequence[str] = ("discount",),
        *,
        learning_rate: float = 1e-3,
        inner: Kind = "sgd",
        bounds: Mapping[str, tuple[float, float]] | None = None,
        reference: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate=learning_rate, inner=inner)
        parameters = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        require(len(parameters) > 0, "parameters is empty; at least 1 hyperparameter is needed")
        for name in parameters:
            require(name in BOUNDS, f"parameters holds {name!r}; it may hold {', '.join(BOUNDS)}")
            require(parameters.count(name) == 1, f"parameters holds {name!r} more than once")
        self.sets = parameters
        self.ranges = {name: _range(name, (bounds or {}).get(name)) for name in parameters}
        for name in bounds or {}:
            require(name in parameters, f"bounds holds {name!r}, which is not among the parameters")
        self._reference = dict(reference or {})
        for name, value in self._reference.items():
            require(name in REFERENCES, f"reference holds {name!r}; it may hold {', '.join(REFERENCES)}")
            most = LIMITS.get(name, math.inf)
            end = "inf)" if math.isinf(most) else f"{most:g}]"
            require(0 <= value <= most and value < math.inf, f"reference {name} is {value}; it must lie in [0, {end}")

    # What the trainer asks for ----------

    def begin(self, learning: Learning, key: RandomKey) -> dict[str, Tensor]:
        """Where each hyperparameter is the configured one. ValueError as the class says."""
        configured = learning.hyperparameters
        n_step = learning.replay.n_step
        if "discount" in self.sets or "discount" in self._reference:
            reason = f"n_step is {n_step}, and MetaGradient needs 1 for a discount: rewards of several steps are summed"
            require(n_step == 1, f"{reason} when they are drawn")
        if "entropy_coefficient" in self.sets or "entropy_coefficient" in self._reference:
            reason = "entropy_coefficient is 'auto' and MetaGradient sets it, too; give it a number, such as 0.2"
            require(learning.entropy != "learned", reason)
            require(learning.entropy == "fixed", f"{learning.agent} has no entropy_coefficient for MetaGradient to set")
        if "critic_learning_rate" in self.sets:
            schedule = learning.learning_rate_schedule
            reason = f"learning_rate_schedule is {schedule!r} and MetaGradient learns the critics' rate"
            require(schedule == "constant", f"{reason}; let it be 'constant'")
        start: dict[str, Any] = {}
        for name in self.sets:
            if name == "loss_weights":
                critics = learning.count_critics()
                require(critics > 1, f"{learning.agent} has {critics} critic; loss_weights are for several")
                start[name] = [self._first_raw(name, 1.0)] * critics
            else:
                start[name] = self._first_raw(name, configured[name])
        return {name: torch.tensor(raw, dtype=torch.float64, device=learning.device) for name, raw in start.items()}

    def hyperparameters(self) -> dict[str, float]:
        """Those that have been learned; "loss_weights" as "loss_weight_0" and so on."""
        values: dict[str, float] = {}
        for name, raw in self.meta_parameters().items():
            if raw.detach().equal(self._first[name]):
                continue
            if name == "loss_weights":
                weights = self._value(name).detach().tolist()
                values |= {f"{LOSS_WEIGHT}{index}": weight for index, weight in enumerate(weights)}
            else:
                values[name] = self.ranges[name].number(raw)
        return values

    # The two losses ----------

    def inner_rate(self) -> Tensor | None:
        """The critics' learning rate, where it is learned."""
        return self._value("critic_learning_rate") if "critic_learning_rate" in self.sets else None

    def inner_loss(self, learning: Learning, parameters: Parameters, batch: Batch, key: RandomKey) -> Tensor:
        """L_Q(phi; batch, eta); what is not learned is as it is now."""
        eta = {name: self._value(name) for name in self.sets}
        discounts = discounted(batch, eta["discount"]) if "discount" in eta else batch.discounts
        return critics_loss(
            learning,
            parameters,
            batch._replace(discounts=discounts),
            key,
            reward_scale=eta.get("reward_scale", learning.reward_scale()),
            entropy_coefficient=eta.get("entropy_coefficient"),
            loss_weights=eta.get("loss_weights", learning.loss_weights()),
        )

    def outer_loss(self, learning: Learning, parameters: Parameters, inputs: MetaInputs, key: RandomKey) -> Tensor:
        """L_Q(phi'; validation batch, eta_bar)."""
        batch = validation_batch(inputs)
        fixed = self._reference_of(learning)
        # Rewards of several steps are summed with the discount that they were drawn with.
        discounts = discounted(batch, fixed["discount"]) if learning.replay.n_step == 1 else batch.discounts
        return critics_loss(
            learning,
            parameters,
            batch._replace(discounts=discounts),
            key,
            reward_scale=fixed["reward_scale"],
            entropy_coefficient=fixed.get("entropy_coefficient"),
            loss_weights=None,
        )

    # Helpers ----------

    def _value(self, name: str) -> Tensor:
        """A hyperparameter, differentiable in its meta-parameter."""
        value = self.ranges[name].value(self.meta_parameters()[name])
        return value / value.mean() if name == "loss_weights" else value

    def _reference_of(self, learning: Learning) -> dict[str, Tensor]:
        """eta_bar, scalars by name; no entropy coefficient where it is learned in another way, or there is none."""
        configured = learning.hyperparameters
        numbers = {name: configured[name] for name in REFERENCES if name in configured} | self._reference
        return {
            name: torch.tensor(value, dtype=torch.float64, device=learning.device) for name, value in numbers.items()
        }

    def _first_raw(self, name: str, value: float) -> float:
        own = self.ranges[name]
        reason = f"{name} begins at {value}; it must lie between its bounds, {own.low} and {own.high}"
        require(own.low < value < own.high, f"{reason}: give others with bounds=")
        return own.raw(value)


def discounted(batch: Batch, discount: Tensor) -> Tensor:
    """A batch's discounts anew, ``[batch]``, in the dtype of its own: differentiable in the discount, a scalar."""
    return ((batch.discounts > 0) * discount**batch.steps).to(batch.discounts)


def critics_loss(
    learning: Learning,
    parameters: Parameters,
    batch: Batch,
    key: RandomKey,
    *,
    reward_scale: float | Tensor,
    entropy_coefficient: Tensor | None,
    loss_weights: Tensor | None,
) -> Tensor:
    """What the critics with these parameters learn from, on a batch: a scalar, differentiable in them and in the rest.

    The target is a constant to them, as in an update. `entropy_coefficient` of None: the agent's own, as it is now.
    """
    policy = learning.networks.get("policy")
    future = learning.next_values(
        batch,
        key,
        policy=None if policy is None else frozen(policy),
        critics={name: tensor.detach() for name, tensor in parameters.items()},
        entropy_coefficient=entropy_coefficient,
    )
    rewards = (batch.rewards * reward_scale).to(batch.rewards)
    td_target = ops.twin_q_target(rewards, batch.discounts, *future)
    q = learning.q_values(batch.observations, batch.actions, parameters)
    weights = batch.importance_weights
    loss, _ = ops.twin_q_loss(q, td_target, weights, huber_delta=learning.huber_delta, critic_weights=loss_weights)
    return loss


def _range(name: str, bounds: tuple[float, float] | None) -> Range:
    first = BOUNDS[name]
    if bounds is None:
        return first
    low, high = bounds
    most = LIMITS.get(name, math.inf)
    holds = 0 < low < high <= most and high < math.inf
    end = "both finite" if math.isinf(most) else f"at most {most:g}"
    require(holds, f"bounds of {name} are {low} and {high}; they must rise, the first above 0, {end}")
    return Range(float(low), float(high), first.scale)
