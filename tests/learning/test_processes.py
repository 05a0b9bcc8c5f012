"""The example of four actor processes, killed and replaced, and one learner: it learns all the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "processes.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="shared buffers need Linux")
def test_actors_are_killed_while_one_process_learns():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r"(\d+) actors killed", done.stdout)[0]) > 0
    assert float(re.findall(r"mean return of 20 episodes: (-?[\d.]+)", done.stdout)[0]) >= -200
