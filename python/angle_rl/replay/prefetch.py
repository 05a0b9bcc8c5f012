"""Batches drawn ahead by a thread of their own."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from angle_rl import _core
from angle_rl.types import Batch


class Prefetcher:
    """An endless iterator over batches of a buffer, ``depth`` of which a background thread keeps ready.

    Made by :meth:`ReplayBuffer.prefetch`. The thread never takes the interpreter's lock. Batches come in the order in
    which they were drawn: as long as nobody else samples or changes the buffer, they are exactly those that
    :meth:`ReplayBuffer.sample` would have given. Where others insert and update meanwhile, a batch is up to ``depth``
    batches older than the call that returns it. Every batch has memory of its own, pinned where CUDA is present.

    Close it when done, or use ``with``: batches that nobody took are given back, newest first, as far as nobody else
    has sampled since, and the buffer's sequence goes on as if they had never been drawn. Being collected, and the end
    of the interpreter, close it too. In a child of ``fork`` it raises RuntimeError; make one there.

    Any thread may take batches and close; a wait lets the interpreter's lock go.
    """

    def __init__(
        self,
        buffer: Any,  # the ReplayBuffer, whose file imports this one
        depth: int,
        device: torch.device,
        arguments: tuple[Any, ...],  # of ReplayBuffer._sample_arguments
    ) -> None:
        self._buffer = buffer
        self._device = device
        self._arguments = arguments
        self._core = _core.Prefetch(buffer._core)
        # The memory of the batches that are under way, by their names; it must outlive the thread's work on it.
        self._blanks: dict[int, list[torch.Tensor]] = {}
        self._names = itertools.count()
        # One entry for each batch that was asked for by a call that then failed. A list, whose pop is atomic.
        self._spare: list[None] = []
        self._closing = weakref.finalize(self, _close, self._core, self._blanks)
        try:
            for _ in range(depth):
                self._ask()
        except BaseException:
            self.close()
            raise

    def _ask(self) -> None:
        request = self._buffer._sample_arguments(*self._arguments)
        tensors = self._buffer._blank(request[0], torch.cuda.is_available())
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        name = next(self._names)
        self._blanks[name] = tensors  # before the thread hears of it: an interrupt may come between any two lines
        self._core.submit(name, addresses, *request)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        """The oldest batch, waiting until it is drawn.

        Raises StopIteration once closed, also out of a wait; what ``sample`` raises, tried at this very call: the next
        call tries again.
        """
        if not self._closing.alive:
            raise StopIteration
        try:
            self._spare.pop()
        except IndexError:
            self._ask()
        try:
            name = self._core.take()
        except BaseException:
            self._spare.append(None)
            raise
        tensors = None if name is None else self._blanks.pop(name, None)
        if tensors is None:
            raise StopIteration
        if self._device.type != "cpu":
            tensors = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        batch: Batch = self._buffer._batches.assemble(tensors)
        return batch

    def close(self) -> None:
        """End the thread and give back what nobody took. Again: without effect."""
        self._closing()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _close(core: _core.Prefetch, blanks: dict[int, list[torch.Tensor]]) -> None:
    core.stop()
    blanks.clear()
