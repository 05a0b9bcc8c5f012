"""AgentTrainer: the loop that runs an agent on its environments, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from angle_rl import checkpoint, runs
from angle_rl.agents.actor_critic import ActorCritic, QFuture, as_tensors
from angle_rl.agents.base import Agent, crossings
from angle_rl.agents.noise import policy_actions
from angle_rl.agents.sac import SAC
from angle_rl.agents.state import LossNotFiniteError
from angle_rl.agents.td3 import TD3
from angle_rl.config import AgentConfig, config_from_dict
from angle_rl.feed import DataFeed, make_evaluation_feed, make_feed
from angle_rl.types import Array, EnvironmentState, RandomKey, RLState

AGENTS: dict[str, type[ActorCritic]] = {"sac": SAC, "td3": TD3}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Whole episodes of the policy's deterministic actions."""

    returns: tuple[float, ...]  # undiscounted sum of rewards of each episode
    lengths: tuple[int, ...]  # steps of each episode

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(np.mean(self.returns))


class AgentTrainer:
    """Runs an agent: data feed, replay, critic steps, policy steps, meta steps. One thread.

    Args:
        config: everything that is not given below.
        feed: where transitions come from: what `make_feed` takes; None: the config's `environment`.
        policy: a PolicyModel in place of the agent's own.
        critics: a module ``(observations, actions) -> q  [critics, batch]`` in place of TwinQ.
        replay: a buffer in place of a new one; its discount and n_step must be the config's.
        meta: has `update_meta_learning_model(states, q)`, called every `meta_update_interval` steps with the
            newest batch's observations and q values ``[critics, batch]``.
        agent: an Agent in place of the config's.
        q_future: ``f(target_critics, next_observations, next_actions)``; None: the target critics' minimum.
        evaluation_feed: where `evaluate` runs, of one environment; None: one like the training's.

    Raises ValueError or TypeError where these contradict the config or one another.
    """

    def __init__(
        self,
        config: AgentConfig,
        feed: Any = None,
        policy: torch.nn.Module | None = None,
        critics: torch.nn.Module | None = None,
        replay: Any = None,
        meta: Any = None,
        agent: Agent | None = None,
        *,
        q_future: QFuture | None = None,
        evaluation_feed: Any = None,
    ) -> None:
        if not isinstance(config, AgentConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be an AgentConfig")
        if meta is not None and not callable(getattr(meta, "update_meta_learning_model", None)):
            raise TypeError(f"meta is a {type(meta).__name__}; it must have update_meta_learning_model(states, q)")
        if agent is not None and q_future is not None:
            raise ValueError("q_future and agent are both given; such an agent takes q_future itself")
        _check_device(config.training.device)
        self.config = config
        self.run_folder: Path | None = None
        self.steps = 0
        self.agent: Agent = AGENTS[config.hyperparameters.agent](config, q_future) if agent is None else agent
        agent_key, self._feed_key, run_key, self._evaluation_key = RandomKey(config.training.seed).split(4)
        source = config.training.environment if feed is None else feed
        self.feed = make_feed(source, num_environments=config.training.parallel_environments)
        self._evaluation_source = evaluation_feed
        agent_state, _ = self.agent.init(
            agent_key,
            observation_space=self.feed.observation_space,
            action_space=self.feed.action_space,
            policy=policy,
            critics=critics,
            replay=replay,
            meta=meta,
        )
        nothing_seen: Any = None  # until train() begins
        self._rl_state = RLState(agent_state, nothing_seen, run_key, 0, 0, None)
        self._episode_returns = np.zeros(self.feed.num_environments)
        self._episode_lengths = np.zeros(self.feed.num_environments, np.int64)
        self._recent_returns: deque[float] = deque(maxlen=20)
        self._mean_return: float | None = None  # of these
        self._evaluates = True
        self._last_checkpoint: Path | None = None

    # The state of a run; None where the agent has no such thing ----------

    @property
    def rl_state(self) -> RLState:
        """All that changes while the agent runs."""
        return self._rl_state

    @property
    def policy(self) -> Any:
        """The policy that acts."""
        return self._of_agent("policy")

    @property
    def target_policy(self) -> Any:
        """The slow copy that gives target actions (TD3)."""
        return self._of_agent("target_policy")

    @property
    def critics(self) -> Any:
        """The critics: ``(observations, actions) -> q  [critics, batch]``."""
        return self._of_agent("critics")

    @property
    def target_critics(self) -> Any:
        """Their slow copy."""
        return self._of_agent("target_critics")

    @property
    def optimizers(self) -> Any:
        """The optimisers by name."""
        return self._of_agent("optimizers")

    @property
    def replay(self) -> Any:
        """The replay buffer."""
        return self._of_agent("replay")

    @property
    def meta(self) -> Any:
        """What was passed as `meta`."""
        return self._of_agent("meta")

    @property
    def updates(self) -> int:
        """Updates taken."""
        return self._of_agent("updates") or 0

    @property
    def skipped_updates(self) -> int:
        """Updates left out because a loss was not finite."""
        return self._of_agent("skipped_updates") or 0

    def _of_agent(self, name: str) -> Any:
        return getattr(self._rl_state.agent_state, name, None)

    # Training ----------

    def train(self) -> Evaluation | None:
        """Run until `steps` of the config, evaluate, and leave a run folder; returns the last evaluation.

        None, after a warning, where `evaluate` would raise: the run is then trained and not evaluated.
        The first Ctrl-C saves and returns None, the second raises KeyboardInterrupt at once. Where an
        environment raises, or gives a reward that is not finite, the run is saved and the error raised. The
        third update in a row whose loss is not finite raises LossNotFiniteError, naming the last checkpoint.
        """
        agent, total = self.agent, self.config.training.steps
        self._evaluates = self._can_evaluate()
        with self._running() as (run, progress, interrupted):
            state = self._begin()
            while self.steps < total and not interrupted():
                steps_before = self.steps
                action, state = agent.select_action(state, state.iteration)
                seen = self._step_environments(state, action, run)
                next_state = state._replace(environment_state=seen, iteration=state.iteration + 1)
                state = agent.record_observation(state, action, seen.reward, seen.terminated, next_state)
                self.steps += int(seen.stepped.sum())
                state = self._learn(state)  # sample, target, critic step; policy and meta step where due
                self._rl_state = state = self._end_episodes(state, run)
                self._report(steps_before, run, progress)
            return self._finish(run, interrupted())

    def _begin(self) -> RLState:
        """The state to run from: the one before, or the first of new episodes."""
        state = self._rl_state
        if state.environment_state is None:
            seen, self._feed_key = self.feed.init(self._feed_key)
            state = state._replace(environment_state=seen)
            agent_state, random_key = self.agent.reset(state.random_key, state)
            self._rl_state = state = state._replace(agent_state=agent_state, random_key=random_key)
        return state

    def _step_environments(self, state: RLState, action: Array, run: runs.Run) -> EnvironmentState:
        """What the actions led to. Where the environment fails, the run is saved before the error goes on."""
        try:
            seen, self._feed_key = self.feed.step(self._feed_key, state.environment_state, action)
            if not np.isfinite(seen.reward).all():
                worst = int(np.flatnonzero(~np.isfinite(seen.reward))[0])
                raise ValueError(
                    f"environment {worst} of {self.feed.name} gave the reward {seen.reward[worst]} "
                    f"after {self.steps} steps; rewards must be finite"
                )
        except Exception:
            self._save_to(run)
            raise
        return seen

    def _learn(self, state: RLState) -> RLState:
        try:
            return self.agent.optimize_model(state)
        except LossNotFiniteError as error:
            good = "there is no checkpoint yet" if self._last_checkpoint is None else self._last_checkpoint
            raise LossNotFiniteError(f"{error}; the last good checkpoint: {good}") from error

    def _end_episodes(self, state: RLState, run: runs.Run) -> RLState:
        """Count what the episodes gave, and reset the agent for each that ended."""
        seen = state.environment_state
        self._episode_returns += np.where(seen.stepped, seen.reward, 0.0)
        self._episode_lengths += seen.stepped
        for index in np.flatnonzero((seen.terminated | seen.truncated) & seen.stepped):
            episode_return, length = float(self._episode_returns[index]), int(self._episode_lengths[index])
            self._recent_returns.append(episode_return)
            self._mean_return = float(np.mean(self._recent_returns))
            run.log(self.steps, {"train/episode_return": episode_return, "train/episode_length": length})
            self._episode_returns[index], self._episode_lengths[index] = 0.0, 0
            agent_state, random_key = self.agent.reset(state.random_key, state)
            iteration = 0 if self.feed.num_environments == 1 else state.iteration
            state = RLState(agent_state, seen, random_key, iteration, state.episode + 1, state.trajectory)
        return state

    def _report(self, steps_before: int, run: runs.Run, progress: runs.Progress) -> None:
        """Metrics, evaluation and checkpoint, each when its interval was crossed."""
        service, training = self.config.service, self.config.training
        progress.update(self.steps, self.updates, self._mean_return)
        if crossings(service.log_interval, steps_before, self.steps):
            run.log(self.steps, self._metrics() | progress.rates())
        if self.steps >= training.steps:
            return  # the end evaluates and saves anyway
        if crossings(training.evaluation_interval, steps_before, self.steps):
            self._evaluate_into(run)
        if crossings(service.checkpoint_interval, steps_before, self.steps):
            self._save_to(run)

    def _metrics(self) -> dict[str, float]:
        """What there is to log of the newest update."""
        metrics = {
            "updates": float(self.updates),
            "skipped_updates": float(self.skipped_updates),
            "episodes": float(self._rl_state.episode),
        }
        newest = self._of_agent("last_update")
        if newest is not None:
            metrics |= {"loss/critic": float(newest.critic_loss), "q_mean": float(newest.q.mean())}
            if newest.policy_loss is not None:
                metrics["loss/policy"] = float(newest.policy_loss)
        if self._of_agent("entropy_coefficient") is not None:
            metrics["entropy_coefficient"] = float(self._of_agent("entropy_coefficient"))
        return metrics

    def _finish(self, run: runs.Run, interrupted: bool) -> Evaluation | None:
        evaluation = None if interrupted else self._evaluate_into(run)
        self._save_to(run)
        run.plot()
        return evaluation

    @contextmanager
    def _running(self) -> Iterator[tuple[runs.Run, runs.Progress, Callable[[], bool]]]:
        """The run folder, the progress bar, Ctrl-C and torch's threads, while training."""
        with ExitStack() as stack:
            run = stack.enter_context(self._open_run())
            self.run_folder = run.folder
            progress = runs.Progress(
                self.config.training.steps,
                completed=self.steps,
                updates=self.updates,
                enabled=self.config.service.progress,
            )
            stack.enter_context(progress)
            stack.enter_context(_torch_threads(self.config.training.threads))
            yield run, progress, stack.enter_context(interrupts())

    def _open_run(self) -> runs.Run:
        service, training = self.config.service, self.config.training
        loggers = ("jsonl", "tensorboard") if service.tensorboard else ("jsonl",)
        if self.run_folder is not None:
            return runs.resume_run(
                self.run_folder, step=self.steps, loggers=loggers, keep_checkpoints=service.keep_checkpoints
            )
        return runs.create_run(
            service.run_folder,
            environment=self.feed.name,
            agent=type(self.agent).__name__.lower(),
            seed=training.seed,
            config=dataclasses.asdict(self.config),
            loggers=loggers,
            keep_checkpoints=service.keep_checkpoints,
        )

    # Evaluation ----------

    def evaluate(self, episodes: int | None = None) -> Evaluation:
        """Whole episodes with deterministic actions; None: the config's `evaluation_episodes`.

        Runs on a feed and a key of its own: training goes on as if there had been no evaluation, and every
        evaluation meets the same initial states. TypeError where the agent has no policy, ValueError where no
        feed like the training's can be made and no `evaluation_feed` was given.
        """
        episodes = self.config.training.evaluation_episodes if episodes is None else episodes
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}; it must be at least 1")
        policy = self.policy
        feed = self._make_evaluation_feed()
        training_mode = policy.training
        policy.eval()
        try:
            with torch.no_grad(), _torch_threads(self.config.training.threads):
                return _whole_episodes(feed, policy, self._evaluation_key, episodes)
        finally:
            policy.train(training_mode)
            feed.close()

    def _make_evaluation_feed(self) -> DataFeed:
        """Where to evaluate. Raises as `evaluate` says."""
        if not callable(getattr(self.policy, "sample_actions", None)):
            raise TypeError(f"{type(self.agent).__name__} has no policy with sample_actions to evaluate")
        source = self._evaluation_source
        feed = make_evaluation_feed(self.feed) if source is None else make_feed(source)
        if feed is None:
            raise ValueError(f"no second {self.feed.name} can be made to evaluate on; pass evaluation_feed=")
        if feed.num_environments != 1:
            raise ValueError(f"evaluation_feed has {feed.num_environments} environments; it must have 1")
        return feed

    def _can_evaluate(self) -> bool:
        """Whether `evaluate` works here; warns where it does not."""
        try:
            self._make_evaluation_feed().close()
        except (TypeError, ValueError) as error:
            warnings.warn(f"training without evaluation: {error}", stacklevel=3)
            return False
        return True

    def _evaluate_into(self, run: runs.Run) -> Evaluation | None:
        """Evaluate, log it, and keep the checkpoint if it is the best so far; None where it cannot be done."""
        if not self._evaluates:
            return None
        evaluation = self.evaluate()
        returns = np.array(evaluation.returns)
        run.log(
            self.steps,
            {
                "evaluation/mean_return": evaluation.mean_return,
                "evaluation/std_return": float(returns.std()),
                "evaluation/episodes": float(len(returns)),
            },
        )
        if self._saves and (run.best_return is None or evaluation.mean_return > run.best_return):
            run.save_best(evaluation.mean_return, *self._exported())
        return evaluation

    # Checkpoints ----------

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder: networks, optimisers, replay, counters and random state.

        TypeError where the agent has no `export_state`. Raises as `checkpoint.save` besides.
        """
        if not self._saves:
            raise TypeError(f"{type(self.agent).__name__} has no export_state; it cannot be saved")
        return checkpoint.save(path, *self._exported())

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint, or from a run folder's newest one.

        The networks, optimisers, replay, counters and random state come back; environments begin new episodes.
        ValueError where the checkpoint is damaged or does not fit; nothing changes then.
        """
        if not self._saves:
            raise TypeError(f"{type(self.agent).__name__} has no export_state(agent_state); it cannot be loaded")
        path = Path(path)
        found = runs.newest_checkpoint(path) if (path / runs.CONFIG_FILE).exists() else path
        if found is None:
            raise ValueError(f"{path} has no checkpoint yet")
        tensors, saved = checkpoint.load(found)
        agent: Any = self.agent
        if saved.get("agent") != type(agent).__name__:
            raise ValueError(f"{found} was saved by {saved.get('agent')}; the agent is {type(agent).__name__}")
        agent.import_state(self._rl_state.agent_state, tensors, saved["agent_state"])
        nothing_seen: Any = None
        self.steps = saved["steps"]
        self._rl_state = self._rl_state._replace(
            environment_state=nothing_seen,
            random_key=RandomKey(saved["random_key"]),
            iteration=saved["iteration"],
            episode=saved["episode"],
        )
        self._feed_key = RandomKey(saved["feed_key"])
        self._last_checkpoint = found

    @classmethod
    def resume(cls, run_folder: str | Path, config: AgentConfig | None = None, **parts: Any) -> AgentTrainer:
        """A trainer that goes on from the newest checkpoint of a run, in the same folder.

        `config` replaces the run's own; `parts` are the constructor's other arguments, which are not stored.
        """
        run_folder = Path(run_folder)
        if config is None:
            config = config_from_dict(runs.read_config(run_folder))
        trainer = cls(config, **parts)
        trainer.load(run_folder)
        trainer.run_folder = run_folder
        return trainer

    @property
    def _saves(self) -> bool:
        return hasattr(self.agent, "export_state")

    def _exported(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        agent: Any = self.agent
        tensors, values = agent.export_state(self._rl_state.agent_state)
        return tensors, {
            "agent": type(agent).__name__,
            "agent_state": values,
            "steps": self.steps,
            "iteration": self._rl_state.iteration,
            "episode": self._rl_state.episode,
            "random_key": self._rl_state.random_key.value,
            "feed_key": self._feed_key.value,
            "config": dataclasses.asdict(self.config),
        }

    def _save_to(self, run: runs.Run) -> None:
        if self._saves:
            self._last_checkpoint = run.save_checkpoint(self.steps, *self._exported())


def _whole_episodes(feed: Any, policy: Any, key: RandomKey, episodes: int) -> Evaluation:
    """`episodes` episodes of one environment, one after the other."""
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    shape = feed.action_space.shape
    feed_key, key = key.split(2)
    seen, feed_key = feed.init(feed_key)
    returns, lengths = [0.0], [0]
    while True:
        action_key, key = key.split(2)
        observations = as_tensors(seen.observation, device)
        actions, _ = policy_actions(policy, observations, (1, *shape), action_key, deterministic=True)
        seen, feed_key = feed.step(feed_key, seen, actions.cpu().numpy())
        if not seen.stepped[0]:
            continue
        returns[-1] += float(seen.reward[0])
        lengths[-1] += 1
        if seen.terminated[0] or seen.truncated[0]:
            if len(returns) == episodes:
                return Evaluation(returns=tuple(returns), lengths=tuple(lengths))
            returns.append(0.0)
            lengths.append(0)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, which the callable tells; the second raises as always.

    Elsewhere than in the main thread Ctrl-C does not arrive, and the callable says False.
    """
    pressed = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's number of threads inside, and as it was afterwards. None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {device!r}, which torch cannot use here: {error}") from None
