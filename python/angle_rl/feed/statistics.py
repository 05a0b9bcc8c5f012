"""Running mean and variance of rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from angle_rl.types import Array


class RunningStatistics:
    """Mean and variance of all rows counted so far, in float64, by the pairwise update of Chan, Golub and LeVeque
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979): what is added is the mean
    and the sum of squared deviations of the new rows, never a sum of squares. One thread.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean: Array = np.zeros(shape)
        self._deviations: Array = np.zeros(shape)  # sum of squares about the mean

    @property
    def variance(self) -> Array:
        """Of the population, ``[*shape]``; ones before the second row, which is the first to say anything."""
        return self._deviations / self.count if self.count > 1 else np.ones_like(self.mean)

    def count_rows(self, rows: Array) -> None:
        """Count ``rows`` ``[n, *shape]``, which may be none. A row that is not finite throughout is left out."""
        rows = np.asarray(rows, dtype=np.float64)
        rows = rows[np.isfinite(rows).reshape(len(rows), -1).all(axis=1)] if len(rows) else rows
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(axis=0)
        difference, total = mean - self.mean, self.count + n
        self._deviations = (
            self._deviations + np.square(rows - mean).sum(axis=0) + np.square(difference) * (self.count * n / total)
        )
        self.mean = self.mean + difference * (n / total)
        self.count = total

    def export_state(self) -> dict[str, Array]:
        """Copies of ``count`` [], ``mean`` and ``deviations`` [*shape]."""
        return {
            "count": np.array(self.count, dtype=np.int64),
            "mean": np.array(self.mean),
            "deviations": np.array(self._deviations),
        }

    def check_state(self, arrays: Mapping[str, Any], name: str) -> None:
        """ValueError, with ``name`` before it, where ``arrays`` is not what `export_state` of such a one gave."""
        for key, own in self.export_state().items():
            if key not in arrays:
                raise ValueError(f"{name}.{key} is missing; the feed that was saved kept no such statistics")
            found = np.asarray(arrays[key])
            if found.shape != own.shape or found.dtype != own.dtype:
                raise ValueError(
                    f"{name}.{key} is {found.dtype} {list(found.shape)}; {own.dtype} {list(own.shape)} is needed"
                )
            if not np.isfinite(found).all() or (key != "mean" and (found < 0).any()):
                raise ValueError(f"{name}.{key} is negative or not finite; it was not written by this library")

    def import_state(self, arrays: Mapping[str, Any]) -> None:
        """Put back what `export_state` gave and `check_state` passed."""
        self.count = int(np.asarray(arrays["count"]))
        self.mean = np.asarray(arrays["mean"]).copy()
        self._deviations = np.asarray(arrays["deviations"]).copy()
