"""Randomness inside a recorded update: which keys it draws from is written down once, and worked out for each launch.

A graph cannot hold a key, or every launch would draw the same. So the update is given a `GraphKey`, which looks like a
`RandomKey` and notes how it is split and what is drawn with it. Before a launch the host does the same splits with the
keys of that launch, and the numbers go to the device, where kernels read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from angle_rl import _core, device
from angle_rl.types import RandomKey


class CannotCaptureError(RuntimeError):
    """Says why an update cannot be recorded, in a few words."""


@dataclass(kw_only=True)
class DrawProgram:
    """How an update's keys are split and what is drawn with them, in order.

    Keys are numbered: first the updates' own, then each one split off, as it was split off.
    """

    roots: int  # updates
    splits: list[tuple[int, int]] = field(default_factory=list)  # the key that was split, and which of its parts
    # The key, and what is drawn: None, its own value, for normals and uniforms; (n, size): a subset
    draws: list[tuple[int, tuple[int, int] | None]] = field(default_factory=list)

    @property
    def entries(self) -> int:
        """How many numbers `values` gives."""
        return sum(1 if subset is None else subset[1] for _, subset in self.draws)

    def values(self, roots: Sequence[RandomKey]) -> list[int]:
        """What goes to the device for these updates' keys, as int64. About 0.3 us a key."""
        keys = [key.value for key in roots]
        for parent, part in self.splits:
            keys.append(_core.philox_split(keys[parent], part))
        values: list[int] = []
        for key, subset in self.draws:
            values += [signed(keys[key])] if subset is None else RandomKey(keys[key]).subset(*subset)
        return values


class Draws:
    """Hands out an update's keys and writes down what becomes of them, or compares it with what was written down.

    Args:
        roots: the updates' keys; read only while nothing was written down yet, to draw at once.
        home: where what is drawn shall be.
        known: what was written down when the same updates were taken before.
        numbers: ``[known.entries]`` int64 on the device, what `known.values` gives for the keys of a launch.
    """

    def __init__(
        self,
        roots: Sequence[RandomKey],
        home: torch.device,
        known: DrawProgram | None = None,
        numbers: torch.Tensor | None = None,
    ) -> None:
        self.program = DrawProgram(roots=len(roots))
        self.home = home
        self._known = known
        self._numbers = numbers
        self._used = 0  # of the numbers
        self._keys = list(roots)
        self.refusal: str | None = None  # why this can be taken once, and not recorded

    def keys(self) -> list[GraphKey]:
        """The updates' keys."""
        return [GraphKey(self, index) for index in range(self.program.roots)]

    def finish(self) -> DrawProgram:
        """What was written down. CannotCaptureError where it differs from before."""
        if self._known is not None and self._known != self.program:
            raise CannotCaptureError("it does not draw the same random numbers in every update")
        return self.program

    def split(self, key: int, n: int) -> list[int]:
        """The numbers of the keys that one splits into."""
        first = self.program.roots + len(self.program.splits)
        self.program.splits += [(key, part) for part in range(n)]
        if self._numbers is None:
            self._keys += self._keys[key].split(n)
        return list(range(first, first + n))

    def place(self, key: int, subset: tuple[int, int] | None = None) -> tuple[torch.Tensor, int]:
        """The tensor, int64 on the device, and the index in it, where the numbers of this draw are."""
        self.program.draws.append((key, subset))
        if self._numbers is None:
            own = self._keys[key]
            values = [signed(own.value)] if subset is None else own.subset(*subset)
            return torch.tensor(values, device=self.home), 0
        if len(self.program.draws) > len(self._known.draws if self._known is not None else ()):
            raise CannotCaptureError("it does not draw the same random numbers in every update")
        index, self._used = self._used, self._used + (1 if subset is None else subset[1])
        return self._numbers, index

    def seed(self, key: int) -> int:
        """What another generator is to be seeded with; nothing that could be recorded."""
        self.refusal = "it seeds a generator of torch's from its key"
        if self._numbers is not None:
            raise CannotCaptureError(self.refusal)
        return self._keys[key].seed()


class GraphKey:
    """What an update draws with: a `RandomKey` whose value is not known while the update is recorded.

    `split`, `normal`, `uniform` and `subset` as there, with tensors on the device. An update that asks for a `seed` can
    be taken, but not recorded: what a generator of torch's draws after it would be the same in every launch.
    """

    def __init__(self, draws: Draws, index: int) -> None:
        self._draws = draws
        self._index = index

    def split(self, n: int = 2) -> tuple[GraphKey, ...]:
        """``n`` independent keys."""
        if n < 1:
            raise ValueError(f"n is {n}; a key splits into at least 1")
        return tuple(GraphKey(self._draws, index) for index in self._draws.split(self._index, n))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normals of the given shape, float32 or float64, on the device."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; normals come in torch.float32 and torch.float64")
        out = torch.empty(shape, dtype=dtype, device=self._draws.home)
        device.normals(*self._draws.place(self._index), out)
        return out

    def uniform(self, *shape: int) -> torch.Tensor:
        """float64 uniforms in [0, 1) of the given shape, on the device."""
        out = torch.empty(shape, dtype=torch.float64, device=self._draws.home)
        device.uniforms(*self._draws.place(self._index), out)
        return out

    def subset(self, n: int, size: int) -> torch.Tensor:
        """``size`` of the numbers below ``n``, ``[size]`` int64 on the device; see `RandomKey.subset`."""
        numbers, index = self._draws.place(self._index, (n, size))
        return numbers[index : index + size]

    def seed(self) -> int:
        """As of `RandomKey`. CannotCaptureError where the key has no value yet."""
        return self._draws.seed(self._index)


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
