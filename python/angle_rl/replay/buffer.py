"""The uniform buffer, which the prioritised one builds on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch

from angle_rl import _core
from angle_rl.device import free_memory
from angle_rl.replay import export, saving, sharing
from angle_rl.replay import resident as on_device
from angle_rl.replay.arrays import (
    check_device,
    check_flag,
    check_integer,
    check_number,
    convert_rows,
    handle_tensor,
    require_memory,
)
from angle_rl.replay.batches import CPU, BatchLayout
from angle_rl.replay.device import REPLACEMENT, DeviceCore
from angle_rl.replay.images import frames_of, record_bytes, shares_successors
from angle_rl.replay.prefetch import Prefetcher
from angle_rl.replay.sharing import Place
from angle_rl.schema import Schema, make_schema
from angle_rl.types import Array, Batch, RandomKey

ImportanceExponent: TypeAlias = "float | Callable[[int], float]"
"""A number, or a schedule from the number of rows inserted so far to a number."""

Described: TypeAlias = "Mapping[str, Any] | Sequence[Any] | Schema | None"
"""What :func:`~angle_rl.schema.make_schema` takes."""

# What torch.utils.dlpack.from_dlpack calls for a capsule, without the wrapper's 0.15 us.
_to_tensor: Callable[[Any], torch.Tensor] = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)
_STRATIFIED, _BOUND_BY_BUFFER = 1, 4  # with REPLACEMENT the core's flags of a sample
_MOST_STEPS = 2**20
_CHECKS: dict[str, Callable[[Any], Any]] = {  # of attributes, so that a draw need not check them anew
    "n_step": lambda value: check_integer("n_step", value, 1, _MOST_STEPS),
    "discount": lambda value: check_number("discount", value, 0.0, 1.0),
    "stratified": lambda value: check_flag("stratified", value),
    "replacement": lambda value: check_flag("replacement", value),
}


class ReplayBuffer:
    """Uniform replay: every stored row is equally likely.

    Rows are transitions; the oldest is overwritten when ``capacity`` is reached. Any thread may insert and sample at
    any time, and any process that the buffer was shared with; none waits for another. With one thread, the same seed
    and the same calls give the same batches bit for bit.

    Args:
        capacity: rows kept, at least 1. The memory is reserved at once; a MemoryError says when it is not to be had.
        schema: what a row holds; see :func:`~angle_rl.schema.make_schema`. Or give both spaces:
        observation_space, action_space: Gymnasium spaces of one environment.
        n_step: rewards summed a row, at least 1 (Sutton, "Learning to predict by the methods of temporal differences",
            1988). The sum stops at an episode's end and at the stream's newest row; ``Batch.steps`` has its length.
        discount: factor in [0, 1] from one reward to the next; ``Batch.discounts`` has it to the power of steps.
        stratified: one draw from each of ``batch_size`` equal shares (lower variance) instead of independent draws.
        replacement: whether a batch may hold a row twice.
        share_successors: keep no ``next_observations`` but read them from the stream's next row: half the memory. Each
            stream's newest observation and each episode's final one take a row's place of the capacity: ``len`` stays
            below it. None: where an observation is a uint8 image.
        frame_stack: observations whose first axis has this length are stacks of frames, oldest first; only the newest
            frame of each is kept, and stacks are put together when sampled. Needs shared successors. 1: no stacks.
            None: for uint8 observations ``(2 or 4, height, width)``.
        seed: in [0, 2**64), decides every draw.
        device: where sampled tensors are, unless ``sample`` says otherwise. On a CUDA device rows and tree are, too:
            draws, priorities and inserts are launched on the current stream and wait for nothing, the same seed draws
            the same rows as on a CPU, and what the device refuses is raised by a later call. Such a buffer is this
            process's alone and is used by one thread at a time. Rows that do not fit there stay on the host, with
            ``sample(device="cuda")``.
        shared: True: memory that forked children share and that ``multiprocessing`` passes to others. A name: other
            processes of this user find it by :meth:`attach`; it is taken away by :meth:`close` or when the process
            that made it ends, and by :meth:`unlink` where that was killed. Linux only.
        path: keep the memory in a new file of this name, for buffers larger than memory; :meth:`attach` opens it again.

    Raises:
        TypeError, ValueError: an argument that does not fit, named. MemoryError, OSError: the memory, the name or the
        file is not to be had (FileExistsError: there is one already); then nothing is left behind.

    Attributes:
        n_step, discount, stratified, replacement: as above; may be set at any time, in this process.
        resident: whether rows and tree are on a device.
    """

    resident = False

    n_step: int
    discount: float
    stratified: bool
    replacement: bool
    _prioritized = False
    _end: Callable[[], Any] | None

    def __init__(
        self,
        capacity: int,
        schema: Described = None,
        *,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        stratified: bool = True,
        replacement: bool = True,
        share_successors: bool | None = None,
        frame_stack: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shared: bool | str | None = None,
        path: Any = None,
    ) -> None:
        options = {
            "capacity": capacity,
            "n_step": n_step,
            "discount": discount,
            "stratified": stratified,
            "replacement": replacement,
            "share_successors": share_successors,
            "frame_stack": frame_stack,
            "seed": seed,
            "device": str(device),
        }
        self._create(make_schema(schema, observation_space, action_space), options, sharing.place_of(shared, path))

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        object.__setattr__(self, name, value if check is None else check(value))

    def __init_subclass__(cls) -> None:
        sharing.allow_multiprocessing(cls)

    # ---- making and opening ----

    def _create(self, schema: Schema, options: dict[str, Any], place: Place) -> None:
        # NumPy's numbers as Python's, since descriptions and saved files have those.
        options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
        capacity = check_integer("capacity", options["capacity"], 1, 2**63 - 1)
        seed = check_integer("seed", options["seed"], 0, 2**64 - 1)
        self.resident = check_device(options["device"]).type == "cuda"
        if self.resident and place.kind != "private":
            raise ValueError(
                f"device is {options['device']!r} and the memory is to be {place.kind}; leave out one of them"
            )
        share = shares_successors(schema, options["share_successors"], options["frame_stack"])
        frames = frames_of(schema, options["frame_stack"], share)
        options |= {"share_successors": share}
        if place.kind != "file":
            available = free_memory(options["device"]) if self.resident else None
            require_memory(capacity, record_bytes(schema, share, frames), available)
        self._configure(schema, options, place)
        meta = sharing.describe(schema, self._prioritized, options)

        def make(kind: str, target: str) -> _core.Replay:
            return _core.Replay(
                fields=self._field_specs(frames),
                observation_fields=len(schema.observations),
                share_successors=share,
                capacity=capacity,
                prioritized=self._prioritized,
                seed=seed,
                kind=kind,
                target=target,
                meta=meta,
                **self._core_priorities(options),
            )

        core: Any = DeviceCore(lambda: make("private", ""), self._device) if self.resident else None
        self._core: _core.Replay = make(place.kind, place.target) if core is None else core
        if place.kind == "named":
            self._end = sharing.take_name_away(self)

    def _core_priorities(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The core's arguments about priorities, checked."""
        return {"priority_exponent": 0.0, "priority_epsilon": 0.0, "default_kind": "given", "default_priority": 1.0}

    def _configure(self, schema: Schema, options: Mapping[str, Any], place: Place) -> None:
        """Everything but the core."""
        self.schema = schema
        self._place = place
        self._end = None
        self._fixed = {name: options[name] for name in ("capacity", "share_successors", "frame_stack", "seed")}
        for name in _CHECKS:
            setattr(self, name, options[name])
        self._device = check_device(options["device"])
        self._bound_by_buffer = False
        self._importance_exponent: ImportanceExponent = 0.0
        if self.n_step > 1:
            self._require_sums()
        self._flat = schema.observation_structure is None and schema.action_structure is None
        self._batches = BatchLayout(schema)

    def _require_sums(self) -> None:
        if self.schema.rewards.dtype.itemsize < 4:
            raise ValueError(f"n_step is above 1; rewards of {self.schema.rewards.dtype} are not summed, float32 are")

    def _field_specs(self, frames: Sequence[int]) -> list[Any]:
        return [(f.name, f.dtype, list(f.shape), k) for f, k in zip(self.schema.fields, frames, strict=True)]

    def _options(self) -> dict[str, Any]:
        """The constructor's options as they are now."""
        changing = {name: getattr(self, name) for name in ("n_step", "discount", "stratified", "replacement")}
        return {**self._fixed, **changing, "device": str(self._device)}

    @classmethod
    def attach(cls, name: str | None = None, *, path: Any = None) -> Any:
        """The buffer that another process made with ``shared=name``, or one that was made with ``path=``.

        It has the schema and the options of its maker; schedules do not travel, here and in pickles. Raises
        ValueError, naming it, where it is no buffer of this kind and version, FileNotFoundError where there is none,
        PermissionError where it is another user's.
        """
        return cls._attach_to(sharing.place_to_attach(name, path), None, None)

    @staticmethod
    def unlink(name: str) -> bool:
        """Take away a name that was given as ``shared=name``; False where there is none.

        For what a maker that was killed left behind: its memory is kept until the machine restarts. Processes that
        have the buffer keep it. Any process of the same user.
        """
        return sharing.unlink(name)

    @classmethod
    def _attach_to(cls, place: Place, descriptor: int | None, options: Mapping[str, Any] | None) -> Any:
        with sharing.naming(place):
            segment = _core.Segment.open(place.kind, place.target, -1 if descriptor is None else descriptor)
            schema, described = sharing.understand(segment.meta(), cls._prioritized)
            found = described if options is None else options
            buffer = cls.__new__(cls)
            buffer._configure(schema, found, place)
            specs = buffer._field_specs(frames_of(schema, found["frame_stack"], found["share_successors"]))
            buffer._core = _core.Replay(specs, len(schema.observations), found["share_successors"], segment)
        return buffer

    def _descriptor(self) -> int:
        return self._core.descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return sharing.reduce_plainly(self)

    def __copy__(self) -> Any:
        sharing.refuse_copy(self)

    def __deepcopy__(self, memo: Any) -> Any:
        sharing.refuse_copy(self)

    def close(self) -> None:
        """Give the memory back, in this process; any later use raises ValueError. A name goes with its maker."""
        if self._end is not None:
            self._end()
        self._core = sharing.CLOSED

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- looking in ----

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

    @property
    def memory_device(self) -> torch.device:
        """Where rows and tree are."""
        return on_device.core_of(self).device if self.resident else CPU

    def _host_core(self) -> _core.Replay:
        """The core, or, where that is on a device, a copy of it in host memory."""
        return on_device.core_of(self).pull() if self.resident else self._core

    @property
    def importance_exponent(self) -> ImportanceExponent:
        """The number or schedule that ``sample`` takes where none is given; 0 on a uniform buffer."""
        return self._importance_exponent

    def stats(self) -> dict[str, Any]:
        """Counts since the buffer was made, by all threads and processes. About 3 us; any thread.

        ``inserts``, ``samples`` (rows), ``updates`` (priorities), ``refused_updates`` (handles whose row was
        overwritten or removed), ``removed``, ``busy_slots`` (tickets given up since their slot was being written),
        ``retries`` (draws repeated), ``saturated_weights``, ``nan_observations`` (rows), ``held`` (observations kept
        for themselves alone); ``mean_sampled_age`` (tickets since a sampled row's own, mean over all sampled rows);
        ``weight_histogram``: (least weight, rows) of each bucket of 3 % in weight that has any;
        ``size``, ``capacity``, ``nbytes``.
        """
        counts: dict[str, Any] = self._core.stats()
        ages = counts.pop("sampled_ages")
        return {
            **counts,
            "mean_sampled_age": ages / counts["samples"] if counts["samples"] else 0.0,
            "weight_histogram": [(weight / 2**20, rows) for weight, rows in self._core.histogram()],
            "size": len(self),
            "capacity": self.capacity,
            "nbytes": self.nbytes,
        }

    def audit(self) -> list[str]:
        """What does not add up, one sentence each; empty when all is well. At rest exact; calls under way show, too.

        A process that was killed leaves at most: its half-written rows as busy slots, and sums and counts off by the
        calls that it was in. O(capacity); any thread.
        """
        return self._core.audit()

    def repair(self) -> int:
        """Mend what :meth:`audit` finds; returns how many weights, sums and counts changed.

        Only at rest: RuntimeError if rows are inserted, updated or removed meanwhile. O(capacity).
        """
        return self._core.repair()

    # ---- rows in ----

    def insert(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminated: Any,
        truncated: Any = None,
        streams: Any = None,
        *,
        priorities: Any = None,
    ) -> Any:
        """Add one transition, or ``n`` with a leading axis on every argument.

        Args:
            observations, next_observations: ``[*shape]`` or ``[n, *shape]``; nested spaces: dicts or tuples of those.
                ``next_observations`` are the true successors, also where the episode ended.
            actions: ``[*shape]`` or ``[n, *shape]``.
            rewards: a finite number or ``[n]``.
            terminated, truncated: bool or ``[n]`` bool. A terminated row has no bootstrap value, a truncated one has.
            streams: which environment each row came from, an integer in [0, 65536) or ``[n]``; rows of one stream
                come in time order. None: all from stream 0. A writer that takes over from one that was cut off within
                an episode needs a stream of its own.
            priorities: a td_error or ``[n]`` for rows that come with theirs, finite and not negative; None: the
                default. Prioritised buffers only.

        Returns:
            int64 handles ``[n]`` (``[1]`` for one row), for :meth:`PrioritizedReplayBuffer.update_priorities`.

        Raises:
            ValueError, TypeError: a shape, dtype, device or value that does not fit; then nothing is inserted.

        Arrays and CPU tensors of the right dtype that are contiguous are taken without a copy; others are converted by
        NumPy's ``same_kind`` rule. Any thread; rows of one stream from one thread at a time.

        On a device tensors that are there do not leave it, if the observations are among them; arrays beside them, as
        rewards, flags and streams, are checked and go over in one copy. A number on the device that does not fit is
        raised by a later call, none of its call's rows is stored, and the handles of that call name none. Where
        successors are shared the handles are a tensor on the device, since only that knows them; ``len`` waits for it.
        """
        if self._flat and type(observations) is np.ndarray and priorities is None and not self.resident:
            handles: Array | None = self._core.insert(
                (observations, actions, rewards, next_observations), terminated, truncated, streams, None
            )
            if handles is not None:
                return handles
        if priorities is not None and not self._prioritized:
            raise ValueError("priorities is given; a uniform buffer has none")
        transition = (observations, actions, rewards, next_observations)
        if self.resident:
            return on_device.insert(self, transition, (terminated, truncated, streams, priorities))
        handles = self._core.insert(*convert_rows(self.schema, *transition, terminated, truncated, streams, priorities))
        if handles is None:
            raise RuntimeError("the core refused arrays that the facade had converted; please report this")
        return handles

    def remove(self, handles: Any) -> int:
        """Take rows out of the draws for good; windows of n steps still pass through them.

        Args:
            handles: int64 ``[n]``, from :meth:`insert` or ``Batch.handles``.

        Returns:
            How many were refused because their row has been overwritten or removed before.

        Raises ValueError for a handle that was never issued; nothing is removed then. Any thread.
        """
        tensor = handle_tensor(handles)
        if tensor.dim() != 1:
            raise ValueError(f"handles has the shape {tuple(tensor.shape)}; it must be (n,)")
        if self.resident:
            return on_device.core_of(self).remove_rows(tensor)
        return self._core.remove(tensor.data_ptr(), tensor.numel())

    # ---- batches out ----

    def sample(
        self,
        batch_size: int,
        *,
        n_step: int | None = None,
        discount: float | None = None,
        importance_exponent: float | None = None,
        stratified: bool | None = None,
        replacement: bool | None = None,
        out: Batch | None = None,
        device: torch.device | str | None = None,
        key: RandomKey | None = None,
        where: torch.Tensor | None = None,
    ) -> Batch:
        """Draw ``batch_size`` rows.

        Args:
            batch_size: at least 1; without replacement at most the rows of positive weight.
            n_step, discount, stratified, replacement: None: the buffer's.
            importance_exponent: at least 0; None: the buffer's. Without effect on a uniform buffer.
            out: a batch that an earlier call returned, to be filled again instead of allocating.
            device: where the tensors shall be; CUDA is reached by an asynchronous copy from pinned memory.
            key: decides the draws, in place of the buffer's own random state, which stays as it is: later batches are
                as if this one had not been drawn, and the statistics do not count it. Not together with ``out``.
            where: one bool on the device of a buffer there, together with ``out``: while False, nothing is drawn or
                counted, and ``out`` stays as it is. So a captured graph leaves out what comes after a step that failed.

        Returns:
            A :class:`~angle_rl.types.Batch` of fresh tensors, or ``out``. Every row was complete and of positive weight
            when it was read; the batch is no snapshot of the buffer.

        Raises:
            ValueError: the buffer is empty, no row has positive weight, there are too few for a batch without
                replacement, or an argument is out of range.

        Any thread. Importance weights are ``(N P(i))**-importance_exponent`` over the batch's largest (Schaul et al.,
        "Prioritized experience replay", 2016, section 3.4).
        """
        arguments = self._sample_arguments(batch_size, n_step, discount, importance_exponent, stratified, replacement)
        if key is not None and out is not None:
            raise ValueError("key and out are both given; a batch of a key is a fresh one")
        if self.resident:
            return on_device.sample(self, arguments, out, device, key, where)
        if where is not None:
            raise ValueError("where is given; only buffers on a device look at it there, elsewhere leave the call out")
        if key is not None:
            place = self._device if device is None else check_device(device)
            drawn = map(_to_tensor, self._core.sample_by_key(*arguments, key.value))
            return self._batches.assemble([tensor.to(place) for tensor in drawn])
        if device is not None or (out is None and self._device.type != "cpu"):
            return self._sample_to(self._device if device is None else check_device(device), arguments, out)
        if out is None:
            return self._batches.assemble(list(map(_to_tensor, self._core.sample_fresh(*arguments))))
        leaves = self._batches.leaves(out)
        if not self._core.sample_into(*arguments, leaves):
            addresses = self._batches.check_out(leaves, arguments[0])
            self._core.remember(arguments[0], leaves, torch.Tensor.data_ptr, torch.Tensor.numel)
            self._core.sample(*arguments, addresses)
        return out

    def _sample_arguments(
        self,
        n: Any,
        n_step: Any = None,
        discount: Any = None,
        importance_exponent: Any = None,
        stratified: bool | None = None,
        replacement: bool | None = None,
    ) -> tuple[int, int, float, float, int]:
        """What the core takes, checked."""
        if type(n) is not int or not 0 < n < 2**31:
            n = check_integer("batch_size", n, 1, 2**31 - 1)
        if n_step is None:
            n_step = self.n_step
        if type(n_step) is not int or n_step != 1:
            n_step = check_integer("n_step", n_step, 1, _MOST_STEPS)
            if n_step > 1:
                self._require_sums()
        discount = self.discount if discount is None else check_number("discount", discount, 0.0, 1.0)
        if importance_exponent is None:
            exponent = self._importance_exponent
            importance_exponent = exponent if isinstance(exponent, float) else self._scheduled(exponent)
        else:
            importance_exponent = check_number("importance_exponent", importance_exponent, 0.0)
        flags = _STRATIFIED if (self.stratified if stratified is None else check_flag("stratified", stratified)) else 0
        if self.replacement if replacement is None else check_flag("replacement", replacement):
            flags |= REPLACEMENT
        if self._bound_by_buffer:
            flags |= _BOUND_BY_BUFFER
        return n, n_step, discount, importance_exponent, flags

    def _scheduled(self, schedule: Callable[[int], float]) -> float:
        inserts = on_device.core_of(self).inserts if self.resident else self._core.stats()["inserts"]
        return check_number("importance_exponent", float(schedule(inserts)), 0.0)

    def prefetch(
        self,
        batch_size: int,
        depth: int = 2,
        *,
        n_step: int | None = None,
        discount: float | None = None,
        importance_exponent: float | None = None,
        stratified: bool | None = None,
        replacement: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Prefetcher:
        """Draw batches ahead in a thread: an iterator that keeps ``depth`` of them ready, in [1, 1024].

        The other arguments are those of :meth:`sample`; what is left out, and a schedule, is looked up when a batch is
        asked for. ``stats`` counts a batch as sampled when it is drawn. See :class:`Prefetcher` for order, age, closing
        and the thread rule.

        Raises ValueError, TypeError for an argument out of range; what ``sample`` raises comes out of ``next``.
        """
        depth = check_integer("depth", depth, 1, 1024)
        arguments = (batch_size, n_step, discount, importance_exponent, stratified, replacement)
        self._sample_arguments(*arguments)
        if self.resident:
            raise ValueError("the buffer is on a device, where draws are launched ahead by themselves; use sample")
        return Prefetcher(self, depth, self._device if device is None else check_device(device), arguments)

    def _blank(self, n: int, pinned: bool) -> list[torch.Tensor]:
        """Tensors for a batch, not filled yet."""
        if pinned:
            return [torch.empty(size, dtype=dtype, pin_memory=True) for size, dtype in self._batches.sizes(n)]
        return list(map(_to_tensor, self._core.blank(n)))

    def _sample_to(
        self, device: torch.device, arguments: tuple[int, int, float, float, int], out: Batch | None
    ) -> Batch:
        if out is not None:
            raise ValueError("out and device are both given; out is filled where it is, so leave one of them out")
        pinned = device.type == "cuda"
        tensors = [
            torch.empty(size, dtype=dtype, pin_memory=pinned) for size, dtype in self._batches.sizes(arguments[0])
        ]
        self._core.sample(*arguments, tuple(map(torch.Tensor.data_ptr, tensors)))
        return self._batches.assemble([t.to(device, non_blocking=True) for t in tensors])

    # ---- state ----

    export_state = saving.export_state
    import_state = saving.import_state
    refresh = on_device.refresh
    launched = on_device.launched
    save = saving.save
    load = classmethod(saving.load)
    export_arrays = export.export_arrays
    insert_arrays = export.insert_arrays
    save_npz = export.save_npz
    insert_npz = export.insert_npz


sharing.allow_multiprocessing(ReplayBuffer)
