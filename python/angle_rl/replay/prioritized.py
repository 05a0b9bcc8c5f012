"""The prioritised buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import torch

from angle_rl.replay import resident as on_device
from angle_rl.replay import sharing
from angle_rl.replay.arrays import check_number, handle_tensor, host
from angle_rl.replay.buffer import Described, ImportanceExponent, ReplayBuffer
from angle_rl.schema import Schema, make_schema

DefaultPriority: TypeAlias = "Literal['live_maximum', 'historic_maximum'] | float"


class PrioritizedReplayBuffer(ReplayBuffer):
    """Prioritised replay (Schaul et al., "Prioritized experience replay", 2016): ``P(i) = w_i / sum(w)`` with
    ``w = (td_error + priority_epsilon) ** priority_exponent`` in fixed point (unit 2**-20).

    The weights are integers and their sums exact: at rest, whatever came before, rows are drawn with exactly their
    share. A row's priority can never land on the row that overwrote it. Priorities are kept as float32.

    Args beside those of :class:`ReplayBuffer`:
        priority_exponent: at least 0; 0 draws uniformly. Setting the attribute weighs every row anew.
        importance_exponent: at least 0, or a schedule ``f(rows inserted so far) -> number``. May be set at any time.
        priority_epsilon: at least 0, added to every td_error.
        default_priority: of new rows that come without one. "live_maximum": the largest priority given for a row that
            still lives (at most 3.2 % high in weight), so that an outlier is forgotten with its row;
            "historic_maximum": the largest ever given; both 1 before any. Or a number, at least 0.
        importance_bound: what importance weights are divided by: the largest of the "batch", or the largest that the
            "buffer" could give (at most 3.2 % ** importance_exponent high).
    """

    _prioritized = True

    def __init__(
        self,
        capacity: int,
        schema: Described = None,
        *,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        priority_exponent: float = 0.6,
        importance_exponent: ImportanceExponent = 0.4,
        priority_epsilon: float = 1e-6,
        default_priority: DefaultPriority = "live_maximum",
        importance_bound: Literal["batch", "buffer"] = "batch",
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
            "priority_exponent": priority_exponent,
            "importance_exponent": importance_exponent,
            "priority_epsilon": priority_epsilon,
            "default_priority": default_priority,
            "importance_bound": importance_bound,
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

    def _core_priorities(self, options: Mapping[str, Any]) -> dict[str, Any]:
        default = options["default_priority"]
        if isinstance(default, str):
            if default not in ("live_maximum", "historic_maximum"):
                raise ValueError(
                    f"default_priority is {default!r}; it must be 'live_maximum', 'historic_maximum' or a number"
                )
        else:
            default = check_number("default_priority", default, 0.0)
        return {
            "priority_exponent": check_number("priority_exponent", options["priority_exponent"], 0.0),
            "priority_epsilon": check_number("priority_epsilon", options["priority_epsilon"], 0.0),
            "default_kind": default if isinstance(default, str) else "given",
            "default_priority": 1.0 if isinstance(default, str) else default,
        }

    def _configure(self, schema: Schema, options: Mapping[str, Any], place: sharing.Place) -> None:
        self._core_priorities(options)  # checked before anything is made
        super()._configure(schema, options, place)
        bound = options["importance_bound"]
        if bound not in ("batch", "buffer"):
            raise ValueError(f"importance_bound is {bound!r}; it must be 'batch' or 'buffer'")
        self._bound_by_buffer = bound == "buffer"
        self._fixed |= {name: options[name] for name in ("priority_epsilon", "default_priority", "importance_bound")}
        self.importance_exponent = options.get("importance_exponent", self._missing_schedule)

    @staticmethod
    def _missing_schedule(inserts: int) -> float:
        raise ValueError(
            "importance_exponent is a schedule in the process that this buffer came from, and schedules do not travel; "
            "set it here"
        )

    def _options(self) -> dict[str, Any]:
        exponent = self._importance_exponent
        own = {} if exponent is PrioritizedReplayBuffer._missing_schedule else {"importance_exponent": exponent}
        return {**super()._options(), **own, "priority_exponent": self.priority_exponent}

    @property
    def priority_epsilon(self) -> float:
        """Added to every td_error."""
        return float(self._fixed["priority_epsilon"])

    @property
    def priority_exponent(self) -> float:
        """The exponent that weights follow. Setting it weighs every row anew by its kept priority, in all processes.

        O(capacity), about 50 ns a row; any thread, and others go on meanwhile.
        """
        return self._core.priority_exponent()

    @priority_exponent.setter
    def priority_exponent(self, exponent: float) -> None:
        self._core.set_priority_exponent(check_number("priority_exponent", exponent, 0.0))

    @property
    def importance_exponent(self) -> ImportanceExponent:
        """The number or schedule that ``sample`` takes where none is given, in this process."""
        return self._importance_exponent

    @importance_exponent.setter
    def importance_exponent(self, exponent: ImportanceExponent) -> None:
        if not callable(exponent):
            exponent = check_number("importance_exponent", exponent, 0.0)
        self._importance_exponent = exponent

    def update_priorities(self, handles: Any, td_errors: Any, *, where: torch.Tensor | None = None) -> Any:
        """Give rows new priorities.

        Args:
            handles: int64 ``[n]``, from :meth:`insert` or ``Batch.handles``. Of equal handles the last one wins.
            td_errors: float32 or float64 ``[n]``, finite and not negative: |target - estimate|, mean over critics.
            where: one bool on the device of a buffer there: while False, nothing is looked at or changed. So a captured
                graph can leave out an update that was not finite.

        Returns:
            How many handles were refused because their row has been overwritten or removed since: an int, or, of a
            buffer on a device, a tensor of one int64 there, so that nobody waits for it.

        Raises:
            ValueError: a NaN, infinite or negative td_error (the first bad index is named), a handle that was never
                issued, unequal lengths. Nothing is changed then.

        Arrays and CPU tensors that are contiguous go in without a copy; CUDA tensors are copied to the host.
        Any thread. On a device the values are looked at there, and what does not fit is raised by a later call.
        """
        if self.resident:
            return on_device.update_priorities(self, handles, td_errors, where)
        if where is not None:
            raise ValueError("where is given; only buffers on a device look at it there, elsewhere leave the call out")
        handles = handle_tensor(handles)
        if not (
            type(td_errors) is torch.Tensor
            and td_errors.dtype is torch.float32
            and td_errors.is_cpu
            and td_errors.is_contiguous()
        ):
            td_errors = host("td_errors", td_errors)
            if td_errors.dtype not in (torch.float32, torch.float64):
                if td_errors.dtype.is_complex or td_errors.dtype == torch.bool:
                    raise TypeError(f"td_errors has the dtype {td_errors.dtype}; td_errors are real numbers")
                td_errors = td_errors.to(torch.float64)
        if handles.dim() != 1 or handles.shape != td_errors.shape:
            raise ValueError(
                f"handles has the shape {tuple(handles.shape)} and td_errors {tuple(td_errors.shape)}; both "
                "must be (n,)"
            )
        return self._core.update(
            handles.data_ptr(), td_errors.data_ptr(), td_errors.dtype == torch.float64, handles.numel()
        )
