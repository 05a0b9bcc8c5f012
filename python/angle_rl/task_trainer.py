"""A family of tasks, and what it teaches an initialisation: the part of MetaLearnerTrainer that has tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from angle_rl import ops
from angle_rl.agents.optimizers import moments_of
from angle_rl.agents.state import ActorCriticState, learned_tensors
from angle_rl.config import AgentConfig
from angle_rl.evaluation import Evaluation, torch_threads
from angle_rl.feed import DataFeed, make_feed
from angle_rl.meta.base import Learning
from angle_rl.meta.initialization import MAML, Initialization, OuterGradient
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey

NETWORKS = ("critics", "policy")  # that MAML's outer steps move; targets follow
ADAM = "adam"  # before the names of their moments


class Visit(NamedTuple):
    """What one outer step took and gave."""

    steps: int  # environment steps
    metrics: dict[str, float]
    finite: bool  # False: something was not, and the initialisation stayed as it was


class TaskSet:
    """Trainers of a family of tasks, a task each, that begin every visit at one initialisation and teach it.

    The initialisation is an agent's state: networks, targets, the entropy coefficient and the optimisers' moments. A
    visit copies all of it into the task's trainer, which then steps and learns as any trainer does, on a replay of its
    own that stays from visit to visit. The `learning_starts` random steps are taken once for each task, at the start
    of its first visit and besides its steps.

    Reptile moves networks, targets and the entropy coefficient. Under MAML the outer steps move policy and critics,
    the targets follow by the config's tau with each, and the entropy coefficient is taken over from the task. The
    moments are taken over from the task under both: the next one begins with them, as an adaptation does (they are
    running means, which an optimiser would need a good part of a short visit to find anew).

    Not saved: the tasks' replays and environments, so after a resume each task begins with random steps again.

    Args:
        config: the trainer's. Its seed decides all that is random.
        feeds: the tasks, of the same spaces, at least one.
        initial: the state that holds the initialisation; changed in place by `visit`.
        learning: what the agent of that state shows.
        initialization: how it learns.
        parts: `AgentTrainer`'s arguments that all trainers get.

    Thread rule: the trainer's thread.
    """

    def __init__(
        self,
        config: AgentConfig,
        feeds: Sequence[DataFeed],
        initial: ActorCriticState,
        learning: Learning,
        initialization: Initialization,
        parts: Mapping[str, Any],
    ) -> None:
        self.initial = initial
        self.initialization = initialization
        self.visits = 0
        self.skipped_visits = 0
        self._config = config
        self._learning = learning
        self._parts = dict(parts)
        self._key, seeds, self._adaptation_key = RandomKey(config.training.seed).split(6)[5].split(3)
        most = min(
            config.hyperparameters.replay_capacity,
            max(config.training.steps + feeds[0].num_environments, config.hyperparameters.batch_size),
        )
        self.trainers = [
            self._trainer(config.replace(seed=key.seed(), replay_capacity=most), feed)
            for key, feed in zip(seeds.split(len(feeds)), feeds, strict=True)
        ]
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if isinstance(initialization, MAML):
            self._optimizers = {
                name: torch.optim.Adam(
                    [p for p in getattr(initial, name).parameters() if p.requires_grad],
                    lr=initialization.learning_rate,
                )
                for name in NETWORKS
            }

    # What it does ----------

    def visit(self, most: int) -> Visit:
        """One outer step: a task drawn at random, and at most so many environment steps on it."""
        pick_key, outer_key, self._key = self._key.split(3)
        index = int(float(pick_key.uniform(1)) * len(self.trainers))
        trainer = self.trainers[index]
        state: ActorCriticState = trainer.rl_state.agent_state
        begin_at(state, self.initial)
        before = trainer.steps
        random_steps = max(0, self._config.hyperparameters.learning_starts - before)
        trainer.advance(min(random_steps + self.initialization.steps, most))
        learned = learned_tensors(state)
        finite = all(bool(tensor.isfinite().all()) for tensor in learned.values())
        metrics = {"meta/task": float(index)}
        if finite:
            metrics |= self._learn(state, outer_key)
        finite &= metrics.pop("finite", 1.0) > 0
        self.visits += 1
        self.skipped_visits += not finite
        return Visit(trainer.steps - before, metrics, finite)

    def adapt(self, feed: DataFeed, steps: int, seed: int | None) -> AgentTrainer:
        """A trainer that began at the initialisation and has taken so many environment steps on a feed.

        ValueError: `steps` < 1, or other spaces than the tasks'. See `MetaLearnerTrainer.adapt`.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it must be at least 1")
        check_spaces([self.trainers[0].feed, feed], ["tasks[0]", "the feed to adapt to"])
        config = self._config.replace(
            steps=steps, learning_starts=0, seed=self._adaptation_key.seed() if seed is None else seed
        )
        trainer = self._trainer(config, feed)
        state: ActorCriticState = trainer.rl_state.agent_state
        begin_at(state, self.initial)
        recorded = min(config.hyperparameters.batch_size, steps // 2)
        if recorded > 0:
            trainer.advance(recorded, learn=False)
            state.learned_steps = state.steps  # no updates are owed for these
        trainer.advance(max(1, steps - trainer.steps))
        return trainer

    def evaluate(self, episodes: int | None) -> Evaluation:
        """Whole episodes of the initialisation's deterministic actions: so many on each task, in their order."""
        found = []
        for trainer in self.trainers:
            begin_at(trainer.rl_state.agent_state, self.initial)
            found.append(trainer.evaluate(episodes))
        return Evaluation(
            returns=tuple(value for one in found for value in one.returns),
            lengths=tuple(length for one in found for length in one.lengths),
        )

    def can_evaluate(self) -> bool:
        """Whether `evaluate` works here; warns where it does not."""
        return all(trainer._can_evaluate() for trainer in self.trainers)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What there is to save besides the initialisation itself: named tensors, and JSON-able values."""
        tensors = {
            f"{ADAM}.{name}.{index}.{slot}": tensor.detach().clone()
            for name, optimizer in self._optimizers.items()
            for index, slots in moments_of(optimizer).items()
            for slot, tensor in slots.items()
        }
        return tensors, {
            "initialization": self.initialization.name,
            "number": len(self.trainers),
            "key": self._key.value,
            "visits": self.visits,
            "skipped": self.skipped_visits,
        }

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it does not fit; nothing changes then."""
        for what, own in (("initialization", self.initialization.name), ("number", len(self.trainers))):
            if values[what] != own:
                raise ValueError(f"the checkpoint's {what} of tasks is {values[what]!r}; here it is {own!r}")
        slots: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._optimizers}
        for key, tensor in tensors.items():
            part, name, index, slot = key.split(".")
            parameters = self._optimizers[name].param_groups[0]["params"] if name in slots else []
            if part != ADAM or not int(index) < len(parameters):
                raise ValueError(f"the checkpoint holds {key}, which these tasks do not have")
            parameter = parameters[int(index)]
            if slot != "step" and tensor.shape != parameter.shape:
                raise ValueError(f"{key} has shape {list(tensor.shape)}; it must be {list(parameter.shape)}")
            slots[name].setdefault(int(index), {})[slot] = tensor.clone()
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict({"state": slots[name], "param_groups": optimizer.state_dict()["param_groups"]})
        self._key = RandomKey(values["key"])
        self.visits, self.skipped_visits = values["visits"], values["skipped"]

    # Helpers ----------

    def _trainer(self, config: AgentConfig, feed: DataFeed) -> AgentTrainer:
        """A trainer whose networks are copies of the initialisation's, of whatever kind these are."""
        return AgentTrainer(
            config.replace(meta_update_interval=None),
            feed,
            policy=copy.deepcopy(self.initial.policy),
            critics=copy.deepcopy(self.initial.critics),
            **self._parts,
        )

    def _learn(self, state: ActorCriticState, key: RandomKey) -> dict[str, float]:
        """Move the initialisation by what a task's trainer has learned, or has seen."""
        initial, how = self.initial, self.initialization
        metrics = {}
        if isinstance(how, MAML):
            with torch_threads(self._config.training.threads):
                metrics = self._outer_steps(how, state, key)
            if initial.log_entropy_coefficient is not None and state.log_entropy_coefficient is not None:
                initial.log_entropy_coefficient.detach().copy_(state.log_entropy_coefficient.detach())
        else:
            how.move(learned_tensors(initial), learned_tensors(state))
        _refresh_entropy_coefficient(initial)
        _copy_moments(initial, state)
        return metrics

    def _outer_steps(self, how: MAML, state: ActorCriticState, key: RandomKey) -> dict[str, float]:
        learning, replay = self._learning, state.replay
        metrics: dict[str, float] = {}
        finite = True
        for outer_key in key.split(how.updates):
            loss_key, *keys = outer_key.split(2 + how.inner_steps)
            batches = [replay.sample(learning.batch_size, key=one, device=learning.device) for one in keys]
            found = how.outer_gradients(learning, batches[:-1], batches[-1], loss_key)
            for name in NETWORKS:
                gradient: OuterGradient = getattr(found, name)
                metrics[f"meta/loss/{name}"] = float(gradient.loss)
            if not (found.critics.is_finite() and found.policy.is_finite()):
                finite = False
                continue
            for name in NETWORKS:
                self._descend(name, getattr(found, name).gradients)
            self._follow()
        return metrics | {"finite": float(finite)}

    def _descend(self, name: str, gradients: Mapping[str, Tensor]) -> None:
        network = getattr(self.initial, name)
        for own, parameter in network.named_parameters():
            parameter.grad = gradients.get(own)
        self._optimizers[name].step()
        self._optimizers[name].zero_grad(set_to_none=True)

    def _follow(self) -> None:
        """Move the initialisation's targets after it, as every update does."""
        for name in NETWORKS:
            target, online = getattr(self.initial, f"target_{name}"), getattr(self.initial, name)
            if target is not None:
                tau = self._config.hyperparameters.tau
                ops.update_targets(
                    [p.detach() for p in target.parameters()], [p.detach() for p in online.parameters()], tau
                )


