"""What a device shall reach, held against what was measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from angle_rl.bench.goals import Verdict, shown
from angle_rl.bench.report import FLOOR, Row, is_peer

OURS = "angle"
GRAPH = "angle-cuda_graph"
LARGE, SMALL = 65_536, 256  # rows of a draw
TORCHRL_TIMES, FLOOR_TIMES, SMALL_US = 20.0, 1.5, 15.0
LEAN_TIMES, UPDATES_A_SECOND, PRODUCTS_SHARE = 2.0, 8_000.0, 0.85


@dataclass(frozen=True, kw_only=True)
class DeviceVerdict(Verdict):
    """A verdict whose figure may be a ratio: `ours_us` is what ours took; `floor` and `peer` are microseconds, too."""

    ours_us: float | None = None

    @property
    def over_floor(self) -> float | None:
        """How many times the floor ours took."""
        return None if self.ours_us is None or not self.floor else self.ours_us / self.floor


class Found:
    """The rows, to be asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    def best(self, operation: str, who: str, **wanted: Any) -> Row | None:
        """The fastest row of ours (a library's name), of the peers ("peers") or of the floor, with these columns."""
        found = [
            row
            for row in self._rows
            if row.operation == operation
            and (is_peer(row) if who == "peers" else row.library == who)
            and all(_column(row, name) == value for name, value in wanted.items())
        ]
        return min(found, key=lambda row: row.median_us, default=None)

    def values(self, operation: str, column: str, **wanted: Any) -> list[Any]:
        """What a column holds among such rows, in order, once each."""
        rows = [
            row
            for row in self._rows
            if row.operation == operation and all(_column(row, name) == value for name, value in wanted.items())
        ]
        return list(dict.fromkeys(_column(row, column) for row in rows))


def _column(row: Row, name: str) -> Any:
    return getattr(row, name) if name in Row.__dataclass_fields__ else row.extra.get(name)


def _us(row: Row | None) -> float | None:
    return None if row is None else row.median_us


def _over(first: Row | None, second: Row | None) -> float | None:
    return None if first is None or second is None else first.median_us / second.median_us


def judge_device(rows: Sequence[Row]) -> list[DeviceVerdict]:
    """Every goal, at every capacity that was measured; one that nothing was measured for stands there all the same."""
    found = Found(rows)
    return [*_replay(found), *_updates(found), *_products(found)]


def _replay(found: Found) -> list[DeviceVerdict]:
    verdicts = []
    cheetahs = {"rows": "halfcheetah"}
    for capacity in found.values("sample_update", "capacity", **cheetahs) or [None]:
        where = cheetahs | {"capacity": capacity}
        batch = max(found.values("sample_update", "batch", **where), default=LARGE)
        of = f"{batch:,} of {_millions(capacity)}"
        ours, peer = (found.best("sample_update", who, batch=batch, out=None, **where) for who in (OURS, "peers"))
        floor = found.best("sample_update", FLOOR, batch=batch, **where)
        verdicts.append(
            _verdict(f"sample + update {of}: times TorchRL's", "x", _over(peer, ours), TORCHRL_TIMES, ours, peer, floor)
        )
    for kind in ("4 KB", "halfcheetah"):
        for capacity in found.values("sample_update_graph", "capacity", rows=kind) or [None]:
            where = {"rows": kind, "capacity": capacity}
            batch = max(found.values("sample_update_graph", "batch", **where), default=LARGE)
            if kind == "4 KB":
                ours, floor = (found.best("sample_update_graph", who, batch=batch, **where) for who in (OURS, FLOOR))
                work = f"sample + update {batch:,} rows of 4 KB, of {_millions(capacity)}: times the bytes' floor"
                verdicts.append(_verdict(work, "x", _over(ours, floor), FLOOR_TIMES, ours, None, floor, at_least=False))
                continue
            batch = min(found.values("sample_update_graph", "batch", **where), default=SMALL)
            ours, floor = (found.best("sample_update_graph", who, batch=batch, **where) for who in (OURS, FLOOR))
            peer = found.best("sample_update", "peers", batch=batch, **where)
            work = f"sample + update {batch:,} of {_millions(capacity)} in a graph"
            verdicts.append(_verdict(work, "us", _us(ours), SMALL_US, ours, peer, floor, at_least=False))
    return verdicts


def _updates(found: Found) -> list[DeviceVerdict]:
    verdicts = []
    floor, peer = found.best("learner_update", FLOOR), found.best("learner_update", "peers")
    for calls in found.values("learner_update", "updates_a_call", library=GRAPH) or [None]:
        ours = found.best("learner_update", GRAPH, updates_a_call=calls)
        work = f"SAC update, {calls or 1} a call"
        rate = None if ours is None else 1e6 / ours.median_us
        verdicts += [
            _verdict(f"{work}: times lean-style's", "x", _over(peer, ours), LEAN_TIMES, ours, peer, floor),
            _verdict(work, "/s", rate, UPDATES_A_SECOND, ours, peer, floor),
        ]
    return verdicts


def _products(found: Found) -> list[DeviceVerdict]:
    verdicts = []
    for kind in found.values("wide_update", "rows", library=GRAPH) or [None]:
        ours, floor = (found.best("wide_update", who, rows=kind) for who in (GRAPH, FLOOR))
        share = None if ours is None else ours.extra.get("products_share")
        batch = 32_768 if ours is None else ours.batch
        work = f"share of products, batch {batch:,}, {kind or 'wide'}"
        verdicts.append(_verdict(work, "of 1", share, PRODUCTS_SHARE, ours, None, floor))
    return verdicts


def _verdict(
    work: str,
    unit: str,
    measured: float | None,
    limit: float,
    ours: Row | None,
    peer: Row | None,
    floor: Row | None,
    *,
    at_least: bool = True,
) -> DeviceVerdict:
    return DeviceVerdict(
        work=work,
        unit=unit,
        measured=measured,
        limit=limit,
        at_least=at_least,
        peer=_us(peer),
        peer_name=None if peer is None else peer.library,
        floor=_us(floor),
        ours_us=_us(ours),
    )


def _millions(capacity: int | None) -> str:
    return "-" if capacity is None else f"{capacity / 1e6:g}M"


def device_table(verdicts: Iterable[DeviceVerdict], *, quoted: bool = True) -> str:
    """The verdicts as text, a line each; not `quoted`: only whether there is a figure."""
    figures: tuple[float | None, ...]
    head = "".join(f"{name:>10}" for name in ("ours us", "peer us", "floor us", "x floor"))
    lines = [f"{'goal':<72}{'measured':>10}{'goal':>12}  {'':<18}{head}"]
    for verdict in verdicts:
        limit = f"{'>=' if verdict.at_least else '<='} {shown(verdict.limit)}"
        ran = "not measured" if verdict.measured is None else "ran"
        figures = (verdict.measured, verdict.ours_us, verdict.peer, verdict.floor, verdict.over_floor)
        measured, ours, peer, floor, over = (shown(figure if quoted else None) for figure in figures)
        name = f"  ({verdict.peer_name})" if verdict.peer_name and quoted else ""
        lines.append(
            f"{verdict.work + ', ' + verdict.unit:<72}{measured:>10}{limit:>12}  "
            f"{verdict.words() if quoted else ran:<18}{ours:>10}{peer:>10}{floor:>10}{over:>10}{name}".rstrip()
        )
    return "\n".join(lines)
