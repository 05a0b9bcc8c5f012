"""Deep Q-learning (Mnih et al. 2015, doi:10.1038/nature14236), double (van Hasselt et al. 2016, arXiv:1509.06461)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from angle_rl.agents.actor_critic import as_tensors, configured_engine, frozen_copy
from angle_rl.agents.base import crossings, in_updates, known_as, name_of
from angle_rl.agents.discrete import discrete_actions, epsilon_greedy, first_exploration, random_share, refuse_options
from angle_rl.agents.learning import begin_meta, learning_of
from angle_rl.agents.noise import seeded_torch
from angle_rl.agents.optimizers import network_optimizer
from angle_rl.agents.replays import check_replay, make_replay
from angle_rl.agents.state import (
    LearnerState,
    begin_streams,
    export_state,
    import_state,
    insert_stepped,
    optimize_when_due,
)
from angle_rl.config import AgentConfig
from angle_rl.engines.base import NextValues, PolicyLoss, Update
from angle_rl.engines.data_parallel import check_device, taken_out
from angle_rl.meta.base import Learning
from angle_rl.models import QNetwork
from angle_rl.types import Array, Batch, RandomKey, RLState, UpdateSpec


class GreedyPolicy(torch.nn.Module):
    """The action of the largest value; of equal ones the first.

    Args:
        critics: ``observations -> q  [batch, actions]``; shared, not copied.
        first_action: the action that column 0 stands for.
    """

    def __init__(self, critics: torch.nn.Module, first_action: int = 0) -> None:
        super().__init__()
        self.critics = critics
        self.first_action = first_action

    def forward(self, observations: Any) -> torch.Tensor:
        """``[batch]`` int64 actions."""
        q: torch.Tensor = self.critics(observations)
        return q.argmax(1) + self.first_action

    def sample_actions(
        self, observations: Any, deterministic: bool = False, *, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``actions`` (``[batch]`` int64) and ``log_prob`` (``[batch]`` zeros).

        Deterministic either way: exploration is the agent's. `noise` is not read.
        """
        actions = self(observations)
        return actions, torch.zeros(len(actions), device=actions.device)


def taken_q(critics: torch.nn.Module, first_action: int, observations: Any, actions: torch.Tensor) -> torch.Tensor:
    """The values of the actions taken ``[batch]``, out of those of all: q, ``[1, batch]``."""
    columns = actions.to(torch.int64).unsqueeze(1) - first_action
    q: torch.Tensor = critics(observations).gather(1, columns)
    return q.t()


@dataclass(kw_only=True)
class DQNState(LearnerState):
    """All that DQN learns and counts. Changed in place by its agent."""

    policy: GreedyPolicy  # over the critics themselves
    actions: int  # number of actions
    first_action: int  # what column 0 of the critics stands for


