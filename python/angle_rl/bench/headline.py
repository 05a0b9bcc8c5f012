"""The README's headline table, written from the benchmarks' JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angle_rl.bench import goals, update_goals
from angle_rl.bench.goals import Verdict
from angle_rl.bench.report import Row

BEGIN = "<!-- headline: python benchmarks/headline.py replay.json update.json -->"
END = "<!-- end of headline -->"
COLUMNS = ("work", "threads", "Angle RL", "fastest peer", "times as fast", "floor")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table."""

    threads: int
    verdict: Verdict


def rows_of(read: dict[str, Any]) -> list[Row]:
    """The rows of a benchmark's JSON."""
    columns = set(Row.__dataclass_fields__) - {"extra"}
    return [
        Row(
            **{name: value for name, value in row.items() if name in columns},
            extra={name: value for name, value in row.items() if name not in columns},
        )
        for row in read["rows"]
    ]


def lines_of(read: dict[str, Any]) -> list[Line]:
    """Every goal of either benchmark about speed that was measured beside a peer."""
    rows = rows_of(read)
    samples = {row.capacity for row in rows if (row.operation, row.batch, row.rows) == ("sample", 256, "halfcheetah")}
    threads: list[int]
    if samples:
        verdicts = goals.judge(rows, max(samples))[: len(goals.GOALS)]
        threads = [goal.threads for goal in goals.GOALS]
    else:
        verdicts = update_goals.judge_updates(rows)
        threads = [goal.threads for goal in update_goals.GOALS]
    pairs = zip(threads, verdicts, strict=True)
    return [
        Line(threads=n, verdict=v)
        for n, v in pairs
        if v.measured is not None and v.peer is not None and v.unit != goals.UNITS[goals.BYTES]
    ]


def figure(value: float) -> str:
    """Three digits of a number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_unit(value: float | None, unit: str) -> str:
    """A number with its unit; a dash for None."""
    return "-" if value is None else f"{figure(value)}{'' if unit.startswith('/') else ' '}{unit.replace('us', 'µs')}"


def times_as_fast(verdict: Verdict) -> float:
    """How many times better than the best peer: above 1 is better."""
    assert verdict.measured is not None
    assert verdict.peer is not None
    return verdict.measured / verdict.peer if verdict.at_least else verdict.peer / verdict.measured


def machines(every: Sequence[dict[str, Any]]) -> list[str]:
    """Where and with what the benchmarks ran: a line for each machine and torch, with all peers measured there."""
    found: dict[str, dict[str, str]] = {}
    for metadata in (read["metadata"] for read in every):
        where = (
            f"{metadata['cpu']}, {metadata['cores']} cores ({metadata['isa']}), {metadata['os'].split('-')[0]}, "
            f"Python {metadata['python']}, torch {metadata['torch']}"
        )
        others = [metadata.get(name) or {} for name in ("flashbax", "sbx")]
        peers = found.setdefault(where, {})
        for versions in (metadata["peers"], *others):
            peers.update({name: value for name, value in versions.items() if isinstance(value, str)})
    return [f"{where}; {', '.join(f'{name} {value}' for name, value in found[where].items())}." for where in found]


def headline(every: Sequence[dict[str, Any]]) -> str:
    """The text between the markers, from benchmarks' JSON. ValueError where nothing stands beside a peer."""
    lines = [line for read in every for line in lines_of(read)]
    if not lines:
        raise ValueError("nothing in these files was measured beside a peer")
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    table += [
        (
            line.verdict.work,
            str(line.threads),
            with_unit(line.verdict.measured, line.verdict.unit),
            f"{with_unit(line.verdict.peer, line.verdict.unit)} ({line.verdict.peer_name})",
            f"{figure(times_as_fast(line.verdict))}",
            with_unit(line.verdict.floor, line.verdict.unit),
        )
        for line in lines
    ]
    return "\n".join([*machines(every), "", *(f"| {' | '.join(cells)} |" for cells in table)])


def rewritten(text: str, middle: str) -> str:
    """A text with what stands between the markers replaced. ValueError unless each marker is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must have {BEGIN!r} and then {END!r}, once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}"


def _read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in paths]


def main(argv: list[str] | None = None) -> int:
    """Rewrites the README and returns the exit status."""
    parser = argparse.ArgumentParser(prog="headline.py", description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="what the benchmarks wrote with --json")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="default: README.md in this folder")
    given = parser.parse_args(argv)
    try:
        given.readme.write_text(rewritten(given.readme.read_text(), headline(_read(given.json))))
    except (OSError, ValueError, KeyError) as failure:
        print(f"headline.py: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
