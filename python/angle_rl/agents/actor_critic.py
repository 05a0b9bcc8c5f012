"""What SAC, TD3 and DDPG share: one policy, an ensemble of critics, a replay, and the five callbacks over them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import gymnasium
import numpy as np
import torch

from angle_rl.agents.base import crossings, in_updates, known_as, name_of
from angle_rl.agents.exploration import Exploration, make_schedule
from angle_rl.agents.learning import begin_meta, learning_of, shaped_policy_loss, shapes_policy_loss
from angle_rl.agents.noise import (
    ActionBounds,
    action_bounds,
    noisy_actions,
    ornstein_uhlenbeck,
    policy_actions,
    seeded_torch,
    uniform_actions,
    within_bounds,
)
from angle_rl.agents.optimizers import network_optimizer
from angle_rl.agents.replays import check_replay, make_replay
from angle_rl.agents.state import (
    ActorCriticState,
    begin_streams,
    export_state,
    import_state,
    insert_stepped,
    optimize_when_due,
)
from angle_rl.config import AgentConfig
from angle_rl.encoders import EncodedCritics, EncodedPolicy, ObservationEncoder
from angle_rl.engines import Engine, make_engine
from angle_rl.engines.base import Bounds, NextValues, PolicyLoss, Update
from angle_rl.engines.data_parallel import check_device, taken_out
from angle_rl.engines.native import usable_threads
from angle_rl.models import TwinQ
from angle_rl.tensors import beside
from angle_rl.types import Array, Batch, EnvironmentState, RandomKey, RLState, UpdateSpec

FIRST_SCALE = {"none": 0.0, "gaussian": 0.1, "ou": 0.2}
"""What ``exploration_noise="auto"`` means, in halves of the action range"""

QFuture = Callable[[torch.nn.Module, Any, torch.Tensor], torch.Tensor]
"""``f(target_critics, next_observations, next_actions)`` -> ``[batch]``, or ``[critics, batch]`` (minimum)"""

AFTER_POLICY_STEP = {"soft": "entropy", "deterministic": "nothing"}
"""What follows a policy step under each policy loss that engines know"""


class ActorCritic:
    """An off-policy actor-critic. A subclass gives the default policy and the three equations.

    `q_future` may replace the value of the target critics at the next actions (default: their minimum).
    """

    name: str

    def __init__(self, config: AgentConfig, q_future: QFuture | None = None) -> None:
        hyperparameters = config.hyperparameters
        self.config = config
        self._hyperparameters = hyperparameters
        self._layers: dict[str, Any] = {  # of the default networks
            "activation": hyperparameters.activation,
            "layer_norm": hyperparameters.layer_norm,
        }
        self._q_future: QFuture = minimum_over_target_critics if q_future is None else q_future
        if q_future is not None and hyperparameters.critic_subset is not None:
            raise ValueError(
                f"critic_subset is {hyperparameters.critic_subset} and q_future is given, which takes the place of the "
                "minimum over such a subset; give one of them"
            )
        self._updates_per_step = Fraction(hyperparameters.updates_per_step).limit_denominator(1_000_000)
        interval = hyperparameters.policy_update_interval
        self._copy_every = in_updates(hyperparameters.target_update_interval, self._updates_per_step)
        self._policy_every: int | Fraction | None = (
            self.policy_delay if interval == "auto" else in_updates(interval, self._updates_per_step)
        )
        process, scale = hyperparameters.exploration_process, hyperparameters.exploration_noise
        self._noise_process: str = self.default_noise if process == "auto" else process
        if self._noise_process == "none" and hyperparameters.exploration_schedule != "constant":
            raise ValueError(
                f"exploration_schedule is {hyperparameters.exploration_schedule!r}, but {self.name} adds no noise "
                "whose scale it could change; set exploration_process"
            )
        first_scale = FIRST_SCALE[self._noise_process] if isinstance(scale, str) else scale
        self._schedule = make_schedule(hyperparameters, first_scale)

    # What a subclass says ----------

    policy_delay: int  # updates per policy step under policy_update_interval="auto"
    has_target_policy: bool
    delays_targets: bool  # targets move with the policy only
    critics_under_auto = 2
    default_noise = "none"  # the process under exploration_process="auto"
    explores_from_mean = False  # noise is added to the policy's deterministic actions, not to its samples

    def bounds_of(self, action_space: gymnasium.Space[Any], device: torch.device) -> ActionBounds:
        """The bounds of the actions. ValueError for a space that the agent cannot act in."""
        return action_bounds(action_space, device, self.name)

    def default_policy(self, observation_dim: int, bounds: ActionBounds) -> torch.nn.Module:
        """A policy for flat observations."""
        raise TypeError(f"{type(self).__name__} has no default policy; pass policy=")

    def default_critics(self, observation_dim: int, action_space: gymnasium.Space[Any], number: int) -> torch.nn.Module:
        """So many critics for flat observations and actions."""
        action_dim = flat_dim(action_space, "action", "critics")
        return TwinQ(observation_dim, action_dim, self._hyperparameters.hidden_sizes, number, **self._layers)

    def random_actions(self, state: ActorCriticState, n: int, key: RandomKey) -> torch.Tensor:
        """Actions to take before learning starts, ``[n, *action_shape]``, uniform."""
        return uniform_actions(state.bounds, n, key)

    @known_as("ours")
    def explore(self, state: ActorCriticState, observations: Any, n: int, key: RandomKey) -> torch.Tensor:
        """Actions to take while learning, ``[n, *action_shape]``: the policy's, with noise where there is any."""
        shape, process = (n, *state.bounds.shape), self._noise_process
        if process == "none":
            return policy_actions(state.acting(), observations, shape, key, deterministic=self.explores_from_mean)[0]
        policy_key, noise_key = key.split(2)
        actions, _ = policy_actions(
            state.acting(), observations, shape, policy_key, deterministic=self.explores_from_mean
        )
        scale = state.exploration.scale(state.steps)
        if process == "gaussian":
            return noisy_actions(actions, state.bounds, noise_key, scale=scale)
        hyperparameters = self._hyperparameters
        theta, mean = hyperparameters.exploration_theta, hyperparameters.exploration_mean
        before = state.noise
        if before is None or len(before) != n:  # no reset came before, or one with other environments
            before = torch.full(shape, mean)
        state.noise = ornstein_uhlenbeck(before, noise_key, sigma=scale, theta=theta, mu=mean)
        return within_bounds(actions, state.noise, state.bounds)

    def next_values(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> NextValues:
        """What the td target is made of."""
        raise TypeError(f"{type(self).__name__} does not define next_values")

    def policy_loss(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
        """What a policy step descends."""
        raise TypeError(f"{type(self).__name__} does not define policy_loss")

    @known_as("nothing")
    def after_policy_step(self, state: ActorCriticState, learned: PolicyLoss) -> None:
        """What follows a policy step."""

    def target_entropy(self, bounds: ActionBounds) -> float | None:
        """What a learned entropy coefficient aims at, in nats; None where none is learned."""
        return None

    def finish_init(self, state: ActorCriticState) -> None:
        """What a subclass adds to the first state."""

    # The five callbacks ----------

    def init(self, random_key: RandomKey, **options: Any) -> tuple[ActorCriticState, RandomKey]:
        """The networks, their optimisers and the replay.

        Options: `observation_space`, `action_space` (of one environment), `policy`, `critics`, `replay` (each
        made where it is None) and `meta`.
        """
        network_key, replay_key, random_key = random_key.split(3)
        observation_space, action_space = options["observation_space"], options["action_space"]
        replay = options.get("replay")
        given, wrappers = taken_out({name: options.get(name) for name in ("policy", "critics")})
        policy, critics = given["policy"], given["critics"]
        hyperparameters = self._hyperparameters
        device = torch.device(self.config.training.device)
        bounds = self.bounds_of(action_space, device)
        if replay is None:
            replay = make_replay(self.config, observation_space, action_space, replay_key.seed())
        check_replay(replay, self.config)
        with seeded_torch(network_key, device):
            if policy is None:
                if len(bounds.shape) > 0:
                    flat_dim(action_space, "action", "policy")
                policy = behind_encoder(
                    observation_space, EncodedPolicy, lambda width: self.default_policy(width, bounds)
                )
            if critics is None:
                number = self.critics_under_auto if hyperparameters.critics == "auto" else hyperparameters.critics
                critics = behind_encoder(
                    observation_space, EncodedCritics, lambda width: self.default_critics(width, action_space, number)
                )
        check_policy(policy)
        check_device(wrappers, device)
        policy, critics = policy.to(device), critics.to(device)
        rate, policy_rate = hyperparameters.learning_rate, hyperparameters.policy_learning_rate
        state = ActorCriticState(
            policy=policy,
            target_policy=frozen_copy(policy) if self.has_target_policy else None,
            critics=critics,
            target_critics=frozen_copy(critics),
            optimizers={
                "critics": network_optimizer(critics, rate, hyperparameters),
                "policy": network_optimizer(policy, rate if policy_rate is None else policy_rate, hyperparameters),
            },
            replay=replay,
            meta=options.get("meta"),
            bounds=bounds,
            device=device,
            exploration=Exploration(self._schedule),
            data_parallel=wrappers,
        )
        self.finish_init(state)
        learning = learning_of(
            self.name,
            self.config,
            state,
            q_values=lambda observations, actions: state.critics(observations, actions),
            next_values=self.next_values,
            policy_loss=self.policy_loss,
        )
        begin_meta(state, learning)
        state.engine = configured_engine(self.config, self._spec(state), self._update_parts(state))
        return state, random_key

    def reset(self, random_key: RandomKey, rl_state: RLState) -> tuple[ActorCriticState, RandomKey]:
        """Where an environment begins anew, its noise comes back to its mean. The random key is not used.

        Those are the ones whose episode ended with the last step, or all where none has stepped. In the latter case
        their rows go to streams of their own, too: no window of n steps runs from a row before to one after.
        """
        state: ActorCriticState = rl_state.agent_state
        seen = rl_state.environment_state
        n = len(seen.stepped)
        begin_streams(state, seen)
        state.exploration.reset(seen)
        if self._noise_process == "ou":
            mean = self._hyperparameters.exploration_mean
            if state.noise is None or len(state.noise) != n:
                state.noise = torch.full((n, *state.bounds.shape), mean)
            state.noise = state.noise.clone()
            state.noise[torch.from_numpy(begins_anew(seen))] = mean
        return state, random_key

    @known_as("ours")
    def select_action(self, rl_state: RLState, iteration: int) -> tuple[Any, RLState]:
        """Uniform random actions until `learning_starts`, the exploring policy's from then on.

        Where the observations are tensors, so are the actions, on their device.
        """
        state: ActorCriticState = rl_state.agent_state
        key, random_key = rl_state.random_key.split(2)
        observations, n = rl_state.environment_state.observation, len(rl_state.environment_state.reward)
        if state.steps < self._hyperparameters.learning_starts:
            actions = self.random_actions(state, n, key)
        else:
            with torch.no_grad():
                actions = self.explore(state, as_tensors(observations, state.device), n, key)
        return beside(actions, observations), rl_state._replace(random_key=random_key)

    @known_as("ours")
    def record_observation(
        self, rl_state: RLState, action: Array, reward: Array, terminated: Array, next_rl_state: RLState
    ) -> RLState:
        """Insert the transitions of the environments that stepped. ValueError: a reward is not finite."""
        insert_stepped(rl_state, action, reward, terminated, next_rl_state)
        return next_rl_state

    @known_as("ours")
    def optimize_model(self, rl_state: RLState) -> RLState:
        """The updates, policy steps and meta steps that are due since the last call.

        LossNotFiniteError at the third update in a row whose loss or gradient is not finite.
        """
        return optimize_when_due(rl_state, self.config, self._updates_per_step, self._plan)

    @known_as("ours")
    def finish_updates(self, rl_state: RLState) -> RLState:
        """The updates that wait for `updates_per_call`, taken now. Raises as `optimize_model`."""
        return optimize_when_due(rl_state, self.config, self._updates_per_step, self._plan, finish=True)

    def export_state(self, state: ActorCriticState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The state as named tensors and JSON-able values, for a checkpoint."""
        return export_state(state)

    def import_state(self, state: ActorCriticState, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
        import_state(state, tensors, values)

    # Helpers ----------

    @known_as("minimum")
    def future_q(self, state: ActorCriticState, batch: Batch, next_actions: torch.Tensor) -> torch.Tensor:
        """`q_future` at the batch's next observations, ``[critics, batch]``."""
        q = self._q_future(state.target_critics, batch.next_observations, next_actions)
        if q.shape[-1:] != batch.rewards.shape or q.dim() > 2:
            size = len(batch.rewards)
            raise ValueError(f"q_future gave shape {list(q.shape)}; it must be [{size}] or [critics, {size}]")
        return q.unsqueeze(0) if q.dim() == 1 else q

    def subset_key(self, key: RandomKey) -> tuple[RandomKey | None, RandomKey]:
        """What an update's subset of target critics is drawn with, and what the rest of its target is."""
        if self._hyperparameters.critic_subset is None:
            return None, key
        subset_key, rest = key.split(2)
        return subset_key, rest

    def of_subset(self, q: torch.Tensor, subset_key: RandomKey | None) -> torch.Tensor:
        """``[critics, batch]``: the `critic_subset` critics drawn with the key (Chen et al. 2021, arXiv:2101.05982,
        algorithm 1), or all. ValueError where there are fewer.
        """
        size = self._hyperparameters.critic_subset
        if subset_key is None or size is None:
            return q
        if size > len(q):
            raise ValueError(f"critic_subset is {size}; there are {len(q)} critics")
        return q[subset_key.subset(len(q), size)]

    def _plan(self, index: int, updates: int) -> tuple[int, bool]:
        copies = crossings(self._copy_every, updates, updates + 1) > 0
        return crossings(self._policy_every, index, index + 1), copies

    def _spec(self, state: ActorCriticState) -> UpdateSpec:
        hyperparameters = self._hyperparameters
        next_value, policy_loss = name_of(self.next_values), name_of(self.policy_loss)
        if name_of(self.future_q) != "minimum" or self._q_future is not minimum_over_target_critics:
            next_value = "other"
        if shapes_policy_loss(state) or AFTER_POLICY_STEP.get(policy_loss) != name_of(self.after_policy_step):
            policy_loss = "other"
        smoothed = next_value == "smoothed"
        follow = "policy" if self.delays_targets and self._policy_every is not None else "update"
        if hyperparameters.target_update_interval is not None:
            follow = "copies"
        return UpdateSpec(
            batch_size=hyperparameters.batch_size,
            tau=hyperparameters.tau,
            huber_delta=hyperparameters.huber_delta,
            max_gradient_norm=hyperparameters.max_gradient_norm,
            policy_batch=hyperparameters.policy_batch,
            prioritized=hyperparameters.replay == "prioritized",
            targets_follow=follow,
            next_value=next_value,
            policy_loss=policy_loss,
            critic_subset=hyperparameters.critic_subset,
            target_noise=hyperparameters.target_noise if smoothed else 0.0,
            target_noise_clip=hyperparameters.target_noise_clip if smoothed else 0.0,
            target_entropy=self.target_entropy(state.bounds),
        )

    def _update_parts(self, state: ActorCriticState) -> Update:
        bounds = state.bounds
        return Update(
            replay=state.replay,
            critics=state.critics,
            target_critics=state.target_critics,
            policy=state.policy,
            target_policy=state.target_policy,
            optimizers=state.optimizers,
            device=state.device,
            bounds=Bounds(bounds.low, bounds.high, bounds.half_range),
            log_entropy_coefficient=state.log_entropy_coefficient,
            q_values=state.critics,
            next_values=lambda batch, key: self.next_values(state, batch, key),
            policy_loss=lambda batch, key: shaped_policy_loss(
                state, batch, lambda: self.policy_loss(state, batch, key)
            ),
            after_policy_step=lambda learned: self.after_policy_step(state, learned),
            entropy_coefficient=lambda: state.entropy_coefficient,
            set_entropy_coefficient=state.set_entropy_coefficient,
            reward_scale=lambda: state.reward_scale,
            loss_weights=lambda: state.loss_weights,
            changes_on_host="meta adds a loss of its own to the policy's" if shapes_policy_loss(state) else None,
            data_parallel=state.data_parallel,
        )


def minimum_over_target_critics(
    target_critics: torch.nn.Module, next_observations: Any, next_actions: torch.Tensor
) -> torch.Tensor:
    """The default `q_future`: every target critic's value; the target takes their minimum."""
    q: torch.Tensor = target_critics(next_observations, next_actions)
    return q


def begins_anew(seen: EnvironmentState) -> Array:
    """``[n]`` bool: the environments whose episode ended with the last step, or all where none has stepped."""
    ended: Array = (seen.terminated | seen.truncated) & seen.stepped
    return ended if seen.stepped.any() else np.ones(len(seen.stepped), np.bool_)


def configured_engine(config: AgentConfig, spec: UpdateSpec, update: Update) -> Engine:
    """The engine that the config asks for. ValueError where it asks for one that does not take the update.

    Under `overlap` the engine's own choice of threads leaves a core to whoever acts. With `compile` the networks'
    forward passes, and with them their gradients, go through torch.compile from here on.
    """
    training = config.training
    requested: str = training.engine
    if training.compile:
        for network in (update.critics, update.target_critics, update.policy, update.target_policy):
            if network is not None:
                network.compile()
        if requested == "auto" and update.device.type == "cpu":
            requested = "torch"
    threads = training.learner_threads
    if threads is None and training.overlap:
        threads = usable_threads(busy=1, batch_size=spec.batch_size)
    return make_engine(spec, update, requested, learner_threads=threads, precision=training.precision)


def check_policy(policy: torch.nn.Module) -> None:
    """TypeError where an object cannot serve as a policy."""
    if not isinstance(policy, torch.nn.Module) or not callable(getattr(policy, "sample_actions", None)):
        raise TypeError(f"policy is a {type(policy).__name__}; it must be a PolicyModel (with sample_actions)")


def flat_dim(space: gymnasium.Space[Any], what: str, model: str) -> int:
    """The length of a flat Box's vectors. ValueError for other spaces, which need the user's own networks."""
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return int(space.shape[0])
    raise ValueError(
        f"{what}_space is {space}; the default {model} takes flat Box {what}s only "
        f"(wrap the environment to flatten them, or pass {model}=)"
    )


def behind_encoder(
    space: gymnasium.Space[Any],
    wrapper: Callable[[torch.nn.Module, torch.nn.Module], torch.nn.Module],
    network: Callable[[int], torch.nn.Module],
) -> torch.nn.Module:
    """``network(width)`` for observations of a space: as it is for vectors of floats, else behind an encoder.

    `wrapper` puts the encoder and the network together. TypeError where no encoder takes the space.
    """
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        return network(int(space.shape[0]))
    encoder = ObservationEncoder(space)
    return wrapper(encoder, network(encoder.width))


def frozen_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy for targets: equal, apart in memory, without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


def as_tensors(observations: Any, device: torch.device) -> Any:
    """NumPy observations as tensors on a device, without a copy where possible; float64 becomes float32."""
    if isinstance(observations, dict):
        return {name: as_tensors(value, device) for name, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(as_tensors(value, device) for value in observations)
    tensor = torch.as_tensor(observations)
    return tensor.to(device, torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
