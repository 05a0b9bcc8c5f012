"""Rows of n steps in float64, straight from the definition: every row ever inserted, walked one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass
class Row:
    """One transition as it was inserted; observations are whatever the caller tells rows apart by."""

    stream: int
    observation: Any
    successor: Any
    reward: float
    terminated: bool = False
    truncated: bool = False
    following: int | None = None  # handle of the stream's next row

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


class Window(NamedTuple):
    reward: float
    successor: Any
    discount: float
    steps: int


@dataclass
class History:
    """All rows by handle. `breaks_show`: a row that does not begin where the stream's last one ended is no
    continuation of it, as where successors are shared."""

    breaks_show: bool = False
    rows: dict[int, Row] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)

    def add(self, handle: int, row: Row) -> None:
        before = self.newest.get(row.stream)
        if before is not None and not (self.breaks_show and self.rows[before].successor != row.observation):
            self.rows[before].following = handle
        self.rows[handle] = row
        self.newest[row.stream] = handle

    def window(self, handle: int, n_step: int, discount: float) -> Window:
        """``sum over i < k of discount**i * r_i``, the k-th row's successor, ``discount**k * (1 - terminated)``, k."""
        members = [self.rows[handle]]
        while len(members) < n_step and not members[-1].ended and members[-1].following is not None:
            members.append(self.rows[members[-1].following])
        last, steps = members[-1], len(members)
        reward = sum(discount**i * row.reward for i, row in enumerate(members))
        return Window(reward, last.successor, 0.0 if last.terminated else discount**steps, steps)
