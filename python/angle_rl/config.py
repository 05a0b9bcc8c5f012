"""AgentConfig: all that a run is decided by, in three parts.

Every field says its meaning and unit beside it, and its range in its type. A value outside its range, of the
wrong type, or that contradicts another is refused when the config is made, naming field, value and limit.
Configs are frozen: `dataclasses.replace` makes a changed one, and is checked again. Thread rule: any thread.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class In:
    """A range in interval notation: `[` and `]` include the bound, `(` and `)` leave it out."""

    text: str

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range. NaN lies in none."""
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        above = low <= value if self.text[0] == "[" else low < value
        return above and (value <= high if self.text[-1] == "]" else value < high)


Count = Annotated[int, In("[1, inf)")]
Steps = Annotated[int, In("[0, inf)")]
Positive = Annotated[float, In("(0, inf)")]
NotNegative = Annotated[float, In("[0, inf)")]
Share = Annotated[float, In("[0, 1]")]
PositiveShare = Annotated[float, In("(0, 1]")]
Finite = Annotated[float, In("(-inf, inf)")]
MetaParameter = Literal["discount", "reward_scale", "loss_weights", "entropy_coefficient", "critic_learning_rate"]
Seed = Annotated[int, In("[0, 9223372036854775807]")]


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What is learned, and how."""

    agent: Literal["sac", "sac_discrete", "td3", "ddpg", "dqn", "q_learning"] = "sac"  # the algorithm
    hidden_sizes: tuple[Count, ...] = (256, 256)  # units of each hidden layer, in all networks
    activation: Literal["relu", "tanh", "silu", "gelu"] = "relu"  # after each hidden layer, in all default networks
    layer_norm: bool = False  # a LayerNorm in front of each of these activations, in all default networks
    # critics in the ensemble, whose minimum the target takes; auto: 2, or 1 (DDPG)
    critics: Count | Literal["auto"] = "auto"
    # SAC, TD3, DDPG: the target takes the minimum over so many of them, drawn anew for each update (REDQ); None: all
    critic_subset: Count | None = None
    # Adam's step size: the critics', and the others' where they have none; Q-learning: share of the td error, at most 1
    learning_rate: Positive = 1e-3
    policy_learning_rate: Positive | None = None  # Adam's step size for the policy; None: learning_rate
    entropy_learning_rate: Positive | None = None  # SAC, for the entropy coefficient; None: learning_rate
    optimizer: Literal["adam", "adamw"] = "adam"  # of the networks; they differ in how weight_decay enters
    # adam: this times the parameter is added to its gradient; adamw: a step takes this times its size off the parameter
    weight_decay: NotNegative = 0.0
    # how all step sizes change; linear: in a straight line down to 0 at the training's steps
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    batch_size: Count = 256  # transitions per update
    discount: Share = 0.99  # factor per environment step on what comes later
    n_step: Count = 1  # rewards summed before the bootstrap value
    tau: PositiveShare = 0.005  # per update: target <- tau * online + (1 - tau) * target
    # environment steps from copy to copy, target <- online, in place of tau's small steps; None: those
    target_update_interval: Count | None = None
    learning_starts: Steps = 1_000  # environment steps of uniform random actions without an update
    updates_per_step: Positive = 1.0  # updates per environment step; 0.5: one every second step
    updates_per_call: Count = 1  # updates that one call of the engine takes; >1 waits until so many are due
    # environment steps between policy steps; auto: every update (SAC), every second one (TD3); None: off
    policy_update_interval: Count | Literal["auto"] | None = "auto"
    # environment steps from meta step to meta step; auto: 10 where there is a meta trainer; None: off
    meta_update_interval: Count | Literal["auto"] | None = "auto"
    meta: Literal["entropy", "critic", "gradient", "bootstrapped"] | None = None  # what MetaLearnerTrainer trains
    meta_learning_rate: NotNegative = 1e-3  # Adam's step size for what that learns
    # gradient and bootstrapped: the hyperparameters that are learned
    meta_parameters: tuple[MetaParameter, ...] = ("discount",)
    policy_batch: Literal["critic", "fresh"] = "critic"  # the policy learns on the critic's batch or its own
    huber_delta: Positive | None = None  # Huber error beyond this |td_error|; None: squared error
    max_gradient_norm: Positive | None = None  # 2-norm to clip each network's gradients to
    entropy_coefficient: NotNegative | Literal["auto"] = "auto"  # SAC, reward per nat; auto: learned, from 1
    # SAC, nats auto aims at; None: -(action dimensions), or 0.98 * log(actions) where they are discrete
    target_entropy: Finite | None = None
    # noise added to the actions while learning; auto: none (SAC), gaussian (TD3), ou: Ornstein-Uhlenbeck (DDPG)
    exploration_process: Literal["auto", "none", "gaussian", "ou"] = "auto"
    # its first scale in halves of the action range: gaussian's deviation, ou's sigma; auto: 0.1 and 0.2
    exploration_noise: NotNegative | Literal["auto"] = "auto"
    exploration_theta: Share = 0.15  # ou, share of the way back to the mean per step
    exploration_mean: Finite = 0.0  # ou, where the noise comes back to, in halves of the action range
    exploration_epsilon: Share = 0.1  # DQN and Q-learning, first share of random actions: their scale below
    # how the scale changes: plateau grows it while the episodes' returns stand still, and decays it otherwise
    exploration_schedule: Literal["constant", "linear", "plateau"] = "constant"
    exploration_minimum: NotNegative = 0.01  # linear, the last scale; plateau, the smallest
    exploration_maximum: NotNegative = 1.0  # plateau, the largest scale
    exploration_steps: Count = 10_000  # linear, environment steps from the first scale to the last
    exploration_window: Annotated[int, In("[2, inf)")] = 500  # plateau, newest episodes, whose halves are compared
    exploration_gap: NotNegative = 0.01  # plateau, returns stand still if the halves' means are less apart
    exploration_growth: Annotated[float, In("[1, inf)")] = 1.005  # plateau, factor per episode while they stand still
    exploration_decay: PositiveShare = 0.995  # plateau, factor per episode while they do not
    target_noise: NotNegative = 0.2  # TD3, deviation of noise on the target policy's actions, same unit
    target_noise_clip: NotNegative = 0.5  # TD3, target noise is clipped to this either way, same unit
    double_q: bool = True  # DQN, the online network chooses the next action that the target network values
    dueling: bool = False  # DQN, value and advantages apart in the default network
    observation_history: Count = 1  # newest observations that the agent sees, stacked on a new first axis
    replay: Literal["prioritized", "uniform"] = "prioritized"  # how transitions are drawn
    replay_capacity: Count = 1_000_000  # transitions kept; the oldest go first
    priority_exponent: NotNegative = 0.6  # prioritized: priority = (|td_error| + priority_epsilon) ** this
    importance_exponent: NotNegative = 0.4  # prioritized: weight = (size * probability) ** -this
    priority_epsilon: NotNegative = 1e-6  # prioritized: added to |td_error|, in units of Q

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.hidden_sizes:
            raise ValueError("hidden_sizes is (); at least 1 hidden layer is needed")
        if self.target_entropy is not None and self.entropy_coefficient != "auto":
            raise ValueError(
                f"target_entropy is {self.target_entropy} while entropy_coefficient is "
                f"{self.entropy_coefficient}; a target needs entropy_coefficient 'auto'"
            )
        if self.critics == 1 and self.agent != "ddpg":
            raise ValueError(f"critics is 1; it must lie in [2, inf) where agent is {self.agent!r}")
        if self.critic_subset is not None:
            critics = (1 if self.agent == "ddpg" else 2) if isinstance(self.critics, str) else self.critics
            if self.agent not in ("sac", "td3", "ddpg"):
                raise ValueError(f"critic_subset is {self.critic_subset}; agent {self.agent!r} has no such ensemble")
            if self.critic_subset > critics:
                raise ValueError(f"critic_subset is {self.critic_subset}; it must be at most critics ({critics})")
        if not self.meta_parameters:
            raise ValueError("meta_parameters is (); at least 1 hyperparameter is needed")
        if self.batch_size > self.replay_capacity:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be at most replay_capacity ({self.replay_capacity})"
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Where and how long it is learned."""

    environment: str = "Pendulum-v1"  # a Gymnasium id; not read where a feed is passed
    steps: Count = 8_000  # transitions to reach, of all environments; a resume counts on
    seed: Seed = 0  # decides everything random
    parallel_environments: Count = 1  # environments stepped together
    normalize_observations: bool = False  # to mean 0 and variance 1, by what training has seen
    normalize_rewards: bool = False  # to unit scale, by the discounted returns seen; evaluations stay unscaled
    evaluation_interval: Count | None = 2_000  # environment steps between evaluations; None: only the last
    evaluation_episodes: Count = 20  # whole episodes in each evaluation
    device: str = "cpu"  # the torch device that holds the networks
    threads: Count | None = None  # torch's threads inside one operation; None: torch's own choice
    # executes the updates: torch takes any network, native our own ones on a CPU, cuda_graph what can be recorded on a
    # CUDA device; auto: the fastest that takes them
    engine: Literal["auto", "torch", "native", "cuda_graph"] = "auto"
    compile: bool = False  # torch.compile makes the networks' kernels; auto takes torch or cuda_graph then
    learner_threads: Count | None = None  # native, threads that share one update; None: the engine's own choice
    overlap: bool = False  # updates are taken in a thread of their own while the environments step; not reproducible
    # native, what its matrix products multiply in (they add in float32, and parameters stay as they are)
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.environment:
            raise ValueError("environment is ''; it must name a Gymnasium environment")
        if self.engine in ("torch", "cuda_graph") and self.precision != "float32":
            raise ValueError(f"precision is {self.precision!r} and engine {self.engine!r}, which has float32 alone")
        if self.compile and self.engine == "native":
            raise ValueError("compile is True and engine 'native', which is no torch; leave out one of them")
        if self.engine == "cuda_graph" and not self.device.startswith("cuda"):
            raise ValueError(f"engine is 'cuda_graph' and device {self.device!r}; it needs a CUDA device")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a run leaves behind and shows."""

    run_folder: str = "runs"  # the run is kept in a folder of its own in here, <environment>-<agent>-<seed>
    tensorboard: bool = True  # write TensorBoard events, besides metrics.jsonl
    progress: bool = True  # draw a progress bar where the output is a terminal
    log_interval: Count = 500  # environment steps between lines of metrics
    checkpoint_interval: Count | None = 5_000  # environment steps between checkpoints; None: only the last
    keep_checkpoints: Count = 2  # newest checkpoints kept, besides the best

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """One run's configuration. Raises ValueError or TypeError where parts contradict each other."""

    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    training: Training = field(default_factory=Training)
    service: Service = field(default_factory=Service)

    def __post_init__(self) -> None:
        for name, kind in _hints(AgentConfig).items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be a {kind.__name__}")
        learning_starts, steps = self.hyperparameters.learning_starts, self.training.steps
        if learning_starts >= steps:
            raise ValueError(
                f"learning_starts is {learning_starts}; it must be less than steps ({steps}), "
                "or nothing would be learned"
            )

    def replace(self, **fields: Any) -> AgentConfig:
        """A config with these fields changed, whichever part they belong to: ``config.replace(steps=5000, seed=1)``.

        ValueError on an unknown field, naming the nearest known one.
        """
        parts: dict[str, dict[str, Any]] = {}
        owners = {
            entry.name: part.name
            for part in dataclasses.fields(self)
            for entry in dataclasses.fields(getattr(self, part.name))
        }
        _check_keys(fields, owners, "the config")
        for name, value in fields.items():
            parts.setdefault(owners[name], {})[name] = value
        changed = {part: dataclasses.replace(getattr(self, part), **values) for part, values in parts.items()}
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        """The config as a JSON object of three objects."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_toml(self) -> str:
        """The config as three TOML tables. None is left out where it is the default, and "none" elsewhere."""
        lines = []
        for part in dataclasses.fields(self):
            config = getattr(self, part.name)
            lines.append(f"[{part.name}]")
            for entry in dataclasses.fields(config):
                value = getattr(config, entry.name)
                if value is not None or entry.default is not None:
                    lines.append(f"{entry.name} = {_toml('none' if value is None else value)}")
            lines.append("")
        return "\n".join(lines)

    @classmethod
    def from_json(cls, text: str) -> AgentConfig:
        """What `to_json` wrote; a field left out takes its default. ValueError on an unknown field."""
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the config is not JSON: {error}") from None
        return config_from_dict(entries)

    @classmethod
    def from_toml(cls, text: str) -> AgentConfig:
        """What `to_toml` wrote; a field left out takes its default. ValueError on an unknown field."""
        return config_from_dict(toml_tables(text))


def toml_tables(text: str) -> dict[str, Any]:
    """The tables of a TOML text. ValueError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the config is not TOML: {error}") from None