class DQN:
    """Deep Q-learning: epsilon-greedy actions, a replay, and a network that values all actions at once.

    The critics are one network ``observations -> q  [batch, actions]``: a `QNetwork` by default (`dueling` or not),
    for observations of any space. Its target is `r + discounts * Q_target(s', a*)`, where a* is the largest action
    of the network itself (`double_q`) or of the target network. Targets move by `tau` with every update, or are
    copied every `target_update_interval` steps. The share of random actions is `exploration_epsilon` at first and
    changes as `exploration_schedule` says.

    ValueError where a part is passed that it does not have (`policy`, `q_future`), or the actions are not Discrete.
    """

    name = "DQN"

    def __init__(self, config: AgentConfig, q_future: None = None) -> None:
        refuse_options({"q_future": q_future}, ("q_future",), self.name)
        self.config = config
        self._hyperparameters = config.hyperparameters
        first_exploration(config.hyperparameters)  # refuses what contradicts itself
        self._updates_per_step = Fraction(config.hyperparameters.updates_per_step).limit_denominator(1_000_000)
        self._copy_every = in_updates(config.hyperparameters.target_update_interval, self._updates_per_step)

    # The five callbacks ----------

    def init(self, random_key: RandomKey, **options: Any) -> tuple[DQNState, RandomKey]:
        """The networks, their optimiser and the replay.

        Options: `observation_space`, `action_space` (of one environment), `critics`, `replay` (each made where it is
        None) and `meta`.
        """
        network_key, replay_key, random_key = random_key.split(3)
        refuse_options(options, ("policy",), self.name)
        observation_space, action_space = options["observation_space"], options["action_space"]
        actions, first_action = discrete_actions(action_space, self.name)
        given, wrappers = taken_out({"critics": options.get("critics")})
        critics, replay = given["critics"], options.get("replay")
        hyperparameters = self._hyperparameters
        device = torch.device(self.config.training.device)
        if replay is None:
            replay = make_replay(self.config, observation_space, action_space, replay_key.seed())
        check_replay(replay, self.config)
        if critics is None:
            with seeded_torch(network_key, device):
                critics = QNetwork(
                    observation_space,
                    actions,
                    hyperparameters.hidden_sizes,
                    dueling=hyperparameters.dueling,
                    activation=hyperparameters.activation,
                    layer_norm=hyperparameters.layer_norm,
                )
        elif not isinstance(critics, torch.nn.Module):
            raise TypeError(f"critics is a {type(critics).__name__}; it must be a module, observations -> q")
        check_device(wrappers, device)
        critics = critics.to(device)
        state = DQNState(
            critics=critics,
            target_critics=frozen_copy(critics),
            policy=GreedyPolicy(critics, first_action),
            optimizers={"critics": network_optimizer(critics, hyperparameters.learning_rate, hyperparameters)},
            replay=replay,
            meta=options.get("meta"),
            device=device,
            exploration=first_exploration(hyperparameters),
            actions=actions,
            first_action=first_action,
            data_parallel=wrappers,
        )
        begin_meta(state, self._learning(state))
        state.engine = configured_engine(self.config, self._spec(), self._update_parts(state))
        return state, random_key

    def reset(self, random_key: RandomKey, rl_state: RLState) -> tuple[DQNState, RandomKey]:
        """Where all environments begin anew, their rows go to streams of their own. The key is not used."""
        state: DQNState = rl_state.agent_state
        begin_streams(state, rl_state.environment_state)
        state.exploration.reset(rl_state.environment_state)
        return state, random_key

    @known_as("ours")
    def select_action(self, rl_state: RLState, iteration: int) -> tuple[Array, RLState]:
        """``[n]`` actions, uniform until `learning_starts`, epsilon-greedy from then on."""
        state: DQNState = rl_state.agent_state
        key, random_key = rl_state.random_key.split(2)
        observations, n = rl_state.environment_state.observation, len(rl_state.environment_state.reward)
        epsilon = random_share(state.exploration, state.steps, self._hyperparameters.learning_starts)
        greedy = torch.zeros(n, dtype=torch.int64)
        if epsilon < 1.0:
            with torch.no_grad():
                q = state.acting()(as_tensors(observations, state.device))
            _check_q(q, n, state.actions)
            greedy = q.argmax(1)
        actions = epsilon_greedy(greedy, state.actions, epsilon, key) + state.first_action
        return actions.numpy(), rl_state._replace(random_key=random_key)

    @known_as("ours")
    def record_observation(
        self, rl_state: RLState, action: Array, reward: Array, terminated: Array, next_rl_state: RLState
    ) -> RLState:
        """Insert the transitions of the environments that stepped. ValueError: a reward is not finite."""
        insert_stepped(rl_state, action, reward, terminated, next_rl_state)
        return next_rl_state

    @known_as("ours")
    def optimize_model(self, rl_state: RLState) -> RLState:
        """The updates and meta steps that are due since the last call.

        LossNotFiniteError at the third update in a row whose loss or gradient is not finite.
        """
        return optimize_when_due(rl_state, self.config, self._updates_per_step, self._plan)

    @known_as("ours")
    def finish_updates(self, rl_state: RLState) -> RLState:
        """The updates that wait for `updates_per_call`, taken now. Raises as `optimize_model`."""
        return optimize_when_due(rl_state, self.config, self._updates_per_step, self._plan, finish=True)

    def export_state(self, state: DQNState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The state as named tensors and JSON-able values, for a checkpoint."""
        return export_state(state)

    def import_state(self, state: DQNState, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
        import_state(state, tensors, values)

    # The equations ----------

    @known_as("greedy")
    def next_values(self, state: DQNState, batch: Batch) -> NextValues:
        """Q_target(s', a*), ``[1, batch]``: van Hasselt et al. 2016, equation 4, or Mnih et al. 2015 without it."""
        q = state.target_critics(batch.next_observations)
        _check_q(q, len(batch.rewards), state.actions)
        if self._hyperparameters.double_q:
            best = state.critics(batch.next_observations).argmax(1, keepdim=True)
            value = q.gather(1, best).t()
        else:
            value = q.max(1).values.unsqueeze(0)
        return NextValues(value, None, 0.0)

    # Helpers ----------

    def _plan(self, index: int, updates: int) -> tuple[int, bool]:
        return 0, crossings(self._copy_every, updates, updates + 1) > 0

    def _spec(self) -> UpdateSpec:
        hyperparameters = self._hyperparameters
        greedy = "double" if hyperparameters.double_q else "maximum"
        return UpdateSpec(
            batch_size=hyperparameters.batch_size,
            tau=hyperparameters.tau,
            huber_delta=hyperparameters.huber_delta,
            max_gradient_norm=hyperparameters.max_gradient_norm,
            policy_batch="critic",
            prioritized=hyperparameters.replay == "prioritized",
            targets_follow="update" if hyperparameters.target_update_interval is None else "copies",
            next_value=greedy if name_of(self.next_values) == "greedy" else "other",
            policy_loss="none",
        )

    def _learning(self, state: DQNState) -> Learning:
        return learning_of(
            self.name,
            self.config,
            state,
            q_values=partial(taken_q, state.critics, state.first_action),
            next_values=lambda seen, batch, _: self.next_values(seen, batch),
            policy_loss=None,
        )

    def _update_parts(self, state: DQNState) -> Update:
        return Update(
            replay=state.replay,
            critics=state.critics,
            target_critics=state.target_critics,
            policy=None,
            target_policy=None,
            optimizers=state.optimizers,
            device=state.device,
            first_action=state.first_action,
            q_values=partial(taken_q, state.critics, state.first_action),
            next_values=lambda batch, _: self.next_values(state, batch),
            policy_loss=_no_policy_loss,
            after_policy_step=lambda _: None,
            entropy_coefficient=lambda: None,
            set_entropy_coefficient=_no_entropy_coefficient,
            reward_scale=lambda: state.reward_scale,
            data_parallel=state.data_parallel,
        )


def _check_q(q: torch.Tensor, batch: int, actions: int) -> None:
    if q.shape != (batch, actions):
        raise ValueError(f"critics gave shape {list(q.shape)}; it must be [{batch}, {actions}]")


def _no_policy_loss(batch: Batch, key: RandomKey) -> PolicyLoss:
    raise TypeError("DQN has no policy loss")


def _no_entropy_coefficient(coefficient: torch.Tensor) -> None:
    raise TypeError("DQN has no entropy coefficient")
