"""Drawing without replacement: one row after the other, each by its weight among those left."""

from __future__ import annotations

import numpy as np


def set_probabilities(weights: list[float], draws: int) -> dict[frozenset[int], float]:
    """The probability of each set of rows after ``draws`` draws, by following every order."""
    sets = {frozenset[int](): 1.0}
    total = float(np.sum(weights, dtype=np.float64))
    for _ in range(draws):
        after: dict[frozenset[int], float] = {}
        for taken, probability in sets.items():
            left = total - sum(weights[row] for row in taken)
            for row, weight in enumerate(weights):
                if row not in taken and weight > 0:
                    grown = taken | {row}
                    after[grown] = after.get(grown, 0.0) + probability * weight / left
        sets = after
    return sets
