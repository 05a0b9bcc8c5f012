"""AgentTrainer: the loop that runs an agent on its environments, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from angle_rl import checkpoint, runs
from angle_rl.agents.actor_critic import QFuture
from angle_rl.agents.base import Agent, crossings
from angle_rl.agents.ddpg import DDPG
from angle_rl.agents.dqn import DQN
from angle_rl.agents.q_learning import QLearning
from angle_rl.agents.sac import SAC
from angle_rl.agents.sac_discrete import DiscreteSAC
from angle_rl.agents.state import LossNotFiniteError
from angle_rl.agents.td3 import TD3
from angle_rl.config import AgentConfig, config_from_dict
from angle_rl.episodes import Episodes
from angle_rl.evaluation import Evaluation, check_device, interrupts, torch_threads, whole_episodes
from angle_rl.feed import (
    DataFeed,
    around,
    make_evaluation_feed,
    make_feed,
    unscaled_reward,
    wrap_feed,
)
from angle_rl.overlap import learning_apart, overlap_refusal
from angle_rl.resuming import Progress, checkpoint_in, exported, restored, saves
from angle_rl.types import Array, EnvironmentState, RandomKey, RLState

AGENTS: dict[str, Callable[..., Agent]] = {
    "sac": SAC,
    "sac_discrete": DiscreteSAC,
    "td3": TD3,
    "ddpg": DDPG,
    "dqn": DQN,
    "q_learning": QLearning,
}


class AgentTrainer:
    """Runs an agent: data feed, replay, critic steps, policy steps, meta steps. To be used by one thread.

    Args:
        config: everything that is not given below.
        feed: where transitions come from: what `make_feed` takes; None: the config's `environment`.
        policy: a PolicyModel in place of the agent's own.
        critics: a module ``(observations, actions) -> q  [critics, batch]`` in place of TwinQ. Both networks may be in
            torch's DistributedDataParallel: processes then learn together, on the torch engine, and each has to take
            as many updates as the others. What is inside becomes `trainer.policy` and `trainer.critics`.
        replay: a buffer in place of a new one; its discount and n_step must be the config's.
        meta: has `update_meta_learning_model(states, q)`, called every `meta_update_interval` steps with the
            newest batch's observations and q values ``[critics, batch]``; a `MetaLearnerTrainer` is one, which from
            then on belongs to this trainer.
        agent: an Agent in place of the config's.
        q_future: ``f(target_critics, next_observations, next_actions)``; None: the target critics' minimum.
        evaluation_feed: where `evaluate` runs, of one environment; None: one like the training's. It is wrapped
            as the training's feed is (history, normalisation).
        overlap: whether updates are taken in a thread of their own while the environments step; None: the config's.
            As many updates, of the same keys, as without; at most `overlap.LEAD` of them wait, and actions come from
            a copy of the newest weights. Everything else stays in the thread that calls `train`: environments,
            callbacks, meta steps, evaluations, checkpoints; the last three wait for the learner, as does
            whatever else reads networks. Runs cannot be repeated bit for bit then.

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
        overlap: bool | None = None,
    ) -> None:
        if not isinstance(config, AgentConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be an AgentConfig")
        if meta is not None and not callable(getattr(meta, "update_meta_learning_model", None)):
            raise TypeError(f"meta is a {type(meta).__name__}; it must have update_meta_learning_model(states, q)")
        if agent is not None and q_future is not None:
            raise ValueError("q_future and agent are both given; such an agent takes q_future itself")
        named = config.hyperparameters.meta
        if named is not None and meta is None:
            raise ValueError(f"the config's meta is {named!r}; a MetaLearnerTrainer trains it")
        check_device(config.training.device)
        config = config if overlap is None else config.replace(overlap=overlap)
        self.config = config
        self.run_folder: Path | None = None
        self.steps = 0
        self.agent: Agent = AGENTS[config.hyperparameters.agent](config, q_future) if agent is None else agent
        agent_key, self._feed_key, run_key, self._evaluation_key = RandomKey(config.training.seed).split(4)
        source = config.training.environment if feed is None else feed
        self.feed = wrap_feed(
            make_feed(source, num_environments=config.training.parallel_environments),
            observation_history=config.hyperparameters.observation_history,
            normalize_observations=config.training.normalize_observations,
            normalize_rewards=config.training.normalize_rewards,
            discount=config.hyperparameters.discount,
        )
        if hasattr(meta, "bind_feed"):
            self.feed = meta.bind_feed(self.feed)
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
        refusal = overlap_refusal(self.agent, agent_state) if config.training.overlap else None
        if refusal is not None:
            raise ValueError(f"overlap is True; {refusal}")
        nothing_seen: Any = None  # until train() begins
        self._rl_state = RLState(agent_state, nothing_seen, run_key, 0, 0, None)
        self._episode_returns = np.zeros(self.feed.num_environments)
        self._episode_lengths = np.zeros(self.feed.num_environments, np.int64)
        self._recent_returns: deque[float] = deque(maxlen=20)
        self._mean_return: float | None = None  # of these
        self._evaluates = True
        self._cut = False  # whether the environments were left in the middle of a run by episodes
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
        """Updates left out because a loss or gradient was not finite."""
        return self._of_agent("skipped_updates") or 0

    def _of_agent(self, name: str) -> Any:
        return getattr(self._rl_state.agent_state, name, None)

    # Training ----------

    def train(
        self,
        *,
        num_episodes: int | None = None,
        max_iterations: int | None = None,
        accumulated_episodes: int = 0,
        state_to_trajectory: Callable[[RLState], Any] | None = None,
        episode_completed: Callable[[RLState, int, int], object] | None = None,
        checkpoint_filter: Callable[[RLState, int], bool] | None = None,
        checkpoint_path: str | Path | None = None,
        model_name: str | None = None,
    ) -> Evaluation | None:
        """Run by steps or by episodes, evaluate, and leave a run folder; returns the last evaluation.

        By steps, without `num_episodes`: until the config's `steps`; environments begin their next episode as soon
        as one ends, each for itself. By episodes: `num_episodes` more, each from a reset of all environments until
        all have ended; one that has ended neither steps nor is recorded until the others are done (a VectorEnv steps
        all of its environments, and what those that have ended show is left out).

        Args:
            num_episodes: episodes to run, >= 1. The other arguments belong to it.
            max_iterations: steps after which an episode is cut (its last transitions are truncated), >= 1.
            accumulated_episodes: the number to count episodes on from; 0: from those run, also before a resume.
            state_to_trajectory: what to keep of each state; `rl_state.trajectory` is then a list of it, the
                episode's start first. None: the trajectory is None.
            episode_completed: called with the state, the episode's number (from 1) and its iterations.
            checkpoint_filter: after which episodes, given the state and the number, a checkpoint is written besides
                those of the config's interval.
            checkpoint_path: the folder for these, as ``<model_name>-<number>``; None: the run folder's own.
            model_name: None: the agent's name.

        None, after a warning, where `evaluate` would raise: the run is then trained and not evaluated.
        The first Ctrl-C saves and returns None, the second raises KeyboardInterrupt at once. Where an
        environment raises, or gives a reward that is not finite, the run is saved and the error raised. The
        third update in a row whose loss or gradient is not finite raises LossNotFiniteError, naming the last
        checkpoint. Updates that wait for `updates_per_call` are taken at the end.
        """
        episodes = None
        if num_episodes is not None:
            episodes = Episodes(
                num_episodes=num_episodes,
                max_iterations=max_iterations,
                accumulated_episodes=accumulated_episodes,
                state_to_trajectory=state_to_trajectory,
                episode_completed=episode_completed,
                checkpoint_filter=checkpoint_filter,
                checkpoint_path=None if checkpoint_path is None else Path(checkpoint_path),
                model_name=model_name or type(self.agent).__name__.lower(),
            )
            episodes.check(can_save=self._saves)
        else:
            given = (max_iterations, accumulated_episodes or None, state_to_trajectory, episode_completed)
            if any(one is not None for one in (*given, checkpoint_filter, checkpoint_path, model_name)):
                raise ValueError("num_episodes is None; max_iterations and what follows it need a number of episodes")
        self._evaluates = self._can_evaluate()
        with self._running(episodes) as (run, progress, interrupted):
            state = self._begin(episodes)
            while not self._is_done(state, episodes) and not interrupted():
                if episodes is not None and episodes.is_over(state):
                    state = self._begin_episode(state, episodes)
                steps_before = self.steps
                state = self._step(state, run, episodes)
                if episodes is not None and episodes.is_over(state):
                    self._complete_episode(state, episodes, run)
                self._report(steps_before, run, progress, episodes)
            return self._finish(run, interrupted())

    def advance(self, steps: int, *, learn: bool = True) -> None:
        """So many environment steps more, by steps, with what is learned from them: no evaluation, nothing written.

        With several environments at once it may be some more. `learn` False records only: the updates that are due
        are taken when steps are learned from again. Goes on where `train` or this ended. ValueError: `steps` < 1, or
        `overlap`, whose thread `train` keeps. Raises as `train` besides.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        if self.config.training.overlap:
            raise ValueError("overlap is True; advance learns where it steps")
        until = self.steps + steps
        with torch_threads(self.config.training.threads):
            state = self._begin(None)
            while self.steps < until:
                state = self._step(state, None, None, learn=learn)
            if learn:
                self._finish_updates()

    def _step(self, state: RLState, run: runs.Run | None, episodes: Episodes | None, *, learn: bool = True) -> RLState:
        """One step of all environments, and what is learned from it."""
        action, state = self.agent.select_action(state, state.iteration)
        seen = self._step_environments(state, action, run, episodes)
        following = state._replace(environment_state=seen)
        state = self.agent.record_observation(state, action, seen.reward, seen.terminated, following)
        # Only the agent's part is its own to give: the rest is what was seen.
        state = following._replace(agent_state=state.agent_state)
        self.steps += int(seen.stepped.sum())
        if learn:  # sample, target, critic step; policy and meta step where due
            state = self._learn(state, self.agent.optimize_model)
        if episodes is not None and episodes.state_to_trajectory is not None:
            self._rest()
            episodes.note(state)
        state = self._end_episodes(state._replace(iteration=state.iteration + 1), run, episodes)
        self._rl_state = state
        return state

    def _is_done(self, state: RLState, episodes: Episodes | None) -> bool:
        if episodes is None:
            return self.steps >= self.config.training.steps
        return episodes.begun == episodes.num_episodes and episodes.is_over(state)

    def _begin(self, episodes: Episodes | None) -> RLState:
        """The state to run from: the one before, or the first of new episodes."""
        state = self._rl_state
        if state.environment_state is None or self._cut:
            seen, self._feed_key = self.feed.init(self._feed_key)
            self._cut = False
            state = self._reset_agent(state._replace(environment_state=seen))
        if episodes is not None and episodes.accumulated_episodes > 0:
            state = state._replace(episode=episodes.accumulated_episodes)
        self._rl_state = state
        return state

    def _begin_episode(self, state: RLState, episodes: Episodes) -> RLState:
        """All environments at the start of the next episode."""
        seen, self._feed_key = self.feed.reset(self._feed_key, state.environment_state)
        self._cut = True  # what follows by steps begins anew
        self._episode_returns[:], self._episode_lengths[:] = 0.0, 0
        state = self._reset_agent(state._replace(environment_state=seen))
        return episodes.begin(state._replace(episode=state.episode + 1, iteration=0))

    def _reset_agent(self, state: RLState) -> RLState:
        agent_state, random_key = self.agent.reset(state.random_key, state)
        return state._replace(agent_state=agent_state, random_key=random_key)

    def _complete_episode(self, state: RLState, episodes: Episodes, run: runs.Run) -> None:
        self._rest()
        if episodes.episode_completed is not None:
            episodes.episode_completed(state, state.episode, state.iteration)
        if episodes.checkpoint_filter is None or not episodes.checkpoint_filter(state, state.episode):
            return
        if episodes.checkpoint_path is None:
            self._save_to(run)
        else:
            self._last_checkpoint = self.save(
                episodes.checkpoint_path / f"{runs.safe_name(episodes.model_name)}-{state.episode:06d}"
            )

    def _step_environments(
        self, state: RLState, action: Array, run: runs.Run | None, episodes: Episodes | None
    ) -> EnvironmentState:
        """What the actions led to. Where the environment fails, the run, if any, is saved before the error goes on."""
        try:
            before = state.environment_state if episodes is None else episodes.asked_of(state)
            seen, self._feed_key = self.feed.step(self._feed_key, before, action)
            if episodes is not None:
                seen = episodes.only_active(state, seen)
            if not np.isfinite(seen.reward).all():
                worst = int(np.flatnonzero(~np.isfinite(seen.reward))[0])
                raise ValueError(
                    f"environment {worst} of {self.feed.name} gave the reward {seen.reward[worst]} "
                    f"after {self.steps} steps; rewards must be finite"
                )
        except Exception:
            if run is not None:
                self._save_to(run)
            raise
        return seen

    def _rest(self) -> None:
        """Wait for the learner, if it has a thread of its own: what it learned and counted may be read then."""
        learner = self._of_agent("learner")
        if learner is not None:
            self._learn(self._rl_state, lambda state: learner.rest() or state)

    def _learn(self, state: RLState, learn: Callable[[RLState], RLState]) -> RLState:
        try:
            return learn(state)
        except LossNotFiniteError as error:
            good = "there is no checkpoint yet" if self._last_checkpoint is None else self._last_checkpoint
            raise LossNotFiniteError(f"{error}; the last good checkpoint: {good}") from error

    def _end_episodes(self, state: RLState, run: runs.Run | None, episodes: Episodes | None) -> RLState:
        """Count what the episodes gave. By steps, reset the agent for each that ended."""
        seen = state.environment_state
        self._episode_returns += np.where(seen.stepped, unscaled_reward(self.feed, seen.reward), 0.0)
        self._episode_lengths += seen.stepped
        for index in np.flatnonzero((seen.terminated | seen.truncated) & seen.stepped):
            episode_return, length = float(self._episode_returns[index]), int(self._episode_lengths[index])
            self._recent_returns.append(episode_return)
            self._mean_return = float(np.mean(self._recent_returns))
            if run is not None:
                run.log(self.steps, {"train/episode_return": episode_return, "train/episode_length": length})
            self._episode_returns[index], self._episode_lengths[index] = 0.0, 0
            if episodes is None:
                state = self._reset_agent(state)
                iteration = 0 if self.feed.num_environments == 1 else state.iteration
                state = state._replace(iteration=iteration, episode=state.episode + 1)
        return state

    def _report(self, steps_before: int, run: runs.Run, progress: runs.Progress, episodes: Episodes | None) -> None:
        """Metrics, evaluation and checkpoint, each when its interval was crossed."""
        service, training = self.config.service, self.config.training
        done = self.steps if episodes is None else episodes.begun
        progress.update(done, self.updates, self._mean_return)
        if crossings(service.log_interval, steps_before, self.steps):
            run.log(self.steps, self._metrics() | progress.rates())
        if self._is_done(self._rl_state, episodes):
            return  # the end evaluates and saves anyway
        if crossings(training.evaluation_interval, steps_before, self.steps):
            self._evaluate_into(run)
        if crossings(service.checkpoint_interval, steps_before, self.steps):
            self._save_to(run)

    def _metrics(self) -> dict[str, float]:
        """What there is to log of the newest update."""
        self._rest()
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
        if hasattr(self.meta, "meta_metrics"):
            metrics |= self.meta.meta_metrics()
        return metrics

    def _finish(self, run: runs.Run, interrupted: bool) -> Evaluation | None:
        if not interrupted:
            self._finish_updates()
        self._rest()
        evaluation = None if interrupted else self._evaluate_into(run)
        self._save_to(run)
        run.plot()
        return evaluation

    def _finish_updates(self) -> None:
        """The updates that wait for `updates_per_call`."""
        finish_updates = getattr(self.agent, "finish_updates", None)
        if finish_updates is not None:
            self._rl_state = self._learn(self._rl_state, finish_updates)

    @contextmanager
    def _running(self, episodes: Episodes | None) -> Iterator[tuple[runs.Run, runs.Progress, Callable[[], bool]]]:
        """The run folder, the progress bar, Ctrl-C and torch's threads, while training."""
        with ExitStack() as stack:
            run = stack.enter_context(self._open_run())
            self.run_folder = run.folder
            progress = runs.Progress(
                self.config.training.steps if episodes is None else episodes.num_episodes,
                completed=self.steps if episodes is None else 0,
                updates=self.updates,
                enabled=self.config.service.progress,
            )
            stack.enter_context(progress)
            stack.enter_context(torch_threads(self.config.training.threads))
            interrupted = stack.enter_context(interrupts())
            # Last, so that it ends first; its thread takes over torch's number of threads.
            overlap = self.config.training.overlap
            stack.enter_context(learning_apart(self._rl_state.agent_state) if overlap else nullcontext())
            yield run, progress, interrupted

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
        self._rest()
        episodes = self.config.training.evaluation_episodes if episodes is None else episodes
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}; it must be at least 1")
        policy = self.policy
        feed = self._make_evaluation_feed()
        training_mode = policy.training
        policy.eval()
        try:
            with torch.no_grad(), torch_threads(self.config.training.threads):
                return whole_episodes(feed, policy, self._evaluation_key, episodes)
        finally:
            policy.train(training_mode)
            feed.close()

    def _make_evaluation_feed(self) -> DataFeed:
        """Where to evaluate. Raises as `evaluate` says."""
        if not callable(getattr(self.policy, "sample_actions", None)):
            raise TypeError(f"{type(self.agent).__name__} has no policy with sample_actions to evaluate")
        source = self._evaluation_source
        feed = make_evaluation_feed(self.feed) if source is None else around(self.feed, make_feed(source))
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

    def load(self, path: str | Path, *, without_meta: bool = False) -> None:
        """Go on from a checkpoint, or from a run folder's newest one.

        The networks, optimisers, replay, counters, the feed's statistics and the random state come back;
        environments begin new episodes. `without_meta` leaves out what meta-learners saved.
        ValueError where the checkpoint is damaged or does not fit; nothing changes then.
        """
        if not self._saves:
            raise TypeError(f"{type(self.agent).__name__} has no export_state(agent_state); it cannot be loaded")
        self._rest()
        found = checkpoint_in(Path(path))
        progress = restored(found, self.agent, self.feed, self.meta, self._rl_state, without_meta=without_meta)
        self.steps, self._rl_state, self._feed_key = progress
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
        return saves(self.agent)

    def _exported(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        self._rest()
        progress = Progress(self.steps, self._rl_state, self._feed_key)
        return exported(self.config, self.agent, self.feed, self.meta, progress)

    def _save_to(self, run: runs.Run) -> None:
        if self._saves:
            self._last_checkpoint = run.save_checkpoint(self.steps, *self._exported())
