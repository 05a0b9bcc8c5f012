"""The tanh-squashed Gaussian in float64, by the change of variables as it is defined."""

from __future__ import annotations

import numpy as np


def squashed_gaussian(mean, log_std, noise):
    """Actions and log_prob."""
    mean, log_std, noise = (np.asarray(array, np.float64) for array in (mean, log_std, noise))
    std = np.exp(log_std)
    u = mean + std * noise
    normal = -0.5 * noise**2 - np.log(std * np.sqrt(2.0 * np.pi))
    log_slope = -2.0 * (np.logaddexp(u, -u) - np.log(2.0))  # log of 1 / cosh(u)^2 = 1 - tanh(u)^2
    return np.tanh(u), (normal - log_slope).sum(-1)
