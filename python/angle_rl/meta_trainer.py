"""MetaLearnerTrainer: an AgentTrainer that learns about its own learning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from angle_rl.agents.actor_critic import as_tensors
from angle_rl.config import AgentConfig
from angle_rl.evaluation import Evaluation
from angle_rl.feed import DataFeed, ResetsFeed, make_feed
from angle_rl.meta import Bootstrapped, MetaCritic, MetaEntropy, MetaGradient
from angle_rl.meta.base import Learning, MetaInputs, MetaLearner
from angle_rl.meta.initialization import MAML, Initialization, Reptile
from angle_rl.meta.inner import tensors_in
from angle_rl.spaces import row_of
from angle_rl.task_trainer import TaskSet, check_config, task_feeds
from angle_rl.trainer import AgentTrainer
from angle_rl.types import Batch, RandomKey

LEARNERS: dict[str, Callable[[AgentConfig], MetaLearner]] = {
    "critic": lambda config: MetaCritic(learning_rate=config.hyperparameters.meta_learning_rate),
    "entropy": lambda config: MetaEntropy(learning_rate=config.hyperparameters.meta_learning_rate),
    "gradient": lambda config: MetaGradient(
        config.hyperparameters.meta_parameters, learning_rate=config.hyperparameters.meta_learning_rate
    ),
    "bootstrapped": lambda config: Bootstrapped(LEARNERS[_bootstrapped_name(config)](config)),
}
"""What the config's `meta` names"""

TASKS = "tasks."  # before the names of the task set's tensors


