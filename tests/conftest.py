"""What all tests share: one thread, and the references beside the tests on the path."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from angle_rl import device
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.replay.device import DeviceCore

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(name="device", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda), "host kernels"])
def _device(request):
    """Where a test's tensors lie: the CPU; a CUDA device; the CPU again, with the device kernels compiled for it."""
    if request.param == "host kernels":
        with device.emulated():
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


@pytest.fixture(
    scope="module",
    params=["cpu", "host kernels", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def replay_place(request):
    """Where replays of a module's tests are unless they say otherwise: in host memory; under the device's kernels as
    compiled for the host; on a device, if there is one. What kernels refuse is raised at once, and not by a later call.
    """
    place = request.param
    if place == "cpu":
        yield place
        return
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def look_at_once(core):
        launched(core)
        if core.device.type == "cuda":
            torch.cuda.synchronize(core.device)
        core.check()

    def of_a_copy(name):
        return lambda core, *arguments: getattr(core.pull(), name)(*arguments)

    launched = DeviceCore.launched
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for kind in (ReplayBuffer, PrioritizedReplayBuffer):
            patch.setitem(kind.__init__.__kwdefaults__, "device", "cuda")
        patch.setattr(DeviceCore, "launched", look_at_once)
        for name in ("weights", "rows", "sums_are_exact", "default_weight", "inserts_are_done"):
            patch.setattr(DeviceCore, name, of_a_copy(name), raising=False)
        if place == "host kernels":
            stack.enter_context(device.emulated())
        yield place


@pytest.fixture
def on_cpu(replay_place):
    """For tests of what only replays in host memory have."""
    if replay_place != "cpu":
        pytest.skip("only replays in host memory have this")