def config_from_dict(entries: Any) -> AgentConfig:
    """An AgentConfig from nested dicts. ValueError names an unknown field and the nearest known one."""
    parts = _hints(AgentConfig)
    _check_keys(entries, parts, "the config")
    return AgentConfig(**{name: _part(parts[name], name, given) for name, given in entries.items()})


def read_config(path: str | Path) -> AgentConfig:
    """The config in a .toml or .json file. OSError where it cannot be read; ValueError."""
    path = Path(path)
    readers = {".toml": AgentConfig.from_toml, ".json": AgentConfig.from_json}
    if path.suffix not in readers:
        raise ValueError(f"config file is {str(path)!r}; it must end in .toml or .json")
    return readers[path.suffix](path.read_text(encoding="utf-8"))


Part = TypeVar("Part")


def _part(kind: type[Part], name: str, given: Any) -> Part:
    hints = _hints(kind)
    _check_keys(given, hints, name)
    return kind(**{key: _none_from_text(value, hints[key]) for key, value in given.items()})


def _check_keys(given: Any, known: dict[str, Any], where: str) -> None:
    if not isinstance(given, dict):
        raise TypeError(f"{where} is {given!r}; it must be a table of fields")
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"{where} has no field {key!r}; the nearest is {nearest[0]!r}")


