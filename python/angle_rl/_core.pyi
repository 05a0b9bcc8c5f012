"""
Compiled core of angle_rl: replay and fused operations. Use it through angle_rl.replay and angle_rl.ops.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
import typing_extensions
__all__: list[str] = ['ActingNetwork', 'CopyFloor', 'Learner', 'MAX_STREAMS', 'Prefetch', 'ProductFloor', 'RaceOptions', 'Replay', 'ReplayFloor', 'Segment', 'SmallReplayFloor', 'available_isas', 'has_bfloat16', 'isa', 'most_acting_rows', 'philox_normal_f32', 'philox_normal_f64', 'philox_split', 'philox_uniform', 'squashed_gaussian_f32', 'squashed_gaussian_f64', 'squashed_gaussian_gradient_f32', 'squashed_gaussian_gradient_f64', 'twin_q_loss_f32', 'twin_q_loss_f64', 'twin_q_target_f32', 'twin_q_target_f64', 'update_targets_f32', 'update_targets_f64']
class RaceOptions:
    """
    Threads of Replay.race: `inserters` insert row after row, `learners` sample `batch` rows and update their priorities, for `seconds`; every `check_every`-th batch is checked. The rows are HalfCheetah's, numbered from `first_row`; the inserters' streams from `first_stream`.
    """
    def __init__(self, *, inserters: typing.SupportsInt | typing.SupportsIndex = 1, learners: typing.SupportsInt | typing.SupportsIndex = 1, batch: typing.SupportsInt | typing.SupportsIndex = 256, seconds: typing.SupportsFloat | typing.SupportsIndex = 1.0, first_row: typing.SupportsInt | typing.SupportsIndex = 0, first_stream: typing.SupportsInt | typing.SupportsIndex = 0, check_every: typing.SupportsInt | typing.SupportsIndex = 256) -> None:
        ...
class Segment:
    """
    Memory that another process made a replay in.
    """
    @staticmethod
    def open(kind: str, target: str, descriptor: typing.SupportsInt | typing.SupportsIndex) -> Segment:
        ...
    @staticmethod
    def unlink(name: str) -> bool:
        ...
    def meta(self) -> str:
        ...
class Replay:
    """
    The compiled replay. angle_rl.replay is its public face.
    """
    @typing.overload
    def __init__(self, fields: collections.abc.Sequence[tuple[str, numpy.dtype[typing.Any], collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], typing.SupportsInt | typing.SupportsIndex]], observation_fields: typing.SupportsInt | typing.SupportsIndex, share_successors: bool, capacity: typing.SupportsInt | typing.SupportsIndex, prioritized: bool, priority_exponent: typing.SupportsFloat | typing.SupportsIndex, priority_epsilon: typing.SupportsFloat | typing.SupportsIndex, default_kind: str, default_priority: typing.SupportsFloat | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, kind: str, target: str, meta: str) -> None:
        ...
    @typing.overload
    def __init__(self, fields: collections.abc.Sequence[tuple[str, numpy.dtype[typing.Any], collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], typing.SupportsInt | typing.SupportsIndex]], observation_fields: typing.SupportsInt | typing.SupportsIndex, share_successors: bool, segment: Segment) -> None:
        ...
    def adopt(self, header: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8], slots: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def audit(self) -> list[str]:
        ...
    def blank(self, n: typing.SupportsInt | typing.SupportsIndex) -> tuple[typing_extensions.CapsuleType, ...]:
        ...
    def bucket_priorities(self, exponent: typing.SupportsFloat | typing.SupportsIndex) -> list[float]:
        ...
    def default_weight(self) -> int:
        ...
    def histogram(self) -> list[tuple[int, int]]:
        ...
    def insert(self, columns: tuple[typing.Any, ...], terminated: typing.Any, truncated: typing.Any, streams: typing.Any, priorities: typing.Any) -> typing.Any:
        ...
    def inserts_are_done(self) -> bool:
        ...
    def layout(self) -> dict[str, typing.Any]:
        ...
    def memory(self) -> numpy.typing.NDArray[numpy.uint8]:
        ...
    def parts(self, slots: typing.SupportsInt | typing.SupportsIndex | None = None) -> dict[str, numpy.typing.NDArray[numpy.uint8]]:
        ...
    def priority_exponent(self) -> float:
        ...
    def race(self, options: RaceOptions) -> dict[str, typing.Any]:
        """
        Lets native threads loose on the buffer; see RaceOptions.
        """
    def remember(self, n: typing.SupportsInt | typing.SupportsIndex, tensors: tuple[typing.Any, ...], data_ptr: typing.Any, numel: typing.Any) -> None:
        ...
    def remove(self, handles: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    def repair(self) -> int:
        ...
    def restore(self, header: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8], index: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8], records: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8]) -> None:
        ...
    def rows(self, first: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex) -> list[numpy.ndarray[typing.Any, numpy.dtype[typing.Any]]]:
        ...
    def sample(self, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex, addresses: tuple[int, ...]) -> None:
        ...
    def sample_by_key(self, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex, key: typing.SupportsInt | typing.SupportsIndex) -> tuple[typing_extensions.CapsuleType, ...]:
        ...
    def sample_fresh(self, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex) -> tuple[typing_extensions.CapsuleType, ...]:
        ...
    def sample_into(self, n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex, tensors: typing.Any) -> bool:
        ...
    def set_priority_exponent(self, exponent: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def stats(self) -> dict[str, int]:
        ...
    def sums_are_exact(self) -> bool:
        ...
    def update(self, handles: typing.SupportsInt | typing.SupportsIndex, td_errors: typing.SupportsInt | typing.SupportsIndex, is_double: bool, n: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    def weights(self) -> numpy.typing.NDArray[numpy.int64]:
        ...
    @property
    def capacity(self) -> int:
        ...
    @property
    def descriptor(self) -> int:
        ...
    @property
    def nbytes(self) -> int:
        ...
    @property
    def next_ticket(self) -> int:
        ...
    @property
    def pooled_bytes(self) -> int:
        ...
    @property
    def record_bytes(self) -> int:
        ...
    @property
    def size(self) -> int:
        ...
    @property
    def stack(self) -> int:
        ...
class Prefetch:
    """
    A thread that draws ahead. angle_rl.replay.Prefetcher is its public face.
    """
    def __init__(self, replay: Replay) -> None:
        ...
    def stop(self) -> None:
        ...
    def submit(self, name: typing.SupportsInt | typing.SupportsIndex, addresses: tuple[int, ...], n: typing.SupportsInt | typing.SupportsIndex, n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def take(self) -> int | None:
        ...
class ReplayFloor:
    """
    The machine's floor under the replay, for benchmarks: each method runs its work `iterations` times and returns the seconds taken. One thread only.
    """
    def __init__(self, capacity: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def cycle(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def indices(self) -> numpy.typing.NDArray[numpy.uint32]:
        """
        uint32 rows of the last sample.
        """
    def insert(self, rows: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def learn(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def observations(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        float32 observations of the last sample, one row after another.
        """
    def record(self, row: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        First number of a stored observation.
        """
    def sample(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def sums_agree(self) -> bool:
        """
        Whether every sum is its children's.
        """
    def total(self) -> int:
        """
        Sum of the weights.
        """
    def uniform_sample(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def update(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def weight(self, row: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Weight of a row.
        """
class SmallReplayFloor:
    """
    The same with rows of 32 bytes.
    """
    def __init__(self, capacity: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def cycle(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def indices(self) -> numpy.typing.NDArray[numpy.uint32]:
        """
        uint32 rows of the last sample.
        """
    def insert(self, rows: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def learn(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def observations(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        float32 observations of the last sample, one row after another.
        """
    def record(self, row: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        First number of a stored observation.
        """
    def sample(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def sums_agree(self) -> bool:
        """
        Whether every sum is its children's.
        """
    def total(self) -> int:
        """
        Sum of the weights.
        """
    def uniform_sample(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def update(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
    def weight(self, row: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Weight of a row.
        """
class CopyFloor:
    """
    The floor under large rows: copies of random rows into two arrays.
    """
    def __init__(self, rows: typing.SupportsInt | typing.SupportsIndex, half_bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def copies_agree(self) -> bool:
        """
        Whether the last copies are the rows that were drawn.
        """
    def sample(self, batch: typing.SupportsInt | typing.SupportsIndex, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        ...
class ProductFloor:
    """
    The learner's float32 product [m, k] x [k, n] alone, for benchmarks. One thread only.
    """
    def __init__(self, m: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, k: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def agrees(self) -> bool:
        """
        Whether the last product is right, as 16 of its rows show.
        """
    def product(self, iterations: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        Runs it `iterations` times and returns the seconds taken.
        """
class Learner:
    def __init__(self, replay: typing.Any, is_double: bool, options: dict[str, typing.Any], kinds: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def run(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], groups: typing.Annotated[numpy.typing.ArrayLike, numpy.float64], places: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], entropy_coefficient: typing.SupportsFloat | typing.SupportsIndex, reward_scale: typing.SupportsFloat | typing.SupportsIndex, loss_weights: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], n_step: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, importance_exponent: typing.SupportsFloat | typing.SupportsIndex, flags: typing.SupportsInt | typing.SupportsIndex, calls: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool]]) -> tuple[int, int, float, typing.Any]:
        ...
    @property
    def nbytes(self) -> int:
        ...
class ActingNetwork:
    """
    An MLP policy's forward pass for up to 8 float32 observations.
    """
    def __init__(self, sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], activation: typing.SupportsInt | typing.SupportsIndex, action_dim: typing.SupportsInt | typing.SupportsIndex, gaussian: bool, log_std_low: typing.SupportsFloat | typing.SupportsIndex, log_std_high: typing.SupportsFloat | typing.SupportsIndex, float32: typing.Any, exchange: typing.Any, from_dlpack: typing.Any) -> None:
        ...
    def act(self, plan: typing.Any, observations: typing.Any, deterministic: bool, noise: typing.Any) -> typing.Any:
        """
        (actions, log_prob); False where the plan's places, kinds or lengths no longer hold; None where it does not take these tensors, and then nothing was drawn.
        """
    @property
    def exchanges(self) -> bool:
        """
        Whether tensors are looked at by DLPack's functions.
        """
def available_isas() -> list[str]:
    """
    Names of the instruction sets that this machine can run.
    """
def has_bfloat16() -> bool:
    """
    Whether the learner can multiply bfloat16 numbers on this CPU, with the instruction set in use.
    """
def isa() -> str:
    """
    Name of the instruction set in use.
    """
def philox_normal_f32(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fill n float32 at address `out` with standard normals.
    """
def philox_normal_f64(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fill n float64 at address `out` with standard normals.
    """
def philox_split(key: typing.SupportsInt | typing.SupportsIndex, index: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    The index-th child of a 64-bit random key.
    """
def philox_uniform(key: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fill n float64 at address `out` with uniforms in [0, 1).
    """
def squashed_gaussian_f32(mean: typing.SupportsInt | typing.SupportsIndex, log_std: typing.SupportsInt | typing.SupportsIndex, noise: typing.SupportsInt | typing.SupportsIndex, actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, log_prob: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Actions tanh(mean + exp(log_std) * noise) and their log-density.
    """
def squashed_gaussian_f64(mean: typing.SupportsInt | typing.SupportsIndex, log_std: typing.SupportsInt | typing.SupportsIndex, noise: typing.SupportsInt | typing.SupportsIndex, actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, log_prob: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Actions tanh(mean + exp(log_std) * noise) and their log-density.
    """
def squashed_gaussian_gradient_f32(actions_gradient: typing.SupportsInt | typing.SupportsIndex, log_prob_gradient: typing.SupportsInt | typing.SupportsIndex, actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, mean_gradient: typing.SupportsInt | typing.SupportsIndex, log_std_gradient: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Gradients by mean and log_std.
    """
def squashed_gaussian_gradient_f64(actions_gradient: typing.SupportsInt | typing.SupportsIndex, log_prob_gradient: typing.SupportsInt | typing.SupportsIndex, actions: typing.SupportsInt | typing.SupportsIndex, spread: typing.SupportsInt | typing.SupportsIndex, mean_gradient: typing.SupportsInt | typing.SupportsIndex, log_std_gradient: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Gradients by mean and log_std.
    """
def twin_q_loss_f32(q: typing.SupportsInt | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, importance_weights: typing.SupportsInt | typing.SupportsIndex, huber_delta: typing.SupportsFloat | typing.SupportsIndex, loss: typing.SupportsInt | typing.SupportsIndex, td_error: typing.SupportsInt | typing.SupportsIndex, q_gradient: typing.SupportsInt | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Loss, |td error| and the loss's gradient by q; huber_delta 0: squared error.
    """
def twin_q_loss_f64(q: typing.SupportsInt | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, importance_weights: typing.SupportsInt | typing.SupportsIndex, huber_delta: typing.SupportsFloat | typing.SupportsIndex, loss: typing.SupportsInt | typing.SupportsIndex, td_error: typing.SupportsInt | typing.SupportsIndex, q_gradient: typing.SupportsInt | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Loss, |td error| and the loss's gradient by q; huber_delta 0: squared error.
    """
def twin_q_target_f32(rewards: typing.SupportsInt | typing.SupportsIndex, discounts: typing.SupportsInt | typing.SupportsIndex, next_q: typing.SupportsInt | typing.SupportsIndex, next_log_prob: typing.SupportsInt | typing.SupportsIndex, entropy_coefficient: typing.SupportsFloat | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    rewards + discounts * (min over critics of next_q - entropy term).
    """
def twin_q_target_f64(rewards: typing.SupportsInt | typing.SupportsIndex, discounts: typing.SupportsInt | typing.SupportsIndex, next_q: typing.SupportsInt | typing.SupportsIndex, next_log_prob: typing.SupportsInt | typing.SupportsIndex, entropy_coefficient: typing.SupportsFloat | typing.SupportsIndex, td_target: typing.SupportsInt | typing.SupportsIndex, critics: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    rewards + discounts * (min over critics of next_q - entropy term).
    """
def update_targets_f32(targets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], online: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], tau: typing.SupportsFloat | typing.SupportsIndex) -> None:
    """
    target = tau * online + (1 - tau) * target, for every array of the lists.
    """
def update_targets_f64(targets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], online: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], tau: typing.SupportsFloat | typing.SupportsIndex) -> None:
    """
    target = tau * online + (1 - tau) * target, for every array of the lists.
    """
MAX_STREAMS: int = 65536
__version__: str = '0.1.0'
most_acting_rows: int = 8
