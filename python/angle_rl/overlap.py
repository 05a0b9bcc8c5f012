"""Collecting while learning: updates in a thread of their own, and how new weights reach whoever acts.

The thread that acts decides which updates are due, and with which keys, exactly as without overlap, and hands them over
in order: so their number is exact, whenever they are taken. It goes on while at most `LEAD` of them wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from angle_rl.agents.actor_critic import frozen_copy
from angle_rl.agents.base import name_of
from angle_rl.agents.state import LearnerState, Work

LEAD = 32
"""Updates that may wait, or a single call's if these are more. Enough for the learner to have work while an environment
resets or metrics are written; few enough that nobody acts by weights older than with 32 updates a call."""

CALLBACKS = ("select_action", "explore", "record_observation", "optimize_model", "finish_updates")
"""What must be as our agents have it: only that is known to leave the learner's part of the state alone"""


def overlap_refusal(agent: Any, state: Any) -> str | None:
    """Why an agent's updates cannot be taken while it acts; None where they can."""
    name = type(agent).__name__
    if not isinstance(state, LearnerState):
        return f"{name} does not keep what it learns apart from what it acts by (SAC, TD3, DDPG and DQN do)"
    for callback in CALLBACKS:
        if hasattr(agent, callback) and name_of(getattr(agent, callback)) != "ours":
            return f"{name} has its own {callback}, which may touch what another thread learns"
    return None


class Weights:
    """A network's tensors on their way from one thread that publishes to one that fetches. Neither waits for the other.

    A sequence-locked copy over two buffers: copy number n lies in buffer n % 2, and the number is set when the copy is
    complete. So a buffer is written to only while the number is one above its own copy's, and a copy was taken whole
    if the number is the same after it as before. Whoever finds another takes the newer copy instead.

    The number is read and written with the interpreter's lock held, which orders it with the copies before and after
    (these let go of the lock). The network itself is read by the publisher alone, between its own updates.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._source = tensors_of(network)
        self._buffers = [[tensor.clone() for tensor in self._source] for _ in range(2)]
        self._number = 0

    def publish(self) -> None:
        """Let the network's weights of now be fetched. The publishing thread."""
        following = self._number + 1
        _copy(self._source, self._buffers[following % 2])
        self._number = following

    def fetch(self, own: list[torch.Tensor], number: int) -> int:
        """Copy the newest weights into these tensors, which hold copy `number`; returns the number of what they hold
        now. The fetching thread.
        """
        while (newest := self._number) != number:  # also after a copy: was it cut?
            _copy(self._buffers[newest % 2], own)
            number = newest
        return number


class LearnerThread:
    """Does work handed over in order, in a thread of its own; see `angle_rl.agents.state.Learner`.

    All methods belong to the thread that made it.
    """

    def __init__(self, network: torch.nn.Module, lead: int = LEAD) -> None:
        self.lead = lead
        self._weights = Weights(network)
        self._actor = frozen_copy(network)
        self._own = tensors_of(self._actor)
        self._held = 0  # which copy of the weights these are
        self._queue: deque[Work] = deque()
        self._waiting = 0  # updates in the queue or being taken
        self._busy = False
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()  # any of the five
        self._thread = threading.Thread(target=self._learn, name="angle-learner", daemon=True)
        self._thread.start()

    def submit(self, works: list[Work]) -> None:
        """Have these done, in order; wait while more than `lead` updates wait, or than one of these is."""
        most = max(self.lead, *(updates for updates, _ in works))
        with self._changed:
            self._queue.extend(works)
            self._waiting += sum(updates for updates, _ in works)
            self._changed.notify_all()
            self._wait(lambda: self._waiting <= most)

    def rest(self) -> None:
        """Wait until all is done."""
        with self._changed:
            self._wait(lambda: not self._queue and not self._busy)

    def acting(self) -> torch.nn.Module:
        """The copy that acts, with the newest weights."""
        self._held = self._weights.fetch(self._own, self._held)
        return self._actor

    def close(self) -> int:
        """End the thread, after what it is at; returns how many updates it had not begun."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        return sum(updates for updates, _ in self._queue)

    def _wait(self, until: Callable[[], bool]) -> None:
        """Raises what the thread raised."""
        self._changed.wait_for(lambda: self._failure is not None or until())
        if self._failure is not None:
            raise self._failure

    def _learn(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._queue) > 0)
                if self._closed:
                    return
                updates, work = self._queue.popleft()
                self._busy = True
            failure: BaseException | None = None
            try:
                work()
                if updates > 0:
                    self._weights.publish()
            except BaseException as caught:
                failure = caught
            with self._changed:
                self._waiting -= updates
                self._busy = False
                self._failure = failure
                self._changed.notify_all()
            if failure is not None:
                return


@contextmanager
def learning_apart(state: LearnerState) -> Iterator[None]:
    """Inside, a thread takes the state's updates. Those that it leaves undone at the end are due again later."""
    learner = LearnerThread(getattr(state, state.acts_by))
    state.learner = learner
    try:
        yield
    finally:
        state.learner = None
        state.held_back += learner.close()


def tensors_of(network: torch.nn.Module) -> list[torch.Tensor]:
    """A network's parameters and buffers, without gradients, sharing its memory."""
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]


def _copy(source: list[torch.Tensor], destination: list[torch.Tensor]) -> None:
    for own, other in zip(destination, source, strict=True):
        own.copy_(other)
