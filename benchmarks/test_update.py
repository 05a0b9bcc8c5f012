"""The update benchmark's operations at a small size; each asserts what the operation answered."""

from __future__ import annotations

import json
import sys

import gymnasium
import numpy as np
import pytest
import torch

from angle_rl import _core
from angle_rl.bench import update
from angle_rl.bench.eager import check_same_numbers
from angle_rl.bench.learners import (
    Angle,
    Sizes,
    StableBaselines3,
    check_engine,
    check_learner,
    eager,
    random_rows,
)
from angle_rl.bench.products import ProductRate, best_product, floor_clock, products, sac_flops
from angle_rl.bench.report import summarize
from angle_rl.bench.sbx_process import Sbx
from angle_rl.bench.update import main
from angle_rl.bench.update_cases import Found, checked
from angle_rl.bench.update_imports import scripts, seconds_taken, why_not
from angle_rl.bench.update_peers import Tianshou, TorchRL
from angle_rl.bench.update_training import TrainerSteps
from angle_rl.bench.worker_process import WorkerProcess

CAPACITY = 1024
BATCH = 256
OURS_AND_EAGER = ("angle-torch", "cleanrl-style", "tuned-torch")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name):
    every = [Angle(CAPACITY), *eager(CAPACITY, BATCH)]
    learner = next(one for one in every if one.name == name)
    learner.fill(random_rows(CAPACITY))
    return learner


@pytest.mark.parametrize("name", OURS_AND_EAGER)
def test_learner_update(benchmark, name):
    learner = make(name)
    check_learner(learner)
    benchmark(learner.update)
    assert all(torch.isfinite(tensor).all() for tensor in (*learner.critics(), *learner.policy()))


@pytest.mark.parametrize(
    ("package", "kind"),
    [("stable_baselines3", StableBaselines3), ("tianshou", Tianshou), ("torchrl", TorchRL)],
    ids=["stable-baselines3", "tianshou", "torchrl"],
)
def test_a_peers_update(package, kind):
    pytest.importorskip(package)
    pytest.importorskip("mujoco")
    learner = kind(CAPACITY, Sizes(batch=32))
    learner.fill(random_rows(CAPACITY))
    check_learner(learner)
    assert learner.steps()(2) > 0


@pytest.mark.parametrize("sizes", [Sizes(batch=32, hidden_sizes=(8,), critics=3)])
def test_our_networks_have_the_sizes_asked_for(sizes):
    learner = Angle(CAPACITY, sizes)
    learner.fill(random_rows(CAPACITY))
    check_learner(learner)
    assert [tuple(tensor.shape) for tensor in learner.critics()][:2] == [(3, 8, 23), (3, 1, 8)]
    assert learner.policy()[0].shape == (8, 17)


def test_an_update_of_ours_is_one_that_the_agent_counts():
    learner = make("angle-torch")
    for _ in range(3):
        learner.update()
    assert learner.state.updates == 3


@pytest.mark.parametrize("name", OURS_AND_EAGER)
def test_training_steps(name):
    pytest.importorskip("mujoco")
    learner = make(name)
    try:
        run = learner.steps()
        networks = run.trainer.policy.parameters() if name == "angle-torch" else learner.policy()
        parameters = list(networks)
        before = [tensor.detach().clone() for tensor in parameters]
        assert run(4) > 0
        assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    finally:
        learner.close()


