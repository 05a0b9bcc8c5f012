"""``angle bench meta-study``: what MetaEntropy reaches beside a learned and a fixed entropy coefficient.

Several environments, several seeds each. Scores are the means of a run's evaluations after its first half, and its last
one; with them stand intervals as Agarwal et al. 2021 (arXiv:2108.13264) advise: the interquartile mean over all runs,
each scaled to its environment, and 95 % of a stratified bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from angle_rl.bench.report import metadata
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.meta_trainer import MetaLearnerTrainer
from angle_rl.runs import read_metrics
from angle_rl.trainer import AgentTrainer

ENVIRONMENTS = {"Pendulum-v1": 6_000, "InvertedDoublePendulum-v5": 12_000, "Reacher-v5": 12_000}
"""Environment steps of each"""
WAYS: dict[str, dict[str, Any]] = {
    "meta": {"meta": "entropy", "entropy_coefficient": 0.2, "meta_learning_rate": 3e-3, "meta_update_interval": 10},
    "auto": {"entropy_coefficient": "auto"},
    "fixed": {"entropy_coefficient": 0.2},
}
Scores = npt.NDArray[np.float64]


def config_of(way: str, environment: str, seed: int, folder: str) -> AgentConfig:
    """SAC with the library's defaults, its entropy coefficient found in this way."""
    steps = ENVIRONMENTS[environment]
    config = AgentConfig(
        hyperparameters=Hyperparameters(agent="sac"),
        training=Training(
            environment=environment,
            steps=steps,
            seed=seed,
            evaluation_interval=steps // 12,
            evaluation_episodes=10,
            threads=1,
            learner_threads=1,
        ),
        service=Service(run_folder=folder, tensorboard=False, progress=False, checkpoint_interval=None),
    )
    return config.replace(**WAYS[way])


def one_run(way: str, environment: str, seed: int) -> dict[str, Any]:
    """Trains once; its evaluations and the coefficients on the way."""
    with tempfile.TemporaryDirectory(prefix="angle-study-") as folder:
        config = config_of(way, environment, seed, folder)
        trainer = AgentTrainer(config) if config.hyperparameters.meta is None else MetaLearnerTrainer(config)
        began = time.perf_counter()
        trainer.train()
        assert trainer.run_folder is not None
        lines = read_metrics(trainer.run_folder)
    evaluations = [(line["step"], line["evaluation/mean_return"]) for line in lines if "evaluation/mean_return" in line]
    coefficients = [(line["step"], line["entropy_coefficient"]) for line in lines if "entropy_coefficient" in line]
    late = [value for step, value in evaluations if step > ENVIRONMENTS[environment] / 2]
    return {
        "way": way,
        "environment": environment,
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "evaluations": evaluations,
        "entropy_coefficients": coefficients,
        "last": evaluations[-1][1],
        "late": float(np.mean(late)),
    }


def random_return(environment: str, episodes: int = 20) -> float:
    """The mean return of uniformly random actions."""
    env = gymnasium.make(environment)
    env.action_space.seed(0)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return float(np.mean(returns))


def interquartile_mean(scores: Scores) -> float:
    """The mean of the middle half of all scores, of any shape; the ends count by their parts."""
    flat = np.sort(scores.ravel())
    n = len(flat)
    share = np.clip(np.minimum(np.arange(1, n + 1) - n / 4, 3 * n / 4 - np.arange(n)), 0.0, 1.0)
    return float((flat * share).sum() / share.sum())


def interval(scores: Scores, *, draws: int = 5_000, seed: int = 0) -> tuple[float, float]:
    """95 % of the interquartile means of a bootstrap over runs ``[environments, seeds]``, in each environment apart."""
    generator = np.random.default_rng(seed)
    environments, seeds = scores.shape
    means = [
        interquartile_mean(np.take_along_axis(scores, generator.integers(seeds, size=(environments, seeds)), 1))
        for _ in range(draws)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summary(runs: list[dict[str, Any]], random: dict[str, float], figure: str) -> list[dict[str, Any]]:
    """For each way the scores of each environment, and the interquartile mean over all of them with its interval.

    Scaled scores are 0 at random play and 1 at the best run of the environment, of any way.
    """
    environments = sorted({run["environment"] for run in runs})
    best = {name: max(run[figure] for run in runs if run["environment"] == name) for name in environments}
    found = []
    for way in WAYS:
        rows = [[run[figure] for run in runs if (run["way"], run["environment"]) == (way, e)] for e in environments]
        if not all(rows):
            continue
        scaled = np.array(
            [[(x - random[e]) / (best[e] - random[e]) for x in row] for e, row in zip(environments, rows, strict=True)]
        )
        low, high = interval(scaled)
        found.append(
            {
                "way": way,
                "figure": figure,
                "interquartile_mean": interquartile_mean(scaled),
                "low": low,
                "high": high,
                "means": {e: float(np.mean(row)) for e, row in zip(environments, rows, strict=True)},
                "scores": dict(zip(environments, rows, strict=True)),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the study with these arguments (default: the process's) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="angle bench meta-study", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all runs here")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--environment", choices=tuple(ENVIRONMENTS), action="append", help="only these")
    given = parser.parse_args(argv)
    environments = given.environment or list(ENVIRONMENTS)
    random = {environment: random_return(environment) for environment in environments}
    runs = []
    for seed in range(given.seeds):
        for environment in environments:
            for way in WAYS:
                runs.append(one_run(way, environment, seed))
                print(f"{environment} {way} seed {seed}: last {runs[-1]['last']:.1f}, late {runs[-1]['late']:.1f}")
                sys.stdout.flush()
    found = [row for figure in ("last", "late") for row in summary(runs, random, figure)]
    print(f"random play: {random}")
    for row in found:
        print(
            f"{row['figure']:<5} {row['way']:<6} interquartile mean {row['interquartile_mean']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]  {row['means']}"
        )
    if given.json is not None:
        whole = {"metadata": metadata(), "ways": WAYS, "random": random, "summary": found, "runs": runs}
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