def _none_from_text(value: Any, hint: Any) -> Any:
    """TOML knows no null: "none" stands for it in the fields that may be None."""
    return None if value == "none" and type(None) in _members(hint) else value


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: its union's members, or itself."""
    return (hint,) if get_origin(hint) in (None, Annotated, tuple, Literal) else get_args(hint)


def _check_fields(part: Any) -> None:
    """Check every field against its declared type and range; an int becomes a float, a list a tuple."""
    for name, hint in _hints(type(part)).items():
        object.__setattr__(part, name, _checked(name, getattr(part, name), hint))


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, as the first alternative of its declared type that takes it."""
    members = _members(hint)
    for member in members:
        limit = get_args(member)[1] if get_origin(member) is Annotated else None
        kind = get_args(member)[0] if limit is not None else member
        if get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif get_origin(kind) is tuple:
            if isinstance(value, list | tuple):
                return tuple(_checked(name, one, get_args(kind)[0]) for one in value)
        elif _is_a(value, kind):
            if limit is not None and not limit.holds(value):
                raise ValueError(f"{name} is {value!r}; it must lie in {limit.text}")
            return float(value) if kind is float else value
    allowed = " or ".join(_type_name(member) for member in members)
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    refusal = ValueError if choices and isinstance(value, str) else TypeError
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise refusal(f"{name} is {value!r}; it must be {allowed}{hint}")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _type_name(member: Any) -> str:
    if get_origin(member) is Annotated:
        kind, limit = get_args(member)
        return f"{_type_name(kind)} in {limit.text}"
    if get_origin(member) is Literal:
        return " or ".join(repr(choice) for choice in get_args(member))
    if get_origin(member) is tuple:
        return f"a list of: {_type_name(get_args(member)[0])}"
    return {int: "an int", float: "a number", str: "a string", bool: "true or false"}.get(member, "None")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    # A bool, an int, or a string: JSON's escapes are TOML's too, which wants DEL escaped besides.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