def begin_at(state: ActorCriticState, initial: ActorCriticState) -> None:
    """Copy an initialisation into an agent's state: all that it learns, and the optimisers' moments."""
    own = learned_tensors(state)
    with torch.no_grad():
        for name, tensor in learned_tensors(initial).items():
            own[name].copy_(tensor)
    _refresh_entropy_coefficient(state)
    _copy_moments(state, initial)


def check_spaces(feeds: Sequence[DataFeed], names: Sequence[str]) -> None:
    """ValueError, naming both, where the feeds' observations or actions differ."""
    first = feeds[0]
    for feed, name in zip(feeds[1:], names[1:], strict=True):
        for what in ("observation_space", "action_space"):
            own, expected = getattr(feed, what), getattr(first, what)
            if own != expected:
                raise ValueError(
                    f"{name} ({feed.name}) has the {what} {own}, and {names[0]} ({first.name}) {expected}; "
                    "one initialisation needs the same"
                )


def task_feeds(tasks: Any, num_environments: int) -> list[DataFeed]:
    """The feeds of tasks. ValueError: there is none, or spaces differ; TypeError: `tasks` is no sequence."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks is a {type(tasks).__name__}; it must be a list of what make_feed takes")
    if len(tasks) == 0:
        raise ValueError("tasks is empty; at least 1 task is needed")
    feeds = [make_feed(task, num_environments=num_environments) for task in tasks]
    for index, feed in enumerate(feeds):
        if any(feed is other for other in feeds[:index]):
            raise ValueError(f"tasks[{index}] is the same feed as an earlier task; each task needs its own")
    check_spaces(feeds, [f"tasks[{index}]" for index in range(len(feeds))])
    return feeds


def check_config(config: AgentConfig) -> None:
    """ValueError where a config asks for what an initialisation cannot learn with."""
    hyperparameters, training = config.hyperparameters, config.training
    if hyperparameters.agent not in ("sac", "sac_discrete", "td3", "ddpg"):
        raise ValueError(f"agent is {hyperparameters.agent!r}, which has no policy; tasks need one that has")
    if hyperparameters.learning_rate_schedule != "constant":
        raise ValueError(
            f"learning_rate_schedule is {hyperparameters.learning_rate_schedule!r}; tasks need 'constant', since every "
            "visit to one begins anew"
        )
    for name in ("normalize_observations", "normalize_rewards", "overlap"):
        if getattr(training, name):
            raise ValueError(f"{name} is True; tasks, which share one initialisation, need it to be False")
    if hyperparameters.meta is not None:
        raise ValueError(f"the config's meta is {hyperparameters.meta!r} and tasks are given; give one of them")


def _refresh_entropy_coefficient(state: ActorCriticState) -> None:
    if state.log_entropy_coefficient is not None:
        state.set_entropy_coefficient(state.log_entropy_coefficient.detach().exp())


def _copy_moments(state: ActorCriticState, other: ActorCriticState) -> None:
    """Let the optimisers remember what another state's do. Their step sizes stay."""
    for name, optimizer in state.optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        moments = copy.deepcopy(moments_of(other.optimizers[name]))
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
