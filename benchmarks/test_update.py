"""The update benchmark's operations at a small size; each asserts what the operation answered."""

from __future__ import annotations

import json

import pytest
import torch

from angle_rl.bench.eager import check_same_numbers
from angle_rl.bench.learners import StableBaselines3, check_learner, ours_and_eager, random_rows
from angle_rl.bench.products import best_product, floor_clock, sac_flops
from angle_rl.bench.update import main

CAPACITY = 1024
BATCH = 256


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(index):
    learner = ours_and_eager()[index](CAPACITY, BATCH)
    learner.fill(random_rows(CAPACITY))
    return learner


@pytest.mark.parametrize("index", range(3), ids=["angle-torch", "cleanrl-style", "tuned-torch"])
def test_learner_update(benchmark, index):
    learner = make(index)
    check_learner(learner)
    benchmark(learner.update)
    assert all(torch.isfinite(tensor).all() for tensor in (*learner.critics(), *learner.policy()))


def test_stable_baselines3_update():
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    learner = StableBaselines3(CAPACITY, BATCH)
    learner.fill(random_rows(CAPACITY))
    check_learner(learner)


@pytest.mark.parametrize("index", range(3), ids=["angle-torch", "cleanrl-style", "tuned-torch"])
def test_env_step(index):
    pytest.importorskip("mujoco")
    learner = make(index)
    before = [tensor.detach().clone() for tensor in learner.policy()]
    assert learner.stepper()(4) > 0
    assert all(not torch.equal(old, new) for old, new in zip(before, learner.policy(), strict=True))


def test_eager_implementations_have_the_same_losses():
    check_same_numbers()


def test_a_wrong_target_update_fails_the_check(monkeypatch):
    learner = make(2)
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda slow, online, tau: None)
    with pytest.raises(RuntimeError, match="targets did not move by tau"):
        check_learner(learner)


def test_flops_are_counted_layer_by_layer():
    """The same count from the layers' sizes, and the figures at HalfCheetah's."""
    assert sac_flops() == (577_110_016, 542_638_080)
    o, a, h = 3, 2, 4
    policy = [(o, h), (h, h), (h, 2 * a)]
    critic = [(o + a, h), (h, h), (h, 1)]
    forward = {name: sum(i * k for i, k in layers) for name, layers in (("policy", policy), ("critic", critic))}
    inputs = {name: sum(i * k for i, k in layers[1:]) for name, layers in (("policy", policy), ("critic", critic))}
    critic_step = forward["policy"] + 2 * forward["critic"] + 2 * (2 * forward["critic"] + inputs["critic"])
    to_actions = inputs["critic"] + a * h
    policy_step = 2 * forward["policy"] + 2 * forward["critic"] + inputs["policy"] + 2 * to_actions
    dense = 2 * 5 * (critic_step + policy_step)
    assert sac_flops(o, a, h, batch=5) == (dense, dense - 2 * 5 * to_actions)


def test_floor_counts_operations(benchmark):
    name, rate, product = best_product(seconds=0.005)
    assert rate > 0
    assert name in ("torch.mm", "oneDNN linear")
    calls = []
    run = floor_clock(lambda: calls.append(product()), flops=10 * 2 * 256**3)
    benchmark(lambda: run(2))
    assert len(calls) % 20 == 0
    assert calls


@pytest.mark.slow
def test_quick_run_writes_every_operation(tmp_path, capsys):
    pytest.importorskip("mujoco")
    path = tmp_path / "update.json"
    assert main(["--quick", "--capacity", "512", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    ours = {row["operation"] for row in rows if row["library"] == "angle-torch"}
    assert ours == {"learner_update", "env_step"}
    assert any(row["library"] == "floor" for row in rows)
    assert "x floor" in capsys.readouterr().out
