"""Processes on one buffer are killed at any moment: the others go on, audit finds the damage, repair mends it."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from replay_children import INSERTED_AT_ONCE, ROLES, Control, start_worker, whole
from replay_rows import SCHEMA, rows

from angle_rl.replay import PrioritizedReplayBuffer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared buffers need Linux")

CAPACITY = 1000  # no multiple of what is inserted at once: laps change in the middle of a call


def busy_in(findings) -> int:
    """How many slots the findings say were left in the middle of a row."""
    return sum(int(re.findall(r"\d+", text)[0]) for text in findings if "writers died" in text)


def is_alive(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG) == (0, 0)


def check_repaired(buffer) -> None:
    """Repair at rest; then nothing is found, every row drawn is whole and takes its new priority."""
    buffer.repair()
    assert buffer.audit() == []
    assert buffer.repair() == 0
    batch = buffer.sample(2000)
    assert whole(batch)
    assert buffer.update_priorities(batch.handles, torch.rand(2000)) == 0
    assert buffer.audit() == []


@pytest.mark.parametrize("rounds", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_processes_are_killed_and_the_others_go_on(rounds):
    """Of two processes that insert, one that samples and updates and one that updates, one is killed in each round."""
    rng = random.Random(rounds)
    buffer = PrioritizedReplayBuffer(CAPACITY, SCHEMA, shared=True)
    buffer.insert(*rows(np.arange(CAPACITY)))
    control, workers = Control(len(ROLES)), range(len(ROLES))
    children = {worker: start_worker(buffer, control, worker, worker) for worker in workers}
    killed: list[str] = []  # roles, since the last repair
    cut_inserts = wrong_sums = 0
    try:
        for number in range(rounds):
            control.wait_for_progress(workers)
            time.sleep(rng.random() * 0.005)
            victim = None
            if number % 8 != 7:  # sometimes nobody
                victim = rng.choice(workers)
                os.kill(children[victim], signal.SIGKILL)
                os.waitpid(children.pop(victim), 0)
                killed.append(ROLES[victim])
            control.wait_for_progress(children, 3)
            control.pause(children)
            assert all(map(is_alive, children.values())), "a worker failed, or met a row that was not whole"

            findings = buffer.audit()
            busy, sums = busy_in(findings), any("sum" in text for text in findings)
            assert busy <= killed.count("insert") * INSERTED_AT_ONCE, findings
            if not killed:
                assert findings == []
            cut_inserts, wrong_sums = cut_inserts + (busy > 0), wrong_sums + sums
            if number % 3 != 0:  # sometimes the others go on for longer with what is left of the dead
                check_repaired(buffer)
                killed.clear()
            if victim is not None:
                children[victim] = start_worker(buffer, control, victim, rounds + number)
            control.resume()
    finally:
        for child in children.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    check_repaired(buffer)
    buffer.close()
    # So many kills cannot all have missed the core; if they did, the test would have tested nothing.
    assert cut_inserts > 0
    assert wrong_sums > 0


def repair_often(buffer) -> None:
    for _ in range(1000):  # a single one may fall into a moment in which the others do nothing
        buffer.repair()


def test_repair_refuses_a_buffer_in_use():
    buffer = PrioritizedReplayBuffer(CAPACITY, SCHEMA, shared=True)
    buffer.insert(*rows(np.arange(CAPACITY)))
    control = Control(len(ROLES))
    child = start_worker(buffer, control, 0, 0)
    try:
        control.wait_for_progress([0])
        with pytest.raises(RuntimeError, match="at rest"):
            repair_often(buffer)
        control.pause([0])
        check_repaired(buffer)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        buffer.close()
