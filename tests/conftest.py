"""What all tests share: one thread, and the references beside the tests on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from angle_rl.device import emulated

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(name="device", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda), "host kernels"])
def _device(request):
    """Where a test's tensors lie: the CPU; a CUDA device; the CPU again, with the device kernels compiled for it."""
    if request.param == "host kernels":
        with emulated():
            yield torch.device("cpu")
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield torch.device(request.param)


@pytest.fixture
def run_python():
    """Run a script in a fresh interpreter, with more environment if wanted, and return what it printed."""

    def run(script: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
