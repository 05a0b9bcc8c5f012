"""Prioritised replay in NumPy float64, straight from the equations: a ring of rows and a vector of weights."""

from __future__ import annotations

import numpy as np

UNIT = 2.0**20


def fixed_weight(td_error: np.ndarray, exponent: float, epsilon: float, weight_bits: int = 40) -> np.ndarray:
    """``(td_error + epsilon) ** exponent`` in units of 2**-20, rounded; a positive weight is at least one unit.

    Priorities are kept in float32; a positive one is never rounded to 0."""
    priority = np.asarray(td_error, np.float32).astype(np.float64)
    priority = np.where((np.asarray(td_error) > 0) & (priority == 0), 2.0**-149, priority)
    exact = (priority + epsilon) ** exponent * UNIT
    rounded = np.floor(np.minimum(exact, 2.0**weight_bits - 1) + 0.5)
    return np.where((exact > 0) & (rounded == 0), 1, rounded).astype(np.int64)


def importance_weights(weights: np.ndarray, total: float, rows: int, exponent: float) -> np.ndarray:
    """``(N P)**-exponent`` over its largest (Schaul et al., 2016)."""
    raw = (rows * weights / total) ** -exponent
    return raw / raw.max()


class Model:
    """What the buffer should hold after a sequence of inserts and updates by one thread."""

    def __init__(self, capacity: int, exponent: float, epsilon: float) -> None:
        self.capacity, self.exponent, self.epsilon = capacity, exponent, epsilon
        self.tickets = 0
        self.values: dict[int, float] = {}
        self.priorities: dict[int, float] = {}  # computed ones only

    def insert(self, values: list[float]) -> list[int]:
        handles = []
        for value in values:
            handles.append(self.tickets)
            self.values[self.tickets] = value
            self.values.pop(self.tickets - self.capacity, None)
            self.priorities.pop(self.tickets - self.capacity, None)
            self.tickets += 1
        return handles

    def update(self, handles: list[int], td_errors: list[float]) -> int:
        refused = 0
        for handle, td_error in zip(handles, td_errors, strict=True):
            if handle in self.values:
                self.priorities[handle] = td_error
            else:
                refused += 1
        return refused