class MetaLearnerTrainer(AgentTrainer):
    """Runs the usual loop with itself as the meta trainer: every `meta_update_interval` steps its learners learn.

    It can also be passed as `meta` to another AgentTrainer, and belongs to that one from then on. Its draws, batches
    and noise alike, come from a random stream of their own: outside the meta-parameters, and what they set, a meta
    step leaves everything as it was.

    With `tasks` it learns an initialisation of policy and critics for a family of tasks in place of that: its own
    networks are the initialisation, `train` visits tasks in turn, `evaluate` scores the initialisation on all of them,
    and `adapt` trains from it on a new one. See `TaskSet` for what a visit is.

    Args:
        config: as AgentTrainer's; its `meta` names a learner where `learner` is None. With tasks, `steps` are
            environment steps of all tasks together.
        learner: a MetaLearner, or several, which set different hyperparameters. None with tasks.
        feed and what follows it: as AgentTrainer's. With tasks only policy, critics and q_future may be given.
        tasks: what `make_feed` takes, several times, with the same spaces: ids, functions that make environments,
            environments, feeds.
        initialization: how the initialisation is learned, a `Reptile` or a `MAML`; None: Reptile.

    Raises ValueError or TypeError as AgentTrainer, where a learner cannot learn about this agent, and where tasks
    contradict the config, one another or other arguments.
    """

    def __init__(
        self,
        config: AgentConfig,
        learner: MetaLearner | Sequence[MetaLearner] | None = None,
        feed: Any = None,
        *,
        tasks: Sequence[Any] | None = None,
        initialization: Initialization | None = None,
        **parts: Any,
    ) -> None:
        if not isinstance(config, AgentConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be an AgentConfig")
        if "meta" in parts:
            raise TypeError("meta is given; a MetaLearnerTrainer is its own meta trainer")
        self.tasks: TaskSet | None = None
        feeds: list[DataFeed] = []
        if tasks is None:
            if initialization is not None:
                raise ValueError("initialization is given without tasks; an initialisation is learned from tasks")
            self.learners = _checked_learners(config, learner)
        else:
            _check_tasks_alone(config, learner, feed, initialization, parts)
            feeds = task_feeds(tasks, config.training.parallel_environments)
            feed = feeds[0]
            self.learners = ()
        self.meta_steps = 0
        self.skipped_meta_steps = 0
        self._meta_key = RandomKey(config.training.seed).split(5)[4]
        self._learning: Learning | None = None
        self._resets: Callable[[], Any] = _nothing
        self._metrics_of_meta: dict[str, float] = {}
        self._seconds = 0.0  # in meta steps
        self._since: float | None = None  # when the first of them began
        super().__init__(config, feed, meta=self, **parts)
        if feeds:
            assert self._learning is not None
            self.tasks = TaskSet(
                config,
                feeds,
                self._rl_state.agent_state,
                self._learning,
                Reptile() if initialization is None else initialization,
                {"q_future": parts["q_future"]} if "q_future" in parts else {},
            )

    # An initialisation for tasks ----------

    def train(self, **by_episodes: Any) -> Evaluation | None:
        """As `AgentTrainer.train`; with tasks: visit them until the config's `steps`, with a run folder likewise.

        Returns the last evaluation: of the initialisation, on every task. ValueError: episodes are asked for with
        tasks, which are visited by steps. Otherwise raises as `AgentTrainer.train`.
        """
        if self.tasks is None:
            return super().train(**by_episodes)
        if any(value is not None for value in by_episodes.values()):
            raise ValueError(f"{', '.join(by_episodes)} belong to training by episodes; tasks are visited by steps")
        self._evaluates = self.tasks.can_evaluate()
        with self._running(None) as (run, progress, interrupted):
            while self.steps < self.config.training.steps and not interrupted():
                before = self.steps
                try:
                    self._visit(self.config.training.steps - before)
                except Exception:
                    self._save_to(run)
                    raise
                self._report(before, run, progress, None)
            return self._finish(run, interrupted())

    def advance(self, steps: int, *, learn: bool = True) -> None:
        """As `AgentTrainer.advance`; with tasks: visit them for so many environment steps, learning."""
        if self.tasks is None:
            super().advance(steps, learn=learn)
            return
        if steps < 1 or not learn:
            raise ValueError(f"steps is {steps} and learn {learn}; tasks are visited for at least 1 step, learning")
        until = self.steps + steps
        while self.steps < until:
            self._visit(until - self.steps)

    def adapt(self, feed: Any, steps: int, *, seed: int | None = None) -> AgentTrainer:
        """Train from the initialisation on a task, and return the trainer; the initialisation stays as it is.

        The trainer has copies of the networks and of the optimisers' moments, a replay of its own, and goes on with
        `advance`. It takes no random steps, whatever the config's `learning_starts`: the initialisation's policy acts,
        and explores, from the first step on. The first `batch_size` steps, at most half of all, are recorded and not
        learned from yet, since updates on a few rows alone would undo more than they teach.

        Args:
            feed: what `make_feed` takes, of the tasks' spaces.
            steps: environment steps, >= 1.
            seed: decides all that is random; None: one that follows from the config's. The same seed, the same trainer.

        Raises:
            ValueError: there are no tasks, steps < 1, or the feed has other spaces than the tasks.
        """
        if self.tasks is None:
            raise ValueError("this MetaLearnerTrainer has no tasks, and so no initialisation to adapt")
        made = make_feed(feed, num_environments=self.config.training.parallel_environments)
        return self.tasks.adapt(made, steps, seed)

    def evaluate(self, episodes: int | None = None) -> Evaluation:
        """As `AgentTrainer.evaluate`; with tasks: so many episodes of the initialisation on each, in their order."""
        return super().evaluate(episodes) if self.tasks is None else self.tasks.evaluate(episodes)

    def _visit(self, most: int) -> None:
        assert self.tasks is not None
        visit = self.tasks.visit(most)
        self.steps += visit.steps
        self.meta_steps, self.skipped_meta_steps = self.tasks.visits, self.tasks.skipped_visits
        self._metrics_of_meta = visit.metrics

    # The meta step ----------

    def update_meta_learning_model(
        self, states: Any, q: Tensor, *, batch: Batch | None = None, validation_batch: Batch | None = None
    ) -> dict[str, float]:
        """One meta step of each learner.

        Args:
            states: ``[n, *observation_shape]`` (dicts or tuples of such where the space nests), n >= 2. The first half
                is for training, the rest for validation.
            q: ``[critics, n]``, what the critics gave for them; learners may read it.
            batch, validation_batch: transitions to train and to validate on; None: drawn from the agent's replay where
                a learner needs them.

        Returns:
            The metrics: each learner's loss, the hyperparameters as they are set now, the steps skipped.

        Raises:
            ValueError: there are too few states; transitions are needed and the replay cannot give them; the trainer
                belongs to no agent yet. Nothing has changed then.

        A loss or gradient that is not finite leaves its learner as it was, and is counted. The trainer's thread.
        """
        began = time.perf_counter()
        self._since = began if self._since is None else self._since
        learning = self._learning
        if learning is None:
            raise ValueError("this MetaLearnerTrainer belongs to no agent; train it, or pass it to an AgentTrainer")
        key, following = self._meta_key.split(2)
        keys = key.split(3 + len(self.learners))
        training_states, validation_states = _halves(states)
        if any(learner.needs_transitions for learner in self.learners):
            batch = self._drawn(learning, keys[0]) if batch is None else batch
            validation_batch = self._drawn(learning, keys[1]) if validation_batch is None else validation_batch
        inputs = MetaInputs(
            states=training_states,
            validation_states=validation_states,
            initial_states=self._initial_states(learning, validation_states, keys[2]),
            q=q,
            batch=batch,
            validation_batch=validation_batch,
            key=key,
        )
        metrics = {}
        skipped = False
        for learner, own_key in zip(self.learners, keys[3:], strict=True):
            loss, gradients = learner.meta_gradient(learning, inputs._replace(key=own_key))
            metrics[f"meta/loss/{learner.name}"] = float(loss)
            finite = math.isfinite(float(loss)) and all(bool(g.isfinite().all()) for g in gradients.values())
            if finite:
                learner.step(gradients)
            skipped |= not finite
        self._meta_key = following
        self.meta_steps += 1
        self.skipped_meta_steps += skipped
        self.apply_hyperparameters()
        self._seconds += time.perf_counter() - began
        self._metrics_of_meta = metrics
        return self.meta_metrics()

    def apply_hyperparameters(self) -> None:
        """Set what the learners have learned so far, from the agent's next update on."""
        if self._learning is not None:
            values = {name: value for one in self.learners for name, value in one.hyperparameters().items()}
            self._learning.set_hyperparameters(values)

    def meta_metrics(self) -> dict[str, float]:
        """The newest losses, the hyperparameters that learners set, as they are now, the steps skipped, and the share
        of time that meta steps took since the first.
        """
        if self.tasks is not None:
            visits = {"meta/visits": float(self.tasks.visits), "meta/skipped": float(self.tasks.skipped_visits)}
            return self._metrics_of_meta | visits
        if self._since is None or self._learning is None:
            return {}
        configured = self._learning.hyperparameters
        values: dict[str, float | None] = {}
        for learner in self.learners:
            learned = learner.hyperparameters()
            names = dict.fromkeys((*learner.sets, *learned))  # one that is set may be several numbers
            values |= {f"meta/{name}": learned.get(name, configured.get(name)) for name in names}
        share = self._seconds / max(time.perf_counter() - self._since, 1e-9)
        known = {name: value for name, value in values.items() if value is not None}
        return {
            **self._metrics_of_meta,
            **known,
            "meta/skipped": float(self.skipped_meta_steps),
            "meta/time_share": share,
        }

    @property
    def shapes_policy_loss(self) -> bool:
        """Whether a learner has a `policy_auxiliary_loss`."""
        return any(learner.shapes_policy_loss for learner in self.learners)

    @property
    def reads_features(self) -> bool:
        """Whether that reads the policy's features."""
        return any(learner.shapes_policy_loss and learner.reads_features for learner in self.learners)

    def policy_auxiliary_loss(self, features: Tensor | None, batch: Batch) -> Tensor | None:
        """What every policy step descends besides its own loss: the learners' together; None where none has any."""
        losses = [one.policy_auxiliary_loss(features, batch) for one in self.learners if one.shapes_policy_loss]
        given = [loss for loss in losses if loss is not None]
        return torch.stack(given).sum() if given else None

    # What a trainer that it belongs to calls ----------

    def bind(self, learning: Learning) -> None:
        """Belong to an agent from now on. Raises ValueError as the learners' `begin`; nothing has changed then."""
        if self.tasks is not None:
            raise ValueError("this MetaLearnerTrainer has tasks; it cannot learn about another trainer's agent")
        keys = self._meta_key.split(1 + len(self.learners))
        starts = [learner.begin(learning, key) for learner, key in zip(self.learners, keys[1:], strict=True)]
        for learner, start in zip(self.learners, starts, strict=True):
            learner.adopt(start)
        self._meta_key, self._learning = keys[0], learning

    def bind_feed(self, feed: DataFeed) -> DataFeed:
        """The feed to train on in place of this one: one that keeps what it shows after resets."""
        keeping = ResetsFeed(feed)
        self._resets = lambda: keeping.reset_observations
        return keeping

    def export_meta_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The learners' state as named tensors, and JSON-able values."""
        tensors = {
            f"{index}.{name}": tensor
            for index, learner in enumerate(self.learners)
            for name, tensor in learner.state_dict().items()
        }
        values = {
            "learners": [learner.name for learner in self.learners],
            "key": self._meta_key.value,
            "steps": self.meta_steps,
            "skipped": self.skipped_meta_steps,
        }
        if self.tasks is not None:
            of_tasks, values["tasks"] = self.tasks.export_state()
            tensors |= {TASKS + name: tensor for name, tensor in of_tasks.items()}
        return tensors, values

    def import_meta_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `export_meta_state` gave. ValueError where it is of other learners; nothing changes then."""
        names = [learner.name for learner in self.learners]
        if values["learners"] != names:
            raise ValueError(f"the checkpoint's meta-learners are {values['learners']}; here they are {names}")
        if (self.tasks is not None) != ("tasks" in values):
            there, here = ("no tasks", "some") if self.tasks is not None else ("tasks", "none")
            raise ValueError(f"the checkpoint is of {there}, and this trainer has {here}")
        if self.tasks is not None:
            self.tasks.import_state(_part(tensors, TASKS), values["tasks"])
        own = [_part(tensors, f"{index}.") for index in range(len(names))]
        before = [learner.state_dict() for learner in self.learners]
        try:
            for learner, state in zip(self.learners, own, strict=True):
                learner.load_state_dict(state)
        except ValueError:
            for learner, state in zip(self.learners, before, strict=True):
                learner.load_state_dict(state)
            raise
        self._meta_key = RandomKey(values["key"])
        self.meta_steps, self.skipped_meta_steps = values["steps"], values["skipped"]

    # Helpers ----------

    def _drawn(self, learning: Learning, key: RandomKey) -> Batch:
        if learning.replay is None or len(learning.replay) == 0:
            names = ", ".join(learner.name for learner in self.learners if learner.needs_transitions)
            raise ValueError(
                f"{names} needs transitions, and there is no replay to draw them from; pass batch= and "
                "validation_batch="
            )
        drawn: Batch = learning.replay.sample(learning.batch_size, key=key, device=learning.device)
        return drawn

    def _initial_states(self, learning: Learning, otherwise: Any, key: RandomKey) -> Any:
        """As many of the states after resets as an update has rows, drawn with replacement; the others without any."""
        kept = self._resets()
        if kept is None:
            return otherwise
        rows = len(next(tensors_in(kept)))
        if rows == 0:
            return otherwise
        chosen = (key.uniform(learning.batch_size) * rows).long().numpy()
        return _like(as_tensors(row_of(kept, chosen), learning.device), otherwise)


def _bootstrapped_name(config: AgentConfig) -> str:
    """The learner that "bootstrapped" wraps: MetaEntropy for the entropy coefficient alone, else MetaGradient."""
    return "entropy" if config.hyperparameters.meta_parameters == ("entropy_coefficient",) else "gradient"


def _checked_learners(
    config: AgentConfig, learner: MetaLearner | Sequence[MetaLearner] | None
) -> tuple[MetaLearner, ...]:
    if learner is None:
        name = config.hyperparameters.meta
        if name is None:
            raise ValueError("learner is None and the config's meta, too; give one of them, such as MetaEntropy()")
        learner = LEARNERS[name](config)
    learners = (learner,) if isinstance(learner, MetaLearner) else tuple(learner)
    for one in learners:
        if not isinstance(one, MetaLearner):
            raise TypeError(f"learner is a {type(one).__name__}; it must be a MetaLearner, or several")
    if not learners:
        raise ValueError("learner is empty; at least 1 MetaLearner is needed")
    every = [setting for one in learners for setting in one.sets]
    for setting in every:
        if every.count(setting) > 1:
            raise ValueError(f"two learners set {setting}; each hyperparameter can be learned by one")
    return learners


def _check_tasks_alone(
    config: AgentConfig, learner: Any, feed: Any, initialization: Any, parts: Mapping[str, Any]
) -> None:
    """Raise where tasks are given with what they take the place of."""
    if learner is not None:
        raise ValueError(
            "learner and tasks are both given; a MetaLearnerTrainer learns hyperparameters of one agent, or an "
            "initialisation for tasks"
        )
    if feed is not None:
        raise ValueError("feed and tasks are both given; with tasks these are the feeds")
    for name in parts:
        if name not in ("policy", "critics", "q_future"):
            raise ValueError(f"{name} is given with tasks; each task's trainer has its own")
    if initialization is not None and not isinstance(initialization, Reptile | MAML):
        raise TypeError(f"initialization is a {type(initialization).__name__}; it must be a Reptile or a MAML")
    check_config(config)


def _halves(states: Any) -> tuple[Any, Any]:
    """The first half of the rows, and the rest. ValueError where there are fewer than 2."""
    rows = len(next(tensors_in(states)))
    if rows < 2:
        raise ValueError(f"states has {rows} rows; at least 2 are needed, to train and to validate on")
    return row_of(states, slice(0, rows // 2)), row_of(states, slice(rows // 2, rows))


def _like(tree: Any, model: Any) -> Any:
    """The tensors in the dtypes of another tree's."""
    if isinstance(tree, dict):
        return {name: _like(part, model[name]) for name, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_like(part, other) for part, other in zip(tree, model, strict=True))
    return tree.to(model.dtype)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _nothing() -> None:
    """There are no reset observations."""