class Counting(gymnasium.Env):
    """Spaces as HalfCheetah's; fails after so many steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def __init__(self, fails_at=10**9):
        self.steps, self.fails_at = 0, fails_at

    def reset(self, *, seed=None, options=None):
        return np.zeros(17, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps >= self.fails_at:
            raise OSError("the simulator broke")
        return np.full(17, self.steps % 7, np.float32), 0.0, False, False, {}


@pytest.fixture
def counting(request):
    """A registered environment."""
    fails_at = getattr(request, "param", 10**9)
    gymnasium.register("Counting-v0", lambda: Counting(fails_at))
    yield "Counting-v0"
    del gymnasium.registry["Counting-v0"]


def trainer_steps(environment, steps_a_call=1):
    learner = make("angle-torch")
    config = learner.config.replace(environment=environment, evaluation_interval=None, steps=1 << 40)
    return TrainerSteps(config, learner.state.replay, steps_a_call)


def test_a_trainer_takes_the_steps_and_updates_that_it_is_let(counting):
    run = trainer_steps(counting, steps_a_call=2)
    try:
        for times in (1, 2):
            assert run(3) > 0
            assert run.gate.unwrapped.steps == 6 * times
            assert run.trainer.updates == 6 * times
    finally:
        run.close()
    assert not run.thread.is_alive()


@pytest.mark.parametrize("counting", [3], indirect=True)
def test_a_trainer_that_fails_says_so(counting):
    run = trainer_steps(counting)
    assert run(2) > 0
    with pytest.raises(RuntimeError, match="the simulator broke"):
        run(2)
    run.close()


def test_eager_implementations_have_the_same_losses():
    check_same_numbers()


def test_engines_are_held_to_torch():
    check_engine("torch", batch=32)
    with pytest.raises(RuntimeError, match="where torch changed it by"):
        check_engine("torch", batch=32, learning_rate=2e-3)


def test_an_engine_that_there_is_not_is_named():
    with pytest.raises(RuntimeError, match="not in this version: engine is 'steam'"):
        Angle(CAPACITY, engine="steam")
    with pytest.raises(RuntimeError, match="not in this version: turbo"):
        Angle(CAPACITY, turbo=True)


def test_a_wrong_target_update_fails_the_check(monkeypatch):
    learner = make("tuned-torch")
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda slow, online, tau: None)
    with pytest.raises(RuntimeError, match="targets did not move by tau"):
        check_learner(learner)


def test_wrong_actions_fail_the_check():
    learner = make("angle-torch")
    learner.choose = lambda observation: np.full(6, 1.5)
    with pytest.raises(RuntimeError, match=r"the action for one observation is \[1\.5"):
        check_learner(learner)


def test_acting_is_the_same_by_the_library_and_by_torch(benchmark):
    own, plain = make("angle-torch").forward()
    torch.testing.assert_close(own(), plain())
    benchmark(own)


def test_flops_are_counted_layer_by_layer():
    """The same count from the layers' sizes, and the figures at HalfCheetah's."""
    assert sac_flops() == (577_110_016, 542_638_080)
    o, a, sizes, critics = 3, 2, (4, 5, 6), 3
    policy = [(o, 4), (4, 5), (5, 6), (6, 2 * a)]
    critic = [(o + a, 4), (4, 5), (5, 6), (6, 1)]
    forward = {name: sum(i * k for i, k in layers) for name, layers in (("policy", policy), ("critic", critic))}
    inputs = {name: sum(i * k for i, k in layers[1:]) for name, layers in (("policy", policy), ("critic", critic))}
    critic_step = forward["policy"] + critics * forward["critic"]
    critic_step += critics * (2 * forward["critic"] + inputs["critic"])
    to_actions = inputs["critic"] + a * 4
    policy_step = 2 * forward["policy"] + critics * forward["critic"] + inputs["policy"] + critics * to_actions
    dense = 2 * 5 * (critic_step + policy_step)
    assert sac_flops(o, a, sizes, batch=5, critics=critics) == (dense, dense - 2 * 5 * 2 * to_actions)


def test_our_own_product_is_right_once_it_ran():
    floor = _core.ProductFloor(20, 33, 17)
    assert not floor.agrees()
    assert floor.product(2) > 0
    assert floor.agrees()
    with pytest.raises(ValueError, match="at least 1"):
        _core.ProductFloor(0, 1, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_best_product_is_the_fastest_candidate(threads):
    best, rates = best_product(seconds=0.002, threads=threads, width=64, batch=32)
    assert best.rate == max(rates.values()) == rates[best.name]
    assert set(rates) == set(products(threads, 64, 32))
    assert any(name.startswith("own product") for name in rates)
    assert best.flops == 2 * 64 * 64 * 32
    assert torch.get_num_threads() == 1


def test_floor_counts_operations(benchmark):
    asked = []

    def product(count):
        asked.append(count)
        return 1e-6 * count

    run = floor_clock(ProductRate("stand-in", 1.0, product, 4.0), flops=40)
    benchmark(lambda: run(2))
    assert asked[0] == 20
    assert floor_clock(ProductRate("stand-in", 1.0, product, 4.0), flops=42)(1) == pytest.approx(10.5e-6)


WORKER = """
import json, sys
for line in sys.stdin:
    command = json.loads(line)
    if command.get("end"):
        break
    answer = {"error": "no such thing"} if command.get("bad") else {"seen": command}
    print(json.dumps(answer), flush=True)
