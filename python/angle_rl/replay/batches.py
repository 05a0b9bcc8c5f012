"""How a batch's tensors follow each other, and where an ``out`` batch lies."""

from __future__ import annotations

import numpy as np
import torch

from angle_rl.schema import Schema, flatten, unflatten
from angle_rl.types import Batch

CPU = torch.device("cpu")


class BatchLayout:
    """The tensors of a batch in the core's order: the fields, discounts, importance weights, handles, steps."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._flat = schema.observation_structure is None and schema.action_structure is None
        self._dtypes = [torch.from_numpy(np.empty(0, f.dtype)).dtype for f in schema.fields]

    def sizes(self, n: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a batch's tensors: the schema's fields, discounts, importance weights, handles, steps."""
        shapes: list[tuple[int, ...]] = [(n, *f.shape) for f in self.schema.fields]
        sizes = list(zip(shapes, self._dtypes, strict=True))
        return [*sizes, *[((n,), torch.float32)] * 2, *[((n,), torch.int64)] * 2]

    def assemble(self, tensors: list[torch.Tensor]) -> Batch:
        """A batch of these tensors."""
        if self._flat:
            return Batch._make(tensors)
        left = list(tensors)
        observations = unflatten(self.schema.observation_structure, left)
        actions = unflatten(self.schema.action_structure, left)
        rewards = left.pop(0)
        successors = unflatten(self.schema.observation_structure, left)
        return Batch(observations, actions, rewards, successors, *left)

    def leaves(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The tensors of a batch."""
        if type(batch) is not Batch:
            raise TypeError(f"out is {type(batch).__name__}; it must be a Batch")
        if self._flat:
            return batch
        leaves: list[torch.Tensor] = []
        flatten("observations", self.schema.observation_structure, batch.observations, leaves)
        flatten("actions", self.schema.action_structure, batch.actions, leaves)
        leaves.append(batch.rewards)
        flatten("next_observations", self.schema.observation_structure, batch.next_observations, leaves)
        return (*leaves, batch.discounts, batch.importance_weights, batch.handles, batch.steps)

    def check_out(self, leaves: tuple[torch.Tensor, ...], n: int, device: torch.device = CPU) -> tuple[int, ...]:
        """The addresses of tensors that a batch of ``n`` rows fits into. ValueError, naming it, where one does not."""
        names = [f.name for f in self.schema.fields]
        names += ["discounts", "importance_weights", "handles", "steps"]
        for name, leaf, (size, dtype) in zip(names, leaves, self.sizes(n), strict=True):
            fits = tuple(leaf.shape) == size and leaf.dtype == dtype
            if not fits or not leaf.is_contiguous() or leaf.device != device:
                raise ValueError(
                    f"out.{name} is {leaf.dtype} {tuple(leaf.shape)} on {leaf.device}; expected {dtype} "
                    f"{size}, contiguous, on {device}"
                )
        addresses = tuple(leaf.data_ptr() for leaf in leaves)
        if len(set(addresses)) < len(addresses):
            raise ValueError("out holds the same memory twice; every tensor must have its own")
        return addresses
