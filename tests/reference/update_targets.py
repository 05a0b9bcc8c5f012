"""The exponential average of parameters in float64."""

from __future__ import annotations

import numpy as np


def update_targets(targets, online, tau):
    return [
        tau * np.asarray(source, np.float64) + (1.0 - tau) * np.asarray(target, np.float64)
        for target, source in zip(targets, online, strict=True)
    ]
