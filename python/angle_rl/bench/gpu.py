"""``angle bench gpu``: replay, fused operations and updates on a CUDA device, beside peers and floors; the goals."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from angle_rl import device as devices
from angle_rl.bench.goals import as_dicts
from angle_rl.bench.gpu_goals import DeviceVerdict, device_table, judge_device
from angle_rl.bench.gpu_measure import run_apart, run_section
from angle_rl.bench.gpu_timing import SECTIONS, Ceilings, Settings, why_no_device
from angle_rl.bench.report import Row, as_json, metadata, table
from angle_rl.bench.update_cases import Found

LIMIT = 450.0  # seconds that a whole run may take
LIMITS = {"ceilings": 60.0, "replay": 170.0, "updates": 170.0, "ops": 120.0, "products": 120.0}  # of each section
SHORTEST = 15.0  # seconds that a section is given at least, or is not begun
TIMES = ("median_us", "min_us", "max_us")


def run(sections: Sequence[str], *, emulated: bool, quick: bool, limit: float) -> tuple[Found, list[str]]:
    """The sections, one after the other, and the parts of ours that failed. On a device each in its own process."""
    found, failed, ceilings = Found(), [], Ceilings()
    end = time.monotonic() + limit
    for section in SECTIONS:
        if section != "ceilings" and section not in sections:
            continue
        left = end - time.monotonic()
        if left < SHORTEST and not emulated:
            found.notes.append(f"{section}: no time was left of {limit:.0f} s (--limit)")
            failed.append(section)
            continue
        settings = Settings(section=section, emulated=emulated, quick=quick, ceilings=ceilings)
        begin = time.monotonic()
        measure: Callable[[Settings], tuple[Found, list[str], Ceilings]]
        measure = run_section if emulated else partial(run_apart, seconds=min(left, LIMITS[section]))
        part, wrong, ceilings = measure(settings)
        found.rows += part.rows
        found.notes += part.notes
        found.about |= {name: value for name, value in part.about.items() if name != "ceilings"}
        found.about[f"seconds of {section}"] = round(time.monotonic() - begin, 1)
        failed += [f"{section}: {name}" if name != section else section for name in wrong]
    return found, failed


def _without_times(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What ran, and no figure."""
    kept = ("library", "operation", "capacity", "batch", "rows")
    return [{name: getattr(row, name) for name in kept} | dict.fromkeys(TIMES) for row in rows]


def publish(found: Found, failed: Sequence[str], path: Path | None, *, emulated: bool, quick: bool) -> None:
    """Prints where it ran, the rows, what was not measured, and last the goals; writes all of it to `path` as JSON."""
    facts = {**metadata(), **found.about, "emulated": emulated, "quick": quick, "failed": list(failed)}
    verdicts = judge_device(found.rows)
    peers = "  ".join(f"{name} {version}" for name, version in facts["peers"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['os']}")
    print("  ".join(f"{name} {facts[name]}" for name in ("python", "numpy", "torch", "angle_rl")), peers, sep="\n")
    if emulated:
        print("\nemulated: the kernels as compiled for the host, tiny sizes; that they ran is all that this shows")
        for row in found.rows:
            print(f"ran: {row.operation}, batch {row.batch}, capacity {row.capacity}, rows {row.rows}: {row.library}")
    else:
        for name, value in found.about.items():
            if not isinstance(value, dict):
                print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"\n{table(found.rows)}")
    print()
    for note in found.notes:
        print(f"not measured: {note}")
    print(f"\n{device_table(verdicts, quoted=not emulated)}")
    if path is not None:
        path.write_text(_text(found, facts, verdicts, emulated=emulated))


def _text(found: Found, facts: dict[str, Any], verdicts: Sequence[DeviceVerdict], *, emulated: bool) -> str:
    if not emulated:
        goals = [
            {**one, "over_floor": verdict.over_floor} for one, verdict in zip(as_dicts(verdicts), verdicts, strict=True)
        ]
        return as_json(found.rows, found.notes, facts, {"goals": goals})
    ran = [{"work": verdict.work, "unit": verdict.unit, "ran": verdict.measured is not None} for verdict in verdicts]
    kept = {name: value for name, value in facts.items() if name not in found.about}
    whole = {"metadata": kept, "notes": found.notes, "goals": ran, "rows": _without_times(found.rows)}
    return json.dumps(whole, indent=2) + "\n"


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} does not name sections; they are {', '.join(SECTIONS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status.

    1: a part of ours failed, which a line says; the rest is measured and written all the same. 2: there is no device.
    """
    parser = argparse.ArgumentParser(prog="angle bench gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument(
        "--only",
        type=_sections,
        default=SECTIONS,
        metavar="SECTION[,SECTION]",
        help=f"parts to measure (default all; the first always): {', '.join(SECTIONS)}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter turns")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"what a run may take (default {LIMIT:.0f})"
    )
    parser.add_argument(
        "--emulated", action="store_true", help="run the kernels compiled for the host, to see that all of it runs"
    )
    given = parser.parse_args(argv)
    if not given.emulated:
        why = why_no_device()
        if why is not None:
            print(f"angle bench gpu cannot run: {why}; --emulated checks on a CPU that it would", file=sys.stderr)
            return 2
        found, failed = run(given.only, emulated=False, quick=given.quick, limit=given.limit)
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with devices.emulated():
                found, failed = run(given.only, emulated=True, quick=given.quick, limit=given.limit)
        finally:
            torch.set_num_threads(threads)
    publish(found, failed, given.json, emulated=given.emulated, quick=given.quick)
    if given.json is not None:
        print(f"written to {given.json}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
