"""Agents beside each other on both engines, and what stands in for a device's graphs, for the tests of one of them."""

from __future__ import annotations

import torch
from engine_parts import ACTIONS, NAMES, made, spec_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from angle_rl import device, fused
from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.engines import CudaGraphEngine, cuda_graph
from angle_rl.engines.masked import state_tensors
from angle_rl.models import PolicyModel
from angle_rl.replay import PrioritizedReplayBuffer
from angle_rl.types import RandomKey

CASES = [
    (SAC, {}),
    (SAC, {"entropy_coefficient": 0.2, "huber_delta": 0.5, "max_gradient_norm": 0.5}),
    (SAC, {"critics": 5, "critic_subset": 2, "policy_batch": "fresh", "optimizer": "adamw", "weight_decay": 0.01}),
    (SAC, {"target_update_interval": 3, "layer_norm": True, "activation": "silu"}),
    (TD3, {}),
    (TD3, {"policy_batch": "fresh", "huber_delta": 1.0}),
    (DDPG, {}),
    (DDPG, {"max_gradient_norm": 0.1}),
    (DQN, {}),
    (DQN, {"double_q": False, "target_update_interval": 3, "dueling": True}),
    (DiscreteSAC, {}),
    (SAC, {"networks": lambda: own_networks(2)}),
    (TD3, {"networks": lambda: own_networks(1)}),
]


class OwnPolicy(PolicyModel):
    """A user's: statistics of batches, which are buffers, and an output of its own."""

    def __init__(self, outputs):
        super().__init__(ACTIONS.low, ACTIONS.high)
        self.outputs = outputs
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 16, bias=False),
            torch.nn.BatchNorm1d(16),
            torch.nn.ELU(),
            torch.nn.Linear(16, 2 * outputs),
        )

    def forward(self, observations):
        output = self.layers(observations)
        return output.tanh() * self.action_scale + self.action_center if self.outputs == 1 else output.chunk(2, -1)


class OwnCritics(torch.nn.Module):
    """A user's: networks of different form."""

    def __init__(self):
        super().__init__()
        self.wide, self.deep = (
            torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)),
            torch.nn.Sequential(
                torch.nn.Linear(5, 8),
                torch.nn.LayerNorm(8),
                torch.nn.GELU(),
                torch.nn.Linear(8, 8),
                torch.nn.Linear(8, 1),
            ),
        )

    def forward(self, observations, actions):
        inputs = torch.cat((observations, actions), 1)
        return torch.cat((self.wide(inputs), self.deep(inputs)), 1).t()


def own_networks(outputs):
    """One output a component: the actions; two: the mean and the logarithm of the deviation."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {"policy": OwnPolicy(outputs), "critics": OwnCritics()}


class ResidentReplay(PrioritizedReplayBuffer):
    """A replay on a device, or as on one under `emulated()`, that counts what the engine tells it."""

    def __init__(self, *args, **options):
        super().__init__(*args, device="cuda", **options)
        self.refreshed = 0
        self.drawn = 0

    def refresh(self):
        self.refreshed += 1
        super().refresh()

    def launched(self, samples):
        self.drawn += samples
        super().launched(samples)


class Learner:
    """An agent whose updates a test calls for."""

    def __init__(self, kind, engine, *, buffer=ResidentReplay, **options):
        self.agent, self.state = made(kind, buffer=buffer, **options)
        self.kind = next(base for base in kind.__mro__ if base in NAMES)
        if engine == "graph":
            self.state.engine = engine_of(self)

    def take(self, first, policy_steps, copies=False):
        """One call, an update for each entry of `policy_steps`, with keys from `first` on."""
        steps = [0 if self.kind is DQN else n for n in policy_steps]
        calls = [(RandomKey(first + index), n, copies) for index, n in enumerate(steps)]
        return list(self.state.engine.update_many(calls))

    def tensors(self):
        """All that updates change, by name; priorities by handle."""
        tensors, _ = self.agent.export_state(self.state)
        found = {name: tensor.double().clone() for name, tensor in tensors.items() if not name.startswith("replay.")}
        rows = self.state.replay.export_arrays()
        found |= {name: torch.from_numpy(rows[name]).double() for name in ("handles", "priorities")}
        if getattr(self.state, "entropy_coefficient", None) is not None:
            found["entropy_coefficient"] = self.state.entropy_coefficient.double().clone()
        return found


def engine_of(learner, **options):
    """The graph engine of a learner, which takes its steps one by one."""
    parts = learner.agent._update_parts(learner.state)
    return CudaGraphEngine(spec_of(learner.agent, learner.state), parts, **{"capture": False} | options)


def pair(kind, **options):
    """The same learner on the torch engine and on the graph engine."""
    return Learner(kind, "torch", **options), Learner(kind, "graph", **options)


def assert_beside(reference, graph, rtol=1e-6):
    """Each tensor within `rtol` of the other's, as a share of its largest entry."""
    expected, found = reference.tensors(), graph.tensors()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=rtol,
            atol=rtol * max(largest, 1e-30),
            msg=lambda text, name=name: f"{name}: {text}",
        )


WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
"""Operations whose result, or its shape, the host waits for"""

READING = {"item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "is_nonzero", "__bool__", "__float__"}
READING |= {"__int__", "__index__", "__array__", "__contains__", "masked_select", "unique", "argwhere"}
"""Functions of torch's that give their result to the host"""


class NothingWaits(TorchDispatchMode):
    """Raises where an operation would have the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        assert name not in WAITING, f"{function} waits for the device"
        indices = args[1] if name in ("index", "index_put_") else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), f"{function} counts on it"
        return function(*args, **(kwargs or {}))


class NothingIsRead(torch.overrides.TorchFunctionMode):
    """Raises where Python looks at a tensor's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in READING, f"{name} looks at a tensor"
        if name == "to":
            places = [*args[1:], *(kwargs or {}).values()]
            assert not any(place == "cpu" for place in places if isinstance(place, str)), "a tensor goes to the host"
        return function(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Writes down the operations inside, with the tensors that they read and write, and plays them as a graph does:
    in the same memory, without Python in between. So nothing on it may depend on a number that the host has seen.
    """

    recording = None

    def __init__(self):
        super().__init__()
        self.steps = []

    def __enter__(self):
        Tape.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.recording = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.steps.append((function, args, kwargs, tree_leaves(result)))
        return result

    @torch.no_grad()
    def play(self):
        for step in self.steps:
            if callable(step):
                step()
                continue
            function, args, kwargs, written = step
            for tensor, old in zip(tree_leaves(function(*args, **kwargs)), written, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != tensor.data_ptr():  # no view, and not in place
                    old.copy_(tensor)


class TapedGraph:
    """Stands in for a CUDA graph. Recording leaves all tensors as they were, since a CUDA graph's runs nothing."""

    def __init__(self, body, engine):
        moments = [tensor for optimizer in engine._optimizers for tensor in state_tensors(optimizer)]
        coefficient = [] if engine._coefficient is None else [engine._coefficient]
        tensors = [tensor.detach() for tensor in (*engine._learned, *moments, *coefficient)]
        before = [tensor.clone() for tensor in tensors]
        self.tape = Tape()
        with self.tape:
            self.outcome = body()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        self.launches = 0

    def launch(self):
        self.launches += 1
        self.tape.play()


def record_on_tape(learner, monkeypatch):
    """Have a learner's graph engine record its updates on tapes, kernels as they are launched; under `emulated()`."""
    engine = learner.state.engine = engine_of(learner, capture=True)
    monkeypatch.setattr(cuda_graph, "_Graph", lambda body, _: TapedGraph(body, engine))
    launch = device.launch

    def noted(kernel, place, *arguments):
        if Tape.recording is None:
            launch(kernel, place, *arguments)
        else:
            Tape.recording.steps.append(lambda: launch(kernel, place, *arguments))

    for module in (device, fused):
        monkeypatch.setattr(module, "launch", noted)
