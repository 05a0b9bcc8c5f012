"""The soft clipped double-Q target in float64."""

from __future__ import annotations

import numpy as np


def twin_q_target(rewards, discounts, next_q, next_log_prob=None, entropy_coefficient=0.0):
    value = np.min(np.asarray(next_q, np.float64), axis=0)
    if next_log_prob is not None:
        value = value - entropy_coefficient * np.asarray(next_log_prob, np.float64)
    return np.asarray(rewards, np.float64) + np.asarray(discounts, np.float64) * value
