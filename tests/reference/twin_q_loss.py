"""The critics' weighted regression in float64."""

from __future__ import annotations

import numpy as np


def twin_q_loss(q, td_target, importance_weights=None, huber_delta=None, critic_weights=None):
    """Loss, td error ``[batch]``, and the loss's gradient by q ``[critics, batch]``."""
    q = np.asarray(q, np.float64)
    batch = q.shape[1]
    weights = np.ones(batch) if importance_weights is None else np.asarray(importance_weights, np.float64)
    own = np.ones((len(q), 1)) if critic_weights is None else np.asarray(critic_weights, np.float64)[:, None]
    difference = q - np.asarray(td_target, np.float64)
    size = np.abs(difference)
    if huber_delta is None:
        error, slope = difference**2, 2.0 * difference
    else:
        error = np.where(size <= huber_delta, difference**2 / 2, huber_delta * (size - huber_delta / 2))
        slope = np.clip(difference, -huber_delta, huber_delta)
    loss = np.mean(weights * (own * error).sum(0))
    return loss, size.mean(0), own * weights * slope / batch
