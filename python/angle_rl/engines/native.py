"""The compiled engine: updates of multilayer perceptrons on a CPU, from sampled rows to new priorities, without Python.

Parameters, targets and Adam's state stay torch's own tensors and are changed in place; where they lie is asked anew
before every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from angle_rl import _core
from angle_rl.engines.base import Update, UpdateResult
from angle_rl.engines.recognize import hidden_layers, kind_of
from angle_rl.models import LAYER_NORM_EPSILON, LOG_STD_RANGE, QNetwork, TwinQ
from angle_rl.types import Array, Batch, RandomKey, UpdateSpec

NEXT_VALUES = {"soft": 0, "smoothed": 1, "deterministic": 2, "double": 3, "maximum": 4}
POLICY_LOSSES = {"soft": 0, "deterministic": 1, "none": 2}
TARGETS_FOLLOW = {"update": 0, "policy": 1, "copies": 2}
ACTIVATIONS = {"relu": 1, "tanh": 2, "silu": 3, "gelu": 4}
FIELD_KINDS = {"float32": 0, "float64": 1, "int64": 2}

Layers = list[list[Any]]
"""Weight, bias[, scale, shift] of each layer of a network"""


class NativeEngine:
    """Executes updates in compiled code. One thread at a time; its randomness is the key's and the replay's.

    Threads of its own help inside an update and sleep between calls. Takes what `native_refusal` says nothing against.
    """

    name = "native"

    def __init__(
        self,
        spec: UpdateSpec,
        update: Update,
        threads: int | None = None,
        *,
        precision: str = "float32",
        why: str = "native",
        writes_priorities: bool = True,
    ) -> None:
        self._spec = spec
        self._update = update
        self.threads = usable_threads(batch_size=spec.batch_size) if threads is None else threads
        reason = "auto: our own networks on a CPU" if why == "auto" else "as configured"
        in_bfloat16 = ", bfloat16" if precision == "bfloat16" else ""
        self.how = f"{_core.isa()}{in_bfloat16}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self.why = f"{reason}; {self.how}"
        self._precision = precision
        self._writes_priorities = writes_priorities
        self._networks = networks_of(update)
        self._dtype = next(update.critics.parameters()).dtype
        nothing = torch.empty(0, dtype=self._dtype)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, str]] = [
            (parameter, nothing if target is None else target, network.optimizer)
            for network in self._networks
            for layer, slow in zip(network.layers, network.targets, strict=True)
            for parameter, target in zip(layer, slow, strict=True)
        ]
        if update.log_entropy_coefficient is not None:
            self._pairs.append((update.log_entropy_coefficient, nothing, "entropy_coefficient"))
        own = self._dtype
        self._dtypes = [own, own, own, torch.float32, own] * len(self._pairs)
        self._sizes = [
            size for parameter, slow, _ in self._pairs for size in (*[parameter.numel()] * 3, 1, slow.numel())
        ]
        self._asked: list[Any] = []
        self._learner = self._make()

    # What the engine does ----------

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, `policy_steps` policy steps, the priorities, and the targets' update where it is due."""
        (result,) = self.update_many([(random_key, policy_steps, copy_targets)])
        return result

    def update_many(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
        """The updates, in one call of compiled code; ends after the first that is not finite.

        TypeError or ValueError where a tensor has changed its dtype, shape or layout so that it can be used no longer.
        """
        update, replay = self._update, self._update.replay
        tensors, addresses, groups = self._tensors()
        _, n_step, discount, importance_exponent, flags = replay._sample_arguments(self._spec.batch_size)
        coefficient, loss_weights = update.entropy_coefficient(), update.loss_weights()
        done, failure, critic_loss, policy_loss = self._learner.run(
            addresses,
            groups,
            self._places,
            0.0 if coefficient is None else float(coefficient),
            update.reward_scale(),
            [] if loss_weights is None else loss_weights.tolist(),
            n_step,
            discount,
            importance_exponent,
            flags,
            [(key.value, policy_steps, copies) for key, policy_steps, copies in calls],
        )
        torch.autograd.graph.increment_version(tensors)
        if update.log_entropy_coefficient is not None:
            update.set_entropy_coefficient(update.log_entropy_coefficient.detach().exp())
        self._losses[0], self._losses[1] = critic_loss, 0.0 if policy_loss is None else policy_loss
        stepped = policy_loss is not None
        last = UpdateResult(
            finite=failure == 0,
            batch=self._batch,
            q=self._q,
            critic_loss=self._critic_loss,
            policy_loss=self._policy_loss if stepped else None,
            log_prob=self._log_prob if stepped and self._spec.policy_loss == "soft" else None,
        )
        for _ in range(done - 1):
            yield last._replace(finite=True)
        yield last

    @property
    def td_error(self) -> torch.Tensor:
        """``[batch]``, of the newest update, what its priorities come from; holds until the next."""
        return self._td_error

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace."""
        return int(self._learner.nbytes)

    # Where the tensors are ----------

    def _tensors(self) -> tuple[list[torch.Tensor], list[int], Array]:
        """All tensors that an update changes, their addresses, and the numbers of Adam, as `Learner.run` takes them.

        Five a parameter: its own, Adam's two means and step, and the target's or an empty one, whose address is 0.
        """
        optimizers = self._update.optimizers
        tensors: list[torch.Tensor] = []
        for parameter, target, name in self._pairs:
            state = optimizers[name].state[parameter] or adam_state(optimizers[name], parameter)
            tensors += (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"], target)
        as_before = (
            [tensor.dtype for tensor in tensors] == self._dtypes
            and [tensor.numel() for tensor in tensors] == self._sizes
            and all(map(torch.Tensor.is_contiguous, tensors))
        )
        if not as_before:
            raise _moved(tensors, self._dtypes, self._sizes)
        return tensors, [tensor.data_ptr() for tensor in tensors], self._numbers()

    def _numbers(self) -> Array:
        """Six numbers for each parameter, see `_groups`; worked out anew where an optimizer's have changed."""
        optimizers = self._update.optimizers
        asked = [
            (name, len(group["params"]), group["lr"], group["betas"], group["eps"], group["weight_decay"])
            for name, optimizer in optimizers.items()
            for group in optimizer.param_groups
        ]
        if asked != self._asked:
            own = {name: _groups(optimizer) for name, optimizer in optimizers.items()}
            self._adam = np.array([own[name][parameter] for parameter, _, name in self._pairs], np.float64).ravel()
            self._asked = asked
        return self._adam

    def _make(self) -> Any:
        spec, update = self._spec, self._update
        replay, batch = update.replay, spec.batch_size
        kinds = [FIELD_KINDS[field.dtype.name] for field in replay.schema.fields]
        options = {
            "batch": batch,
            "observation_dim": replay.schema.fields[0].shape[0],
            "next_value": NEXT_VALUES[spec.next_value],
            "policy_loss": POLICY_LOSSES[spec.policy_loss],
            "networks": [network.shape() for network in self._networks],
            "prioritized": spec.prioritized,
            "writes_priorities": self._writes_priorities,
            "targets_follow": TARGETS_FOLLOW[spec.targets_follow],
            "tau": spec.tau,
            "huber_delta": spec.huber_delta or 0.0,
            "max_gradient_norm": spec.max_gradient_norm or 0.0,
            "threads": self.threads,
            "bfloat16": self._precision == "bfloat16",
        }
        critics = 1
        if update.first_action is not None:
            options["first_action"] = update.first_action
        else:
            assert update.bounds is not None
            critics = self._networks[1].layers[0][0].shape[0]
            scale, center = action_scaling(update.policy)
            options |= {
                "action_dim": len(scale),
                "critics": critics,
                "critic_subset": spec.critic_subset or 0,
                "target_policy": update.target_policy is not None,
                "fresh_policy_batch": spec.policy_batch == "fresh",
                "target_noise": spec.target_noise,
                "target_noise_clip": spec.target_noise_clip,
                "learns_entropy": update.log_entropy_coefficient is not None,
                "target_entropy": spec.target_entropy or 0.0,
                "log_std_low": LOG_STD_RANGE[0],
                "log_std_high": LOG_STD_RANGE[1],
                "scale": scale,
                "center": center,
                "low": update.bounds.low.double().tolist(),
                "high": update.bounds.high.double().tolist(),
                "half_range": update.bounds.half_range.double().tolist(),
            }
        learner = _core.Learner(replay._core, self._dtype == torch.float64, options, kinds)
        tensors = replay._blank(batch, False)
        self._batch: Batch = replay._batches.assemble(list(tensors))
        policy_tensors = replay._blank(batch, False) if spec.policy_batch == "fresh" else tensors
        self._kept = (tensors, policy_tensors)
        self._q = torch.zeros(critics, batch, dtype=self._dtype)
        self._td_error = torch.zeros(batch, dtype=self._dtype)
        self._log_prob = torch.zeros(batch, dtype=self._dtype)
        losses = torch.zeros(2, dtype=self._dtype)
        self._losses, self._critic_loss, self._policy_loss = losses.numpy(), losses[0], losses[1]
        results = [self._q, self._td_error, self._log_prob]
        self._places = [t.data_ptr() for t in (*tensors, *policy_tensors, *results)]
        return learner


# The networks' tensors ----------


class Network(NamedTuple):
    """One of the networks that learn, or a part of it: layers of one kind."""

    layers: Layers
    targets: list[list[Any]]  # its slow copy's, in the same order; None where there is none
    optimizer: str
    inputs: int
    kind: tuple[str, bool, float]  # of its hidden layers, see `kind_of`
    hidden_end: bool = False  # the last layer is a hidden one, too

    def shape(self) -> dict[str, Any]:
        """What the compiled learner has to know of it."""
        activation, layer_norm, epsilon = self.kind
        return {
            "sizes": [self.inputs, *[layer[0].shape[-2] for layer in self.layers]],
            "activation": ACTIVATIONS[activation],
            "layer_norm": layer_norm,
            "norm_epsilon": epsilon,
            "hidden_end": self.hidden_end,
        }


def networks_of(update: Update) -> list[Network]:
    """The networks that an update learns, in the compiled learner's order."""
    critics, target = update.critics, update.target_critics
    if isinstance(critics, QNetwork) and isinstance(target, QNetwork):
        if not critics.dueling:
            whole = [nn.Sequential(*q.body, *q.advantages) for q in (critics, target)]
            return [_sequential(whole[0], whole[1], "critics", critics.encoder.width)]
        trunk = _sequential(critics.body, target.body, "critics", critics.encoder.width)._replace(hidden_end=True)
        width = trunk.shape()["sizes"][-1]
        return [
            trunk,
            _sequential(critics.advantages, target.advantages, "critics", width),
            _sequential(critics.value, target.value, "critics", width),
        ]
    policy: Any = update.policy
    slow_policy: Any = update.target_policy
    own = nn.Sequential(*policy.body, policy.head)
    slow = None if slow_policy is None else nn.Sequential(*slow_policy.body, slow_policy.head)
    assert isinstance(critics, TwinQ)
    assert isinstance(target, TwinQ)
    kind = (critics.activation, critics.layer_norm, LAYER_NORM_EPSILON)
    width = critics.observation_dim + critics.action_dim
    return [
        _sequential(own, slow, "policy", width - critics.action_dim),
        Network(stacked_layers(critics), stacked_layers(target), "critics", width, kind),
    ]


def _sequential(own: nn.Sequential, slow: nn.Sequential | None, optimizer: str, inputs: int) -> Network:
    layers = sequential_layers(own)
    targets = [[None] * len(layer) for layer in layers] if slow is None else sequential_layers(slow)
    hidden = hidden_layers(own if len(own) == 0 or not isinstance(own[-1], nn.Linear) else own[:-1])
    kind = kind_of(hidden[0]) if hidden else ("relu", False, LAYER_NORM_EPSILON)
    return Network(layers, targets, optimizer, inputs, kind)


def sequential_layers(modules: nn.Sequential) -> Layers:
    """The layers of linear modules, each perhaps followed by a LayerNorm: ``[outputs, inputs]`` and ``[outputs]``."""
    layers: Layers = []
    for module in modules:
        if isinstance(module, nn.Linear):
            layers.append([module.weight, module.bias])
        elif isinstance(module, nn.LayerNorm):
            layers[-1] += [module.weight, module.bias]
    return layers


def stacked_layers(critics: TwinQ) -> Layers:
    """The layers of stacked critics, ``[critics, outputs, inputs]`` and ``[critics, outputs]``."""
    layers = [list(pair) for pair in zip(critics.weights, critics.biases, strict=True)]
    norms = zip(critics.scales, critics.shifts, strict=True) if critics.layer_norm else ()
    for layer, norm in zip(layers, norms, strict=False):
        layer += norm
    return layers


def action_scaling(policy: Any) -> tuple[list[float], list[float]]:
    """What a policy's actions in [-1, 1] are scaled by and moved to."""
    return policy.action_scale.double().tolist(), policy.action_center.double().tolist()


# Adam's state ----------


def adam_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Adam's state of a parameter, made as `torch.optim.Adam` makes it where there is none yet."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _groups(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, list[float]]:
    """Six numbers for each parameter: learning rate, both betas, epsilon, weight decay, whether it is decoupled."""
    found: dict[torch.Tensor, list[float]] = {}
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        numbers = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], float(decoupled)]
        found |= dict.fromkeys(group["params"], numbers)
    return found


