"""
Device kernels of angle_rl. Use them through angle_rl.replay and angle_rl.ops.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['FEW_HANDLES', 'FLAG_WORDS', 'MOST_AT_ONCE', 'Replay', 'first_scratch', 'philox_normal_f32', 'philox_normal_f64', 'philox_uniform']
class Replay:
    """
    Launches the replay's kernels. angle_rl.replay is its public face.
    """
    def __init__(self, layout: dict[str, typing.Any], segment: typing.SupportsInt | typing.SupportsIndex, scratch: typing.SupportsInt | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def insert(self, columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], n: typing.SupportsInt | typing.SupportsIndex, first_ticket: typing.SupportsInt | typing.SupportsIndex, terminated: typing.SupportsInt | typing.SupportsIndex, truncated: typing.SupportsInt | typing.SupportsIndex, streams: typing.SupportsInt | typing.SupportsIndex, next: typing.SupportsInt | typing.SupportsIndex, last: typing.SupportsInt | typing.SupportsIndex, priorities: typing.SupportsInt | typing.SupportsIndex, check_rewards: bool, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def remove(self, handles: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, refused: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def reweigh(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def sample(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], drawn: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, how: typing.SupportsInt | typing.SupportsIndex, key: typing.SupportsInt | typing.SupportsIndex, live: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def update(self, handles: typing.SupportsInt | typing.SupportsIndex, td_errors: typing.SupportsInt | typing.SupportsIndex, is_double: bool, n: typing.SupportsInt | typing.SupportsIndex, claims: typing.SupportsInt | typing.SupportsIndex, claim_count: typing.SupportsInt | typing.SupportsIndex, refused: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
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
FEW_HANDLES: int = 1024
FLAG_WORDS: int = 4
MOST_AT_ONCE: int = 16777216
__version__: str = '0.1.0'
