"""The prioritised buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from angle_rl.replay.arrays import check_number, host
from angle_rl.replay.buffer import ImportanceExponent, ReplayBuffer
from angle_rl.schema import Schema


class PrioritizedReplayBuffer(ReplayBuffer):
    """Prioritised replay (Schaul et al., "Prioritized experience replay", 2016): ``P(i) = w_i / sum(w)`` with
    ``w = (td_error + priority_epsilon) ** priority_exponent`` in fixed point (unit 2**-20).

    The weights are integers and their sums exact: at rest, whatever came before, rows are drawn with exactly their
    share. A row's priority can never land on the row that overwrote it. New rows take the largest priority computed by
    :meth:`update_priorities` for a row that still lives (at most 3.2 % high in weight), 1 before any update.

    Args beside those of :class:`ReplayBuffer`:
        priority_exponent: at least 0; 0 draws uniformly.
        importance_exponent: at least 0, or a schedule ``f(rows inserted so far) -> number``.
        priority_epsilon: at least 0, added to every td_error.
    """

    _prioritized = True

    def __init__(
        self,
        capacity: int,
        schema: Mapping[str, Any] | Sequence[Any] | Schema | None = None,
        *,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        priority_exponent: float = 0.6,
        importance_exponent: ImportanceExponent = 0.4,
        priority_epsilon: float = 1e-6,
        discount: float = 0.99,
        stratified: bool = True,
        seed: int = 0,
    ) -> None:
        self.priority_exponent = check_number("priority_exponent", priority_exponent, 0.0)
        self.priority_epsilon = check_number("priority_epsilon", priority_epsilon, 0.0)
        if not callable(importance_exponent):
            importance_exponent = check_number("importance_exponent", importance_exponent, 0.0)
        self._build(
            capacity,
            schema,
            observation_space,
            action_space,
            discount,
            stratified,
            seed,
            self.priority_exponent,
            self.priority_epsilon,
        )
        self._importance_exponent = importance_exponent

    def update_priorities(self, handles: Any, td_errors: Any) -> int:
        """Give rows new priorities.

        Args:
            handles: int64 ``[n]``, from :meth:`insert` or ``Batch.handles``. Of equal handles the last one wins.
            td_errors: float32 or float64 ``[n]``, finite and not negative: |target - estimate|, mean over critics.

        Returns:
            How many handles were refused because their row has been overwritten since.

        Raises:
            ValueError: a NaN, infinite or negative td_error (the first bad index is named), a handle that was never
                issued, unequal lengths. Nothing is changed then.

        Arrays and CPU tensors that are contiguous go in without a copy; CUDA tensors are copied to the host.
        Any thread.
        """
        if not (
            type(handles) is torch.Tensor
            and handles.dtype is torch.int64
            and handles.is_cpu
            and handles.is_contiguous()
        ):
            handles = host("handles", handles)
            if not np.can_cast(handles.numpy().dtype, np.int64, "same_kind") and handles.numel() > 0:
                raise TypeError(f"handles has the dtype {handles.dtype}; handles are int64")
            handles = handles.to(torch.int64)
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
