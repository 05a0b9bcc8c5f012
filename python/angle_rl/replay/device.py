"""A replay whose rows and tree are on a device, and the calls that launch its kernels.

Memory is torch's: a segment as the host's core lays it out, so that it goes over and back as it is. Nothing here waits
for the device but what has to show its numbers (``stats``, ``audit``, ``save``, ...). What kernels refuse they note in
host memory, and the next call raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from angle_rl import _core, device
from angle_rl.types import Array, RandomKey

REPLACEMENT = 2  # the flag of a sample that may hold a row twice
KEYED = 8  # the kernels' flag of a sample whose draws a key decides

Arguments = tuple[int, int, float, float, int]


class DeviceCore:
    """What ``_core.Replay`` is to a buffer in host memory. One thread at a time; any streams, one after the other."""

    descriptor = -1

    def __init__(self, make_twin: Callable[[], _core.Replay], place: torch.device) -> None:
        """`make_twin` makes an empty replay of these options in host memory: its memory is where this one begins, and
        what it is brought to where the host has to look at all of it.
        """
        self._make_twin = make_twin
        try:
            twin = make_twin()
        except MemoryError:
            raise MemoryError("there are not enough addresses for a buffer of this capacity on the host") from None
        self._layout = twin.layout()
        self._kernels = device.backend(place)
        self.device = device.memory_device(place)
        self._real = self.device.type == "cuda"
        self.nbytes: int = self._layout["total_bytes"]
        try:
            self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"capacity is {twin.capacity} rows, which need {self.nbytes / 2**30:.1f} GiB on {self.device}: {error}"
            ) from None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._flags = torch.zeros(self._kernels.FLAG_WORDS, dtype=torch.int64, pin_memory=self._real)
        self._told = self._flags.numpy()
        self._live = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._event: Any = torch.cuda.Event() if self._real else None  # type: ignore[no-untyped-call]
        self._last_stream = 0
        self._loading: _core.Replay | None = None
        self.capacity: int = twin.capacity
        self.record_bytes: int = twin.record_bytes
        self.stack: int = twin.stack
        self.shares_successors: bool = self._layout["shares_successors"]
        self._push(twin)

    # Streams and errors ----------

    def _in_order(self) -> None:
        """What was launched before, on any stream, comes before what the current stream does next."""
        if not self._real or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream != self._last_stream:
            stream.wait_event(self._event)
            self._last_stream = stream.cuda_stream

    def _launch(self, kernel: Callable[..., None], *arguments: Any) -> None:
        self._in_order()
        device.launch(kernel, self.device, *arguments)
        self.launched()

    def launched(self) -> None:
        """Something was launched on the current stream that later streams have to wait for."""
        if self._real and not torch.cuda.is_current_stream_capturing():
            self._event.record(torch.cuda.current_stream(self.device))

    def check(self) -> None:
        """Raise what a kernel refused since the last look, if anything has arrived."""
        if self._told[0] == 0:
            return
        code, index, integer = (int(word) for word in self._told[:3])
        real = float(self._told[3:4].view(np.float64)[0])
        self._told[0] = 0
        raise ValueError(
            "an earlier call was refused on the device, and nothing of it was applied: "
            + {
                1: "no row of the buffer has positive weight; nothing can be sampled",
                2: f"td_errors[{index}] is {real}; priorities must be finite and not negative",
                3: f"handles[{index}] is {integer}, which was never issued; handles so far lie in "
                f"[0, {self.next_ticket})",
                4: f"rewards[{index}] is {real}; rewards must be finite in the buffer's dtype",
                5: f"priorities[{index}] is {real}; priorities must be finite and not negative",
                6: f"streams[{index}] is {integer}; it must be between 0 and {_core.MAX_STREAMS - 1}",
                7: f"batch_size is {integer}, but only {index} rows have positive weight; draw fewer, or with "
                "replacement",
            }[code]
        )

    # Rows in, batches out, priorities ----------

    def insert(self, columns: Sequence[int], n: int, flags: Sequence[int], check_rewards: bool) -> Array | torch.Tensor:
        """Launch the insert of `n` rows and return their handles: an array, or, where successors are shared and only
        the device knows how many records they take, a tensor there. `flags`: addresses of terminated, truncated,
        streams, priorities and the streams' order (`resident.rows_after`, or where
        successors are shared `resident.rows_before`), 0 where there is none.
        """
        terminated, truncated, streams, priorities, *order = flags
        self._in_order()
        handles: Array | torch.Tensor
        rows: tuple[int, ...]
        if self.shares_successors:
            handles = torch.empty(n, dtype=torch.int64, device=self.device)
            work = torch.empty(self._calls.work_bytes(n), dtype=torch.uint8, device=self.device)
            rows = (n, terminated, truncated, streams, *order, priorities)
            places = handles.data_ptr(), work.data_ptr()
            device.launch(self._calls.insert_sharing, self.device, list(columns), *rows, check_rewards, *places)
        else:
            first = self._tickets
            handles = np.arange(first, first + n, dtype=np.int64)
            rows = (n, first, terminated, truncated, streams, *order, priorities)
            device.launch(self._calls.insert, self.device, list(columns), *rows, check_rewards)
            self._tickets += n
        self.inserts += n
        self.launched()
        return handles

    def sample(
        self,
        arguments: Arguments,
        tensors: Sequence[torch.Tensor],
        key: RandomKey | None,
        where: torch.Tensor | None = None,
    ) -> None:
        """Launch the draw of a batch into `tensors`. While a graph is captured, the discount and the importance
        exponent are those of the last `refresh` before each launch of it.
        """
        n, n_step, discount, importance_exponent, flags = arguments
        drawn = torch.empty(n, dtype=torch.int64, device=self.device)
        captured = self._real and torch.cuda.is_current_stream_capturing()
        memory = [] if flags & REPLACEMENT else self._distinct_memory(n, captured)
        taken, chosen, listed = [tensor.data_ptr() for tensor in memory] or (0, 0, 0)
        how = flags & 5 | (0 if key is None else KEYED)
        self._launch(
            self._calls.sample,
            [tensor.data_ptr() for tensor in tensors],
            drawn.data_ptr(),
            n,
            n_step,
            discount,
            importance_exponent,
            how,
            0 if key is None else key.value,
            self._live.data_ptr() if captured else 0,
            chosen,
            taken,
            memory[0].numel() // 2 if memory else 0,
            listed,
            0 if where is None else where.data_ptr(),
        )

    def _distinct_memory(self, n: int, captured: bool) -> list[torch.Tensor]:
        """What the kernel works with that draws `n` rows without replacement: a table of what it has taken, by slot and
        by node, the slots drawn, and of a uniform buffer a list of rows, of which a graph may find more when launched.
        """
        levels, prioritized = len(self._layout["sums_at"]), self._layout["prioritized"]
        places = 1 << (2 * n * (1 + levels if prioritized else 1) - 1).bit_length()
        taken = torch.zeros(2 * places, dtype=torch.int64, device=self.device)
        unknown = captured or self.shares_successors  # how many there are when it runs
        listed = 0 if prioritized else self.capacity if unknown else self.size
        return [taken, *(torch.empty(size, dtype=torch.int64, device=self.device) for size in (n, listed))]

    def refresh(self, discount: float, importance_exponent: float) -> None:
        """What captured draws read from now on, and the current stream behind what was launched before."""
        self.check()
        self._in_order()
        numbers = torch.tensor([discount, importance_exponent], dtype=torch.float64, pin_memory=self._real)
        self._live.copy_(numbers, non_blocking=True)

    def update(self, handles: torch.Tensor, td_errors: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
        """Launch new priorities; how many will have been refused, as a number on the device."""
        n = handles.numel()
        refused = torch.zeros((), dtype=torch.int64, device=self.device)
        if n == 0:
            return refused
        claims, count = None, 0
        if n > self._kernels.FEW_HANDLES:
            count = 1 << (2 * n - 1).bit_length()
            claims = torch.zeros(2 + count, dtype=torch.int64, device=self.device)
        self._launch(
            self._calls.update,
            handles.data_ptr(),
            td_errors.data_ptr(),
            td_errors.dtype == torch.float64,
            n,
            0 if claims is None else claims.data_ptr(),
            count,
            refused.data_ptr(),
            0 if where is None else where.data_ptr(),
        )
        return refused

    def remove_rows(self, handles: torch.Tensor) -> int:
        """Take rows out of the draws; how many were refused. Waits for the device."""
        handles = there(self, handles)
        refused = torch.zeros((), dtype=torch.int64, device=self.device)
        if handles.numel() > 0:
            self._launch(self._calls.remove, handles.data_ptr(), handles.numel(), refused.data_ptr())
        count = int(refused)
        self.check()
        return count

    def set_priority_exponent(self, exponent: float) -> None:
        """Weigh every row anew."""
        self.check()
        self._in_order()
        at = self._layout["exponent_at"]
        self._memory[at : at + 8].view(torch.float64).fill_(exponent)
        self._exponent = exponent
        self._make_scratch(self._make_twin())
        self._launch(self._calls.reweigh)

    def priority_exponent(self) -> float:
        return self._exponent

    # The memory as a whole; these wait for the device ----------

    def pull(self, header_only: bool = False) -> _core.Replay:
        """A replay in host memory with all that is here, or with the counters alone."""
        twin = self._make_twin()
        self._in_order()
        there = torch.from_numpy(twin.memory())
        records = self._layout["records_at"]
        index = self._layout["header_bytes"] if header_only else records
        there[:index].copy_(self._memory[:index])
        if not header_only:
            end = records + self._slots_in_use(twin) * self.record_bytes
            there[records:end].copy_(self._memory[records:end])
        self.check()
        return twin

    def _push(self, twin: _core.Replay) -> None:
        self._in_order()
        there = torch.from_numpy(twin.memory())
        records = self._layout["records_at"]
        self._tickets: int = twin.next_ticket  # as they are on the device, but where successors are shared
        self.inserts: int = twin.stats()["inserts"]  # rows, those of calls that the device refused among them
        self._exponent = twin.priority_exponent()
        end = records + self._slots_in_use(twin) * self.record_bytes
        self._memory[:end].copy_(there[:end])
        self._make_scratch(twin)
        self.launched()

    def _make_scratch(self, twin: _core.Replay) -> None:
        first = bytearray(self._kernels.first_scratch(twin.bucket_priorities(self._exponent)))
        self._scratch = torch.frombuffer(first, dtype=torch.uint8).to(self.device)
        addresses = self._memory.data_ptr(), self._scratch.data_ptr(), self._flags.data_ptr()
        self._calls = self._kernels.Replay(self._layout, *addresses)

    def _slots_in_use(self, twin: _core.Replay) -> int:
        return min(twin.next_ticket, self.capacity)

    def _counter(self, name: str) -> int:
        """A number of the header, for which this waits."""
        self._in_order()
        at = self._layout[name]
        return int(self._memory[at : at + 8].view(torch.int64))

    @property
    def next_ticket(self) -> int:
        """Above all handles so far. Waits for the device where successors are shared."""
        return self._counter("next_ticket_at") if self.shares_successors else self._tickets

    @property
    def size(self) -> int:
        """Rows held. Waits for the device where successors are shared."""
        return self._counter("rows_at") if self.shares_successors else min(self._tickets, self.capacity)

    def stats(self) -> dict[str, int]:
        return self.pull(header_only=True).stats()

    def histogram(self) -> list[tuple[int, int]]:
        return self.pull(header_only=True).histogram()

    def audit(self) -> list[str]:
        return self.pull().audit()

    def repair(self) -> int:
        twin = self.pull()
        mended = twin.repair()
        self._push(twin)
        return mended

    def parts(self, slots: int | None = None) -> dict[str, Array]:
        """As ``_core.Replay.parts``: of a copy, or, with `slots`, of memory that `adopt` brings here."""
        if slots is None:
            return self.pull().parts()
        self._loading = self._make_twin()
        return self._loading.parts(slots)

    def adopt(self, header: Array, slots: int) -> None:
        assert self._loading is not None
        self._loading.adopt(header, slots)
        self._push(self._loading)
        self._loading = None

    def restore(self, header: Array, index: Array, records: Array) -> None:
        twin = self._make_twin()
        twin.restore(header, index, records)
        self._push(twin)


def there(core: DeviceCore, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as kernels take it: contiguous, on the device, without gradient."""
    return tensor.detach().to(core.device, non_blocking=True).contiguous()
