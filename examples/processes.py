"""Four actor processes and one learner share one replay buffer; actors are killed and replaced while it learns.

The actors play Pendulum-v1 and insert; this process samples, learns by SAC, and hands the policy's weights back
through a tensor in shared memory. Every few seconds it kills an actor in the middle of whatever that was doing and
starts another: nobody waits for the dead one, and `repair()` mends what it left behind. Two cores, about two minutes.
"""

from __future__ import annotations

import os
import random
import signal
import time

import gymnasium
import torch

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Training
from angle_rl.models import SquashedGaussianPolicy
from angle_rl.replay import PrioritizedReplayBuffer

ACTORS = 4
STEPS = 10_000  # environment steps of all actors together, with one update each
HEAD_START = 200  # steps that the actors may be ahead of the learner
CONFIG = AgentConfig(
    hyperparameters=Hyperparameters(agent="sac", hidden_sizes=(128, 128), learning_rate=1e-3, learning_starts=1_000),
    training=Training(environment="Pendulum-v1", steps=STEPS, seed=0, threads=1),
)


def act(
    replay: PrioritizedReplayBuffer, weights: torch.Tensor, allowed_steps: torch.Tensor, stream: int, learner: int
) -> None:
    """An actor: plays and inserts until told to end, or until it is killed."""
    torch.set_num_threads(1)
    torch.manual_seed(stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's business
    environment = gymnasium.make(CONFIG.training.environment)
    environment.action_space.seed(stream)
    space = environment.action_space
    policy = SquashedGaussianPolicy(3, space.low, space.high, CONFIG.hyperparameters.hidden_sizes)
    observation, _ = environment.reset(seed=stream)
    while os.getppid() == learner:
        steps, allowed = replay.stats()["inserts"], int(allowed_steps)
        if steps >= allowed >= 0:
            time.sleep(0.001)
            continue
        if allowed < 0:
            break
        if steps < CONFIG.hyperparameters.learning_starts:
            action = space.sample()
        else:
            # The learner may write at this moment: weights that are half old, half new do no harm to an actor.
            torch.nn.utils.vector_to_parameters(weights.clone(), policy.parameters())
            with torch.no_grad():
                action = policy.sample_actions(torch.from_numpy(observation)[None])[0][0].numpy()
        successor, reward, terminated, truncated, _ = environment.step(action)
        replay.insert(observation, action, float(reward), successor, terminated, truncated, streams=stream)
        observation = environment.reset()[0] if terminated or truncated else successor


def main() -> float:
    """Trains; returns the mean return of the evaluation."""
    torch.set_num_threads(1)
    context = torch.multiprocessing.get_context("spawn")
    environment = gymnasium.make(CONFIG.training.environment)
    replay = PrioritizedReplayBuffer(
        STEPS,
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        discount=CONFIG.hyperparameters.discount,
        shared=True,
    )
    trainer = AgentTrainer(CONFIG, replay=replay)
    parameters = list(trainer.policy.parameters())
    weights = torch.nn.utils.parameters_to_vector(parameters).detach().clone().share_memory_()
    allowed_steps = torch.tensor(CONFIG.hyperparameters.learning_starts + HEAD_START).share_memory_()

    def start(stream: int) -> torch.multiprocessing.Process:
        process = context.Process(
            target=act, args=(replay, weights, allowed_steps, stream, os.getpid()), daemon=True, name=f"actor {stream}"
        )
        process.start()
        return process

    # A stream is one actor's rows in time order, so a new actor gets a new one.
    actors, streams = [start(stream) for stream in range(ACTORS)], ACTORS
    state, rng = trainer.rl_state, random.Random(0)
    learned = state.agent_state
    killed, next_kill, next_line = 0, time.monotonic() + 8, 1_000
    while learned.steps < STEPS:
        inserted = replay.stats()["inserts"]
        if inserted == learned.steps:
            time.sleep(0.001)
        learned.steps = min(inserted, learned.steps + 10, STEPS)
        state = trainer.agent.optimize_model(state)  # one update for each new step
        with torch.no_grad():
            torch.cat([parameter.reshape(-1) for parameter in parameters], out=weights)
        allowed_steps.fill_(max(learned.steps, CONFIG.hyperparameters.learning_starts) + HEAD_START)
        if learned.steps >= next_line:
            print(f"{learned.steps} steps, {learned.updates} updates, {replay.stats()['refused_updates']} refused")
            next_line += 1_000
        if time.monotonic() > next_kill:
            chosen = rng.randrange(ACTORS)
            victim = actors[chosen]
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            actors[chosen] = start(streams)
            print(f"{learned.steps} steps: killed {victim.name}, started {actors[chosen].name}")
            killed, streams, next_kill = killed + 1, streams + 1, time.monotonic() + rng.uniform(3, 6)

    allowed_steps.fill_(-1)
    for actor in actors:
        actor.join()
    print(f"{killed} actors killed; audit: {replay.audit() or 'nothing found'}; sums mended: {replay.repair()}")
    assert replay.audit() == []
    score = trainer.evaluate(20).mean_return
    replay.close()
    print(f"mean return of 20 episodes: {score:.1f}")
    return score


if __name__ == "__main__":
    main()