"""


def test_a_worker_process_answers_refuses_and_ends(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    worker = WorkerProcess(sys.executable, script)
    assert worker.ask({"run": 1}) == {"seen": {"run": 1}}
    with pytest.raises(RuntimeError, match="no such thing"):
        worker.ask({"bad": True})
    with pytest.raises(RuntimeError, match="its process ended"):
        worker.ask({"end": True})
    worker.close()


def test_an_interpreter_without_sbx_is_said_to_be_one(tmp_path):
    with pytest.raises(RuntimeError, match="does not start"):
        Sbx(str(tmp_path / "python"))
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    sbx = Sbx(str(bare))
    with pytest.raises(RuntimeError, match="No module named"):
        sbx.make(64, Sizes(batch=8), environment=None)
    sbx.close()


@pytest.mark.slow
def test_the_first_update_is_timed_in_a_fresh_process():
    python, script = scripts(sys.executable)["angle-torch"]
    assert seconds_taken(python, script, 1) > 0
    assert "engine is 'steam'" in why_not(python, script.replace("'torch'", "'steam'"), 1)


@pytest.mark.slow
def test_quick_run_writes_every_operation(tmp_path, capsys):
    pytest.importorskip("mujoco")
    path = tmp_path / "update.json"
    arguments = ["--quick", "--capacity", "512", "--repeats", "1", "--threads", "1", "--json", str(path)]
    assert main(arguments) == 0
    read = json.loads(path.read_text())
    ours = {row["operation"] for row in read["rows"] if row["library"] == "angle-torch"}
    assert ours == {
        "learner_update",
        "learner_update_sweep",
        "train_step",
        "act",
        "select_action",
        "import_to_first_update",
    }
    assert {row["operation"] for row in read["rows"] if row["library"] == "floor"} == {
        "learner_update",
        "learner_update_sweep",
    }
    assert len(read["goals"]) == 8
    printed = capsys.readouterr().out
    assert "x floor" in printed
    assert "SAC update, 2x256, batch 256, one core" in printed
    assert (tmp_path / "update-sweeps.png").stat().st_size > 0


def test_a_peer_that_fails_its_check_is_a_line_and_ours_an_error():
    good, broken = eager(CAPACITY, BATCH)
    broken.choose = lambda observation: np.full(6, np.nan)
    learners, notes = checked([good, broken], random_rows(CAPACITY))
    assert learners == [good]
    assert notes == [f"tuned-torch: the action for one observation is {np.full(6, np.nan)}"]
    ours = Angle(CAPACITY)
    ours.choose = broken.choose
    with pytest.raises(RuntimeError, match="the action for one observation"):
        checked([ours], random_rows(CAPACITY))


def test_a_part_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def measured(settings):
        if settings.threads == 1:
            raise RuntimeError("it fell over")
        row = summarize("floor", "learner_update", [2.0], capacity=512, batch=256, threads=settings.threads)
        return Found(rows=[row], about={"seen": list(settings.sections)})

    monkeypatch.setattr(update, "measure_apart", measured)
    monkeypatch.setattr(update.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    path = tmp_path / "update.json"
    assert main(["--only", "table,sweeps", "--quick", "--json", str(path)]) == 1
    read = json.loads(path.read_text())
    assert [row["threads"] for row in read["rows"]] == [2, 2]
    assert read["metadata"]["seen"] == ["sweeps"]
    assert "not measured: table: it fell over" in capsys.readouterr().out


def test_arguments_that_make_no_sense_are_refused(capsys):
    for arguments, why in (
        (["--threads", "0"], "0 is below 1"),
        (["--threads", "100000"], "asks for 100000 cores"),
        (["--only", "nothing"], "does not name sections"),
        (["--capacity", "10"], "must be at least 256"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert why in capsys.readouterr().err
