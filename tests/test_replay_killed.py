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
from replay_children import INSERTED_AT_ONCE, ROLES, STACK, Control, stacked, start_worker, whole, whole_stacks
from replay_rows import SCHEMA, rows

from angle_rl.replay import PrioritizedReplayBuffer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared buffers need Linux")

CAPACITY = 1000  # no multiple of what is inserted at once: laps change in the middle of a call
LARGE = 20_001  # sums of two levels

# Beside its capacity: what the buffer's rows are, and what checks them.
PLAIN = (rows, whole, {"schema": SCHEMA})
SHARED = (rows, whole, {"schema": SCHEMA, "share_successors": True})
STACKED = (stacked, whole_stacks, {"schema": STACK, "frame_stack": 4})


def count_in(findings, what: str) -> int:
    """The largest number that comes first in a finding of this kind."""
    return max((int(re.findall(r"\d+", text)[0]) for text in findings if what in text), default=0)


def check_findings(findings, killed: list[str], ever: int, sharing: bool) -> None:
    """No more than what so many killed calls can leave behind: see `ReplayBuffer.audit`.

    `killed` since the last repair. `ever`: writers killed at all; a ticket that one had taken and not used spares a row
    from being overwritten, whose successor then goes before it, which may show later.
    """
    cut, updates = killed.count("insert"), len(killed) - killed.count("insert")
    # Without shared successors one row is written at a time; with them its successor, and with stacks a few frames.
    assert count_in(findings, "writers died") <= cut * (3 if sharing else 1), findings
    assert count_in(findings, "another weight") <= updates + (cut if sharing else 0), findings
    assert count_in(findings, "lack a successor") <= ever * 4, findings
    assert count_in(findings, "sums of level") <= 2 * len(killed), findings
    assert killed or not [text for text in findings if "lack a successor" not in text], findings


def is_alive(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG) == (0, 0)


def check_repaired(buffer, check=whole) -> None:
    """Repair at rest; then nothing is found, every row drawn is whole and takes its new priority."""
    buffer.repair()
    assert buffer.audit() == []
    assert buffer.repair() == 0
    batch = buffer.sample(2000)
    assert check(batch)
    assert buffer.update_priorities(batch.handles, torch.rand(2000)) == 0
    assert buffer.audit() == []


@pytest.mark.parametrize("kind", [PLAIN, SHARED, STACKED], ids=["plain", "shared successors", "stacks"])
@pytest.mark.parametrize(
    ("rounds", "capacity"),
    [
        (30, CAPACITY),
        pytest.param(200, CAPACITY, marks=pytest.mark.slow),
        pytest.param(200, LARGE, marks=pytest.mark.slow),
    ],
)
def test_processes_are_killed_and_the_others_go_on(rounds, capacity, kind):
    """Of two processes that insert, one that samples and updates and one that updates, one is killed in each round."""
    make, check, options = kind
    rng = random.Random(rounds)
    buffer = PrioritizedReplayBuffer(capacity, **options, shared=True)
    buffer.insert(*make(np.arange(capacity - 4)))
    control, workers = Control(len(ROLES)), range(len(ROLES))
    children = {worker: start_worker(buffer, control, worker, worker) for worker in workers}
    killed: list[str] = []  # roles, since the last repair
    ever = cut_inserts = wrong_sums = 0
    try:
        for number in range(10 * rounds):
            if number >= rounds and cut_inserts > 0 < wrong_sums:  # it may take longer to hit both on a busy machine
                break
            control.wait_for_progress(workers)
            time.sleep(rng.random() * 0.005)
            victim = None
            if number % 8 != 7:  # sometimes nobody
                victim = rng.choice(workers)
                os.kill(children[victim], signal.SIGKILL)
                os.waitpid(children.pop(victim), 0)
                killed.append(ROLES[victim])
                ever += ROLES[victim] == "insert"
            control.wait_for_progress(children, 3)
            control.pause(children)
            assert all(map(is_alive, children.values())), "a worker failed, or met a row that was not whole"

            findings = buffer.audit()
            check_findings(findings, killed, ever, "share_successors" in options or "frame_stack" in options)
            cut_inserts += count_in(findings, "writers died") > 0
            wrong_sums += count_in(findings, "sums of level") > 0
            if number % 3 != 0:  # sometimes the others go on for longer with what is left of the dead
                check_repaired(buffer, check)
                killed.clear()
            if victim is not None:
                children[victim] = start_worker(buffer, control, victim, rounds + number)
            control.resume()
    finally:
        for child in children.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    check_repaired(buffer, check)
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


@pytest.mark.parametrize("kind", [PLAIN, SHARED, STACKED], ids=["plain", "shared successors", "stacks"])
@pytest.mark.parametrize("rounds", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_a_writer_stops_in_a_row_while_the_ring_goes_past_it(rounds, kind):
    """Stopped, not killed: when it has gone on and come to rest, everything adds up and every row can be drawn."""
    make, check, options = kind
    rng = random.Random(rounds)
    buffer = PrioritizedReplayBuffer(CAPACITY, **options, shared=True)
    buffer.insert(*make(np.arange(CAPACITY - 4)))
    control = Control(len(ROLES))
    writers = [0, 1]
    children = {worker: start_worker(buffer, control, worker, worker) for worker in writers}
    try:
        for number in range(rounds):
            control.wait_for_progress(writers)
            time.sleep(rng.random() * 0.002)
            stopped, other = writers if number % 2 else reversed(writers)
            os.kill(children[stopped], signal.SIGSTOP)
            control.wait_for_progress([other], 3 * CAPACITY // INSERTED_AT_ONCE)
            os.kill(children[stopped], signal.SIGCONT)
            control.pause(writers)
            assert all(map(is_alive, children.values()))
            assert buffer.audit() == []
            assert check(buffer.sample(200))
            control.resume()
    finally:
        for child in children.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    buffer.close()
