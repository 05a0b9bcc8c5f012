"""Two processes in DistributedDataParallel over gloo learn what one learns from both halves of the rows."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_ranks import KINDS, ROWS, in_parallel, learned, networks_of, tensors_of
from safetensors.torch import load_file
from torch import distributed

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, MetaLearnerTrainer, Service, Training
from angle_rl.meta import MetaEntropy
from angle_rl.models import SquashedGaussianPolicy, TwinQ

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

RANKS = Path(__file__).with_name("distributed_ranks.py")
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left; started as torchrun starts them."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, later_port = (str(found.getsockname()[1]) for found in (first, second))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(PROCESSES)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(folder), later_port],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_give_the_gradients_and_the_steps_of_the_whole(folder, kind):
    own = tensors_of(learned(kind, networks_of(kind), slice(0, ROWS)))
    ranks = [load_file(folder / f"{kind}-{rank}.safetensors") for rank in range(PROCESSES)]
    assert any(name.endswith(".grad") for name in own)
    for rank in ranks:
        assert rank.keys() == own.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(rank[name], tensor, rtol=0, atol=1e-6, msg=name)
    before = dict(networks_of(kind)["critics"].named_parameters())
    assert all(not torch.equal(own[f"critics.{name}"], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("left", [*KINDS, "broken", "trained"])
def test_processes_end_with_equal_networks(folder, left):
    ranks = [load_file(folder / f"{left}-{rank}.safetensors") for rank in range(PROCESSES)]
    assert ranks[0].keys() == ranks[1].keys()
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name


def test_an_infinite_loss_in_one_process_skips_the_update_in_all(folder):
    """The other updates leave what they leave where nothing is broken in between."""
    state = learned("sac", networks_of("sac"), slice(0, ROWS), broken=1)
    found = load_file(folder / "broken-0.safetensors")
    for name, tensor in tensors_of(state).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_each_process_has_its_own_rows(folder):
    rows = [load_file(folder / f"rows-{rank}.safetensors")["observations"] for rank in range(PROCESSES)]
    assert not torch.equal(*rows)


def test_checkpoints_are_those_of_one_process(folder):
    """Written by a process in a group, read without one."""
    (run,) = (folder / "runs").glob("*sac-1*")
    trainer = AgentTrainer.resume(run)
    left = load_file(folder / "trained-1.safetensors")
    for name, tensor in trainer.policy.state_dict().items():
        assert torch.equal(tensor, left[f"policy.{name}"])
    assert trainer.rl_state.agent_state.engine.name == "native"


def test_the_example_runs_as_its_first_line_says(tmp_path):
    """By torchrun itself, which the other tests stand in for."""
    example = Path(__file__).parent.parent / "examples" / "data_parallel.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), str(example)]
    done = subprocess.run(
        [sys.executable, *command, "--steps", "1010"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(PROCESSES):
        assert re.search(rf"^process {rank}: mean return -\d+\.\d over 20 episodes$", done.stdout, re.MULTILINE)


def pendulum(tmp_path, **training):
    return AgentConfig(
        hyperparameters=Hyperparameters(hidden_sizes=(32, 32), entropy_coefficient=0.2),
        training=Training(steps=2000, **training),
        service=Service(run_folder=str(tmp_path)),
    )


def wrapped():
    return in_parallel({"critics": TwinQ(3, 1, (32, 32)), "policy": SquashedGaussianPolicy(3, [-2.0], [2.0], (32, 32))})


@pytest.mark.usefixtures("alone")
def test_the_engine_is_torch_and_says_why(tmp_path):
    trainer = AgentTrainer(pendulum(tmp_path), **wrapped())
    assert trainer.rl_state.agent_state.engine.name == "torch"
    assert "DistributedDataParallel" in trainer.rl_state.agent_state.engine.why
    with pytest.raises(ValueError, match=r"'native'.*DistributedDataParallel"):
        AgentTrainer(pendulum(tmp_path, engine="native"), **wrapped())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["critics", "policy"])
def test_one_network_alone_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is in DistributedDataParallel and .* is not"):
        AgentTrainer(pendulum(tmp_path), **{name: wrapped()[name]})


@pytest.mark.usefixtures("alone")
def test_meta_learners_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*one process"):
        MetaLearnerTrainer(pendulum(tmp_path), learner=MetaEntropy(learning_rate=0.01), **wrapped())


@pytest.mark.usefixtures("alone")
def test_a_policy_that_is_none_is_refused(tmp_path):
    networks = wrapped() | in_parallel({"policy": torch.nn.Linear(3, 2)})
    with pytest.raises(TypeError, match="policy is a Linear"):
        AgentTrainer(pendulum(tmp_path), **networks)
