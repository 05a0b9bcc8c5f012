"""One section of ``angle bench gpu``, in a process of its own or in this one.

``python -m angle_rl.bench.gpu_measure SETTINGS OUTPUT``: settings as JSON; what was found goes into a file after every
part, so that a kernel that crashes or hangs costs no more than its own part's figures.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from angle_rl import device as devices
from angle_rl.bench.gpu_ceilings import measure_ceilings
from angle_rl.bench.gpu_ops import measure_ops
from angle_rl.bench.gpu_replay import measure_replay
from angle_rl.bench.gpu_timing import Ceilings, Place, Settings, card, clocks_now
from angle_rl.bench.gpu_updates import measure_products, measure_updates
from angle_rl.bench.peers import in_short
from angle_rl.bench.update_cases import Found, found_from_json

MEASURES: dict[str, Callable[[Place], None]] = {
    "ceilings": measure_ceilings,
    "replay": measure_replay,
    "updates": measure_updates,
    "ops": measure_ops,
    "products": measure_products,
}


def run_section(settings: Settings, output: Path | None = None) -> tuple[Found, list[str], Ceilings]:
    """What a section finds, the parts of ours that failed, and the ceilings, which the first section measures."""
    place = Place(settings, output)
    gc.collect()
    gc.disable()
    try:
        MEASURES[settings.section](place)
    except Exception as failure:
        place.found.notes.append(f"{settings.section}: {in_short(failure)}")
        place.failed.append(settings.section)
    finally:
        gc.enable()
    clocks = clocks_now() if place.real else None
    place.found.about |= card() if place.real else {}
    if clocks is not None:
        place.found.about[f"clocks after {settings.section}"] = clocks
    place.found.about["ceilings"] = asdict(place.ceilings)
    place.keep()
    return place.found, place.failed, place.ceilings


def run_apart(settings: Settings, seconds: float) -> tuple[Found, list[str], Ceilings]:
    """The same in a fresh process that is ended after so many seconds; what it had found by then is kept."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "angle_rl.bench.gpu_measure", json.dumps(asdict(settings)), str(output)]
        why = None
        try:
            done = subprocess.run(command, env=os.environ, check=False, timeout=seconds)
            if done.returncode != 0:
                why = f"the process ended with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"it was ended after {seconds:.0f} s"
        if output.exists():
            read = json.loads(output.read_text())
            found, failed = found_from_json(json.dumps(read["found"])), list(read["failed"])
        else:
            found, failed = Found(), []
    if why is not None:
        found.notes.append(f"{settings.section}: {why}")
        failed.append(settings.section)
    ceilings = Ceilings(**found.about["ceilings"]) if "ceilings" in found.about else settings.ceilings
    return found, failed, ceilings


def settings_from_json(text: str) -> Settings:
    """Settings as ``run_apart`` passes them on."""
    read = json.loads(text)
    return Settings(**{**read, "ceilings": Ceilings(**read["ceilings"])})


def main() -> int:
    """Runs with the process's arguments."""
    settings = settings_from_json(sys.argv[1])
    if settings.emulated:
        with devices.emulated():
            run_section(settings, Path(sys.argv[2]))
    else:
        run_section(settings, Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
