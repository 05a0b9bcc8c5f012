"""
Device kernels of angle_rl. Use them through angle_rl.replay and angle_rl.ops.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['FEW_HANDLES', 'FLAG_WORDS', 'LOSS_ROWS', 'MOST_AT_ONCE', 'Replay', 'first_scratch', 'philox_normal_f32', 'philox_normal_f64', 'philox_uniform', 'squashed_gaussian', 'squashed_gaussian_gradient', 'twin_q_loss', 'twin_q_target', 'update_targets']
class Replay:
    """
    Launches the replay's kernels. angle_rl.replay is its public face.
    """
    def __init__(self, layout: dict[str, typing.Any], segment: typing.SupportsInt | typing.SupportsIndex, scratch: typing.SupportsInt | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def insert(self, columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], n: typing.SupportsInt | typing.SupportsIndex, first_ticket: typing.SupportsInt | typing.SupportsIndex, terminated: typing.SupportsInt | typing.SupportsIndex, truncated: typing.SupportsInt | typing.SupportsIndex, streams: typing.SupportsInt | typing.SupportsIndex, next: typing.SupportsInt | typing.SupportsIndex, last: typing.SupportsInt | typing.SupportsIndex, priorities: typing.SupportsInt | typing.SupportsIndex, check_rewards: bool, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def insert_sharing(self, columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], n: typing.SupportsInt | typing.SupportsIndex, terminated: typing.SupportsInt | typing.SupportsIndex, truncated: typing.SupportsInt | typing.SupportsIndex, streams: typing.SupportsInt | typing.SupportsIndex, previous: typing.SupportsInt | typing.SupportsIndex, priorities: typing.SupportsInt | typing.SupportsIndex, check_rewards: bool, handles: typing.SupportsInt | typing.SupportsIndex, work: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def remove(self, handles: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, refused: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def reweigh(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def sample(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], drawn: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, how: typing.SupportsInt | typing.SupportsIndex, key: typing.SupportsInt | typing.SupportsIndex, live: typing.SupportsInt | typing.SupportsIndex, chosen: typing.SupportsInt | typing.SupportsIndex, taken: typing.SupportsInt | typing.SupportsIndex, taken_places: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, where: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def update(self, handles: typing.SupportsInt | typing.SupportsIndex, td_errors: typing.SupportsInt | typing.SupportsIndex, is_double: bool, n: typing.SupportsInt | typing.SupportsIndex, claims: typing.SupportsInt | typing.SupportsIndex, claim_count: typing.SupportsInt | typing.SupportsIndex, refused: typing.SupportsInt | typing.SupportsIndex, where: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def work_bytes(self, n: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
def first_scratch(bucket_priorities: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]) -> bytes:
    ...
def philox_normal_f32(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fill n float32 at address `out` with the standard normals of the 64-bit key at address `key`.
    """
def philox_normal_f64(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    The same in float64.
    """
def philox_uniform(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fill n float64 at address `out` with the uniforms in [0, 1) of the 64-bit key at address `key`.
    """
def squashed_gaussian(mean: typing.SupportsInt | typing.SupportsIndex, log_std: typing.SupportsInt | typing.SupportsIndex, noise: typing.SupportsInt | typing.SupportsIndex, actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, log_prob: typing.SupportsInt | typing.SupportsIndex, kinds: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Actions tanh(mean + exp(log_std) * noise) and their log-density.
    """
def squashed_gaussian_gradient(actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, actions_gradient: typing.SupportsInt | typing.SupportsIndex, log_prob_gradient: typing.SupportsInt | typing.SupportsIndex, mean_gradient: typing.SupportsInt | typing.SupportsIndex, log_std_gradient: typing.SupportsInt | typing.SupportsIndex, kinds: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Gradients by mean and log_std.
    """
def twin_q_loss(q: typing.SupportsInt | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, importance_weights: typing.SupportsInt | typing.SupportsIndex, loss: typing.SupportsInt | typing.SupportsIndex, td_error: typing.SupportsInt | typing.SupportsIndex, q_gradient: typing.SupportsInt | typing.SupportsIndex, kinds: typing.SupportsInt | typing.SupportsIndex, sums: typing.SupportsInt | typing.SupportsIndex, huber_delta: typing.SupportsFloat | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Loss, |td error| and the loss's gradient by q; huber_delta 0: squared error. sums: one float64 for every LOSS_ROWS rows or part of them, 0 where these are one.
    """
def twin_q_target(rewards: typing.SupportsInt | typing.SupportsIndex, discounts: typing.SupportsInt | typing.SupportsIndex, next_q: typing.SupportsInt | typing.SupportsIndex, next_log_prob: typing.SupportsInt | typing.SupportsIndex, entropy_coefficient: typing.SupportsInt | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, kinds: typing.SupportsInt | typing.SupportsIndex, coefficient: typing.SupportsFloat | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    rewards + discounts * (min over critics of next_q - entropy term); `coefficient` where entropy_coefficient is 0.
    """
def update_targets(targets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], online: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], kind: typing.SupportsInt | typing.SupportsIndex, tau: typing.SupportsFloat | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    target = tau * online + (1 - tau) * target, for every array of the lists.
    """
FEW_HANDLES: int = 1024
FLAG_WORDS: int = 4
LOSS_ROWS: int = 4096
MOST_AT_ONCE: int = 16777216
__version__: str = '0.1.0'
