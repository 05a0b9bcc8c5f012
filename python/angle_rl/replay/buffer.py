"""The uniform buffer, which the prioritised one builds on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch

from angle_rl import _core
from angle_rl.replay.arrays import as_array, check_integer, check_number, column, require_memory
from angle_rl.schema import Schema, flatten, make_schema, unflatten
from angle_rl.types import Array, Batch

ImportanceExponent: TypeAlias = "float | Callable[[int], float]"
"""A number, or a schedule from the number of rows inserted so far to a number."""


# What torch.utils.dlpack.from_dlpack calls for a capsule, without the wrapper's 0.15 us.
_to_tensor: Callable[[Any], torch.Tensor] = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)
_data_ptr, _numel = torch.Tensor.data_ptr, torch.Tensor.numel


class ReplayBuffer:
    """Uniform replay: every stored row is equally likely.

    Rows are transitions; the oldest is overwritten when ``capacity`` is reached. Any thread may insert and sample at
    any time; none waits for another. With one thread, the same seed and the
    same calls give the same batches bit for bit.

    Args:
        capacity: rows kept, at least 1. The memory is reserved at once; a MemoryError says when it is not to be had.
        schema: what a row holds; see :func:`~angle_rl.schema.make_schema`. Or give both spaces:
        observation_space, action_space: Gymnasium spaces of one environment.
        discount: factor in [0, 1] of the bootstrap value, which ``sample`` puts into ``Batch.discounts``.
        stratified: one draw from each of ``batch_size`` equal shares (lower variance) instead of independent draws.
        seed: in [0, 2**64), decides every draw.
    """

    _prioritized = False

    def __init__(
        self,
        capacity: int,
        schema: Mapping[str, Any] | Sequence[Any] | Schema | None = None,
        *,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        discount: float = 0.99,
        stratified: bool = True,
        seed: int = 0,
    ) -> None:
        self._build(capacity, schema, observation_space, action_space, discount, stratified, seed, 0.0, 0.0)

    def _build(
        self,
        capacity: int,
        schema: Mapping[str, Any] | Sequence[Any] | Schema | None,
        observation_space: gym.Space[Any] | None,
        action_space: gym.Space[Any] | None,
        discount: float,
        stratified: bool,
        seed: int,
        priority_exponent: float,
        priority_epsilon: float,
    ) -> None:
        self.schema = make_schema(schema, observation_space, action_space)
        self.discount = check_number("discount", discount, 0.0, 1.0)
        capacity = check_integer("capacity", capacity, 1, 2**63 - 1)
        seed = check_integer("seed", seed, 0, 2**64 - 1)
        fields = self.schema.fields
        row = sum(int(np.prod(f.shape, dtype=object)) * f.dtype.itemsize for f in fields)
        require_memory(capacity, row + 32)
        self._core = _core.Replay(
            capacity,
            [(f.name, f.dtype, list(f.shape)) for f in fields],
            len(self.schema.observations),
            self._prioritized,
            bool(stratified),
            priority_exponent,
            priority_epsilon,
            seed,
        )
        self._flat = self.schema.observation_structure is None and self.schema.action_structure is None
        self._torch_dtypes = [torch.from_numpy(np.empty(0, f.dtype)).dtype for f in fields]
        self._importance_exponent: ImportanceExponent = 0.0
        self._checked_out: tuple[Batch | None, int, tuple[int, ...], tuple[int, ...]] = (None, 0, (), ())

    def __len__(self) -> int:
        return self._core.size

    @property
    def capacity(self) -> int:
        """Rows that the buffer can hold."""
        return self._core.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of memory reserved, rows and index together."""
        return self._core.nbytes

    def stats(self) -> dict[str, int]:
        """Counts since the buffer was made: rows inserted and sampled, priorities updated and refused, slots met busy,
        draws repeated, weights saturated, rows whose observations hold a NaN; and the rows held and bytes reserved."""
        return {**self._core.stats(), "size": len(self), "capacity": self.capacity, "nbytes": self.nbytes}

    def insert(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminated: Any,
        truncated: Any = None,
        streams: Any = None,
    ) -> Array:
        """Add one transition, or ``n`` with a leading axis on every argument.

        Args:
            observations, next_observations: ``[*shape]`` or ``[n, *shape]``; nested spaces: dicts or tuples of those.
                ``next_observations`` are the true successors, also where the episode ended.
            actions: ``[*shape]`` or ``[n, *shape]``.
            rewards: a finite number or ``[n]``.
            terminated, truncated: bool or ``[n]`` bool. A terminated row has no bootstrap value, a truncated one has.
            streams: which environment each row came from, an integer in [0, 65536) or ``[n]``; rows of one stream
                come in time order. None: all from stream 0.

        Returns:
            int64 handles ``[n]`` (``[1]`` for one row), for :meth:`PrioritizedReplayBuffer.update_priorities`.

        Raises:
            ValueError, TypeError: a shape, dtype, device or value that does not fit; then nothing is inserted.

        Arrays and CPU tensors of the right dtype that are contiguous are taken without a copy; others are converted by
        NumPy's ``same_kind`` rule. Any thread; rows of one stream from one thread at a time.
        """
        if self._flat and type(observations) is np.ndarray:
            handles: Array | None = self._core.insert(
                (observations, actions, rewards, next_observations), terminated, truncated, streams
            )
            if handles is not None:
                return handles
        return self._insert_checked(observations, actions, rewards, next_observations, terminated, truncated, streams)

    def _insert_checked(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminated: Any,
        truncated: Any,
        streams: Any,
    ) -> Array:
        schema = self.schema
        values: list[Any] = []
        flatten("observations", schema.observation_structure, observations, values)
        flatten("actions", schema.action_structure, actions, values)
        values.append(rewards)
        flatten("next_observations", schema.observation_structure, next_observations, values)
        first, first_field = as_array("observations", values[0]), schema.observations[0]
        batched = first.ndim == len(first_field.shape) + 1
        n = first.shape[0] if batched else 1
        columns = tuple(
            column(f.name, value, f.shape, f.dtype, n, batched) for f, value in zip(schema.fields, values, strict=True)
        )
        flag = np.dtype(np.bool_)
        ended = column("terminated", terminated, (), flag, n, batched)
        cut = None if truncated is None else column("truncated", truncated, (), flag, n, batched)
        if streams is not None:
            streams = column("streams", streams, (), np.dtype(np.int64), n, batched)
        handles: Array | None = self._core.insert(columns, ended, cut, streams)
        if handles is None:
            raise RuntimeError("the core refused arrays that the facade had converted; please report this")
        return handles

    def sample(
        self,
        batch_size: int,
        *,
        discount: float | None = None,
        importance_exponent: float | None = None,
        out: Batch | None = None,
        device: torch.device | str | None = None,
    ) -> Batch:
        """Draw ``batch_size`` rows with replacement.

        Args:
            batch_size: at least 1.
            discount: in [0, 1]; None: the buffer's.
            importance_exponent: at least 0; None: the buffer's. Without effect on a uniform buffer.
            out: a batch that an earlier call returned, to be filled again instead of allocating.
            device: where the tensors shall be; CUDA is reached by an asynchronous copy from pinned memory.

        Returns:
            A :class:`~angle_rl.types.Batch` of fresh tensors, or ``out``. Every row was complete and of positive weight
            when it was read; the batch is no snapshot of the buffer.

        Raises:
            ValueError: the buffer is empty, no row has positive weight, or an argument is out of range.

        Any thread. Importance weights are ``(N P(i))**-importance_exponent`` over the batch's largest (Schaul et al.,
        "Prioritized experience replay", 2016, section 3.4).
        """
        if type(batch_size) is not int or not 0 < batch_size < 2**31:
            batch_size = check_integer("batch_size", batch_size, 1, 2**31 - 1)
        discount = self.discount if discount is None else check_number("discount", discount, 0.0, 1.0)
        if importance_exponent is None:
            exponent = self._importance_exponent
            importance_exponent = exponent if isinstance(exponent, float) else self._scheduled(exponent)
        else:
            importance_exponent = check_number("importance_exponent", importance_exponent, 0.0)
        if device is not None:
            return self._sample_to(torch.device(device), batch_size, discount, importance_exponent, out)
        if out is None:
            tensors = map(_to_tensor, self._core.sample_fresh(batch_size, discount, importance_exponent))
            return Batch._make(tensors) if self._flat else self._assemble(list(tensors))
        self._core.sample(batch_size, discount, importance_exponent, self._addresses(out, batch_size))
        return out

    def _scheduled(self, schedule: Callable[[int], float]) -> float:
        return check_number("importance_exponent", float(schedule(self._core.stats()["inserts"])), 0.0)

    def _sizes(self, n: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a batch's tensors: the schema's fields, discounts, importance weights, handles, steps."""
        shapes: list[tuple[int, ...]] = [(n, *f.shape) for f in self.schema.fields]
        sizes = list(zip(shapes, self._torch_dtypes, strict=True))
        return [*sizes, *[((n,), torch.float32)] * 2, *[((n,), torch.int64)] * 2]

    def _assemble(self, tensors: list[torch.Tensor]) -> Batch:
        left = list(tensors)
        observations = unflatten(self.schema.observation_structure, left)
        actions = unflatten(self.schema.action_structure, left)
        rewards = left.pop(0)
        successors = unflatten(self.schema.observation_structure, left)
        return Batch(observations, actions, rewards, successors, *left)

    def _leaves(self, batch: Batch) -> Sequence[torch.Tensor]:
        if self._flat:
            return batch
        leaves: list[torch.Tensor] = []
        flatten("observations", self.schema.observation_structure, batch.observations, leaves)
        flatten("actions", self.schema.action_structure, batch.actions, leaves)
        leaves.append(batch.rewards)
        flatten("next_observations", self.schema.observation_structure, batch.next_observations, leaves)
        return [*leaves, batch.discounts, batch.importance_weights, batch.handles, batch.steps]

    def _addresses(self, out: Batch, n: int) -> tuple[int, ...]:
        """The addresses of ``out``'s tensors, checked anew when any of them has moved or changed its size."""
        leaves = self._leaves(out)
        addresses, lengths = tuple(map(_data_ptr, leaves)), tuple(map(_numel, leaves))
        checked = self._checked_out
        if checked[0] is out and checked[1] == n and checked[2] == addresses and checked[3] == lengths:
            return addresses
        names = [f.name for f in self.schema.fields]
        names += ["discounts", "importance_weights", "handles", "steps"]
        for name, leaf, (size, dtype) in zip(names, leaves, self._sizes(n), strict=True):
            fits = tuple(leaf.shape) == size and leaf.dtype == dtype
            if not fits or not leaf.is_contiguous() or leaf.device.type != "cpu":
                raise ValueError(
                    f"out.{name} is {leaf.dtype} {tuple(leaf.shape)} on {leaf.device}; expected {dtype} "
                    f"{size}, contiguous, on cpu"
                )
        if len(set(addresses)) < len(addresses):
            raise ValueError("out holds the same memory twice; every tensor must have its own")
        self._checked_out = (out, n, addresses, lengths)
        return addresses

    def _sample_to(
        self, device: torch.device, n: int, discount: float, importance_exponent: float, out: Batch | None
    ) -> Batch:
        if out is not None:
            raise ValueError("out and device are both given; out is filled where it is, so leave one of them out")
        pinned = device.type == "cuda"
        tensors = [torch.empty(size, dtype=dtype, pin_memory=pinned) for size, dtype in self._sizes(n)]
        self._core.sample(n, discount, importance_exponent, tuple(map(_data_ptr, tensors)))
        return self._assemble([t.to(device, non_blocking=True) for t in tensors])

    def export_state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything that decides the next batches: byte arrays, which are views of the buffer, and JSON-able facts.

        Only while no other call is under way; copy the views before the next insert if they are to stay.
        """
        facts = {
            "fields": [[f.name, list(f.shape), f.dtype.str] for f in self.schema.fields],
            "capacity": self.capacity,
            "prioritized": self._prioritized,
            "size": len(self),
        }
        return self._core.parts(), facts

    def import_state(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave, in place of all rows here.

        Raises ValueError, and changes nothing, when the state comes from another schema, capacity or kind of buffer.
        """
        own = self.export_state()[1]
        for name in ("fields", "capacity", "prioritized"):
            if facts.get(name) != own[name]:
                raise ValueError(f"the saved replay's {name} is {facts.get(name)}; this buffer's is {own[name]}")
        for name in ("index", "records"):
            if name not in arrays:
                raise ValueError(f"the saved replay lacks the array {name!r}")
        self._core.restore(np.ascontiguousarray(arrays["index"]), np.ascontiguousarray(arrays["records"]))
