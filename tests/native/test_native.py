"""The native tests: built by CMake as a contributor builds them, each program run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "angle_tests": [],
    "angle_stress": ["--seconds", "1"],
    "angle_schedule": [],
    "angle_device": [],
}


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    """Folder of the programs; the preset's own build folder, so that a second run compiles what changed."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    run(["cmake", "--preset", "release"])
    run(["cmake", "--build", "--preset", "release"])
    return ROOT / "build" / "release" / "csrc" / "tests"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_passes(built: Path, program: str) -> None:
    run([str(built / program), *PROGRAMS[program]])


def test_every_program_is_run() -> None:
    listed = (ROOT / "csrc" / "tests" / "CMakeLists.txt").read_text()
    assert set(re.findall(r"^ *add_executable\((\w+)", listed, re.MULTILINE)) == set(PROGRAMS)
