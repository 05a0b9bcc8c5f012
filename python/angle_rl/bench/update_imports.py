"""From a library's import to its first update, in fresh processes, beyond what importing torch takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from angle_rl.bench.report import Row, summarize

OPERATION = "import_to_first_update"
ROWS = 1000

PREPARE = f"""
import time
import numpy as np
import torch
start = time.perf_counter()
import gymnasium
observations = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float32)
actions = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)
n = {ROWS}
random = np.random.default_rng(0)
seen = random.standard_normal((n, 17)).astype(np.float32)
following = random.standard_normal((n, 17)).astype(np.float32)
taken = random.uniform(-1, 1, (n, 6)).astype(np.float32)
rewards = random.standard_normal(n).astype(np.float32)
"""

OURS = """
from angle_rl.agents import SAC
from angle_rl.config import AgentConfig
from angle_rl.types import EnvironmentState, RandomKey, RLState
config = AgentConfig().replace(agent="sac", batch_size=256, replay_capacity=n, learning_starts=0, engine=ENGINE)
agent = SAC(config)
state, key = agent.init(RandomKey(0), observation_space=observations, action_space=actions)
if getattr(state.engine, "name", ENGINE) != ENGINE:
    raise SystemExit("the engine is " + state.engine.name)
state.replay.insert(seen, taken, rewards, following, np.zeros(n, bool))
none, one = np.zeros(1, bool), np.ones(1, bool)
now = EnvironmentState(seen[:1], np.zeros(1), none, none, seen[:1], one)
state.steps += 1
agent.optimize_model(RLState(state, now, key, 0, 0, None))
assert state.updates == 1
"""

PEER = """
class Spaces(gymnasium.Env):
    observation_space, action_space = observations, actions
from PACKAGE import SAC
from stable_baselines3.common.logger import configure
model = SAC("MlpPolicy", Spaces(), buffer_size=n, batch_size=256, learning_starts=0, seed=0)
model.set_logger(configure(None, []))
buffer = model.replay_buffer
buffer.observations[:, 0], buffer.next_observations[:, 0] = seen, following
buffer.actions[:, 0], buffer.rewards[:, 0], buffer.dones[:, 0] = taken, rewards, 0
buffer.full = True
model.train(gradient_steps=1, batch_size=256)
"""

FINISH = """
print(time.perf_counter() - start)
"""


def scripts(sbx_python: str) -> dict[str, tuple[str, str]]:
    """Of each library the interpreter and what it runs."""
    return {
        "angle-torch": (sys.executable, OURS.replace("ENGINE", "'torch'")),
        "angle-native": (sys.executable, OURS.replace("ENGINE", "'native'")),
        "stable-baselines3": (sys.executable, PEER.replace("PACKAGE", "stable_baselines3")),
        "sbx": (sbx_python, PEER.replace("PACKAGE", "sbx")),
    }


def seconds_taken(python: str, script: str, threads: int) -> float:
    """What one fresh process says it took. RuntimeError with its last line where it fails."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", PREPARE + script + FINISH], capture_output=True, text=True, env=environment
        )
    except OSError as failure:
        raise RuntimeError(f"does not start: {failure}") from failure
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "it failed without a word").splitlines()[-1])
    return float(done.stdout.split()[-1])


def why_not(python: str, script: str, threads: int) -> str | None:
    """Why a script fails, in a line; None where it does not."""
    try:
        seconds_taken(python, script, threads)
    except RuntimeError as failure:
        return str(failure)
    return None


def import_rows(sbx_python: str, threads: int, repeats: int) -> tuple[list[Row], list[str]]:
    """Every library in turns, after one unmeasured run that fills the system's caches, and why others are not there."""
    every = scripts(sbx_python)
    reasons = {library: why_not(python, script, threads) for library, (python, script) in every.items()}
    ready = {library: of for library, of in every.items() if reasons[library] is None}
    notes = [f"{OPERATION} of {library}: {why}" for library, why in reasons.items() if why is not None]
    taken: dict[str, list[float]] = {library: [] for library in ready}
    for _ in range(repeats):
        for library, (python, script) in ready.items():
            taken[library].append(seconds_taken(python, script, threads) * 1e6)
    return [_row(library, times, threads) for library, times in taken.items()], notes


def _row(library: str, times: Sequence[float], threads: int) -> Row:
    return summarize(library, OPERATION, times, capacity=ROWS, batch=256, threads=threads)
