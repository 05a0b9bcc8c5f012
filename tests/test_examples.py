"""The examples run as they stand, cut short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {  # what each is run with here, and what its last line must say
    "cartpole_dqn.py": (["--steps", "1500"], "mean return"),
    "dataset.py": (["--steps", "400"], "mean return"),
    "device_environment.py": (["--steps", "1200"], "mean return"),
    "function.py": (["--steps", "400"], "mean return"),
    "gridworld_q_learning.py": (["--steps", "3000"], "of 96 starts"),
    "learned_discount.py": (["--steps", "900"], "mean return"),
    "history_and_normalisation.py": (["--steps", "1300"], "mean return"),
    "pendulum_ddpg.py": (["--steps", "1200"], "mean return"),
    "pendulum_sac.py": (["--steps", "1200"], "mean return"),
    "pendulum_td3.py": (["--steps", "1200"], "mean return"),
    "vector.py": (["--steps", "3000"], "mean return"),
}
ELSEWHERE = {  # another test runs it
    "data_parallel.py",  # tests/test_distributed.py, in two processes
    "processes.py",  # tests/learning/test_processes.py, as it takes minutes
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHORT) | ELSEWHERE


@pytest.mark.parametrize("name", SHORT)
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    arguments, says = SHORT[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert says in capsys.readouterr().out.splitlines()[-1]