def _moved(tensors: list[torch.Tensor], dtypes: list[torch.dtype], sizes: list[int]) -> Exception:
    for tensor, dtype, size in zip(tensors, dtypes, sizes, strict=True):
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            break
    return TypeError(
        f"a tensor of the shape {list(tensor.shape)}, strides {list(tensor.stride())} and dtype {tensor.dtype} is no "
        f"longer what the native engine was made for: contiguous, {dtype}, {size} elements"
    )


# Threads ----------


COLUMNS_A_THREAD = 64
"""Rows of a batch below which a thread more costs as much in meetings as it helps"""


def usable_threads(busy: int = 0, batch_size: int | None = None) -> int:
    """Threads that an update may well take: the cores that this process may use, less the busy ones; at least 1.

    That is physical cores of its affinity, at most its control group's share of time; and no more threads than have
    work in a batch of this size.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    most = cores if batch_size is None else batch_size // COLUMNS_A_THREAD
    return max(1, min(cores, _quota(), most + busy) - busy)


def _siblings(cpu: int, root: Path = Path("/sys/devices/system/cpu")) -> str:
    """Names the core that a logical CPU belongs to: all that share it, or itself where the system does not say."""
    try:
        return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Whole cores of the control group's share of time; many where it sets none."""
    try:
        limit, period = path.read_text(encoding="ascii").split()[:2]
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 16
