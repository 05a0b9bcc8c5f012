"""Each promise of the replay has a native test that fails without it: faults are put into the core one by one."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from native.mutations import MUTATIONS, Mutation

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-DANGLE_WORD_ACCESS=1", "-w"]
CORE = ["core/layout.cpp", "core/memory.cpp", "kernels/dispatch.cpp", "kernels/kernels_baseline.cpp"]
PROGRAMS = {
    "schedule": [
        *CORE,
        "tests/schedule.cpp",
        "tests/schedule_core.cpp",
        "tests/schedule_deaths.cpp",
        "tests/schedule_rows.cpp",
        "tests/schedule_streams.cpp",
        "tests/scheduled.cpp",
        "tests/scheduled_replay.cpp",
    ],
    "native": [*CORE, "core/replay.cpp", "tests/test_main.cpp", "tests/test_core.cpp"],
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_one(tree: Path, source: str, to: Path) -> None:
    """Compile `source` of the csrc in `tree`; `to` gets the object and, beside it, the list of what it read."""
    to.parent.mkdir(parents=True, exist_ok=True)
    command = [COMPILER, *FLAGS, f"-I{tree}", f"-isystem{tree}/tests/doctest", "-MMD", "-c", str(tree / source)]
    done = subprocess.run([*command, "-o", str(to)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source} does not compile:\n{done.stderr[:4000]}"


def link(objects: list[Path], to: Path) -> None:
    done = subprocess.run([COMPILER, *map(str, objects), "-o", str(to)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def run(program: Path, kind: str, test: str | None) -> subprocess.CompletedProcess[str]:
    arguments = [] if test is None else [test] if kind == "schedule" else [f"--test-case={test}"]
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300, check=False)


@dataclass
class Build:
    """Objects of the unchanged core, for the mutants to share."""

    folder: Path

    def object_of(self, source: str) -> Path:
        return self.folder / "objects" / source.replace(".cpp", ".o")

    def read_by(self, source: str) -> set[str]:
        """The files of csrc that a source's object was made from."""
        listed = self.object_of(source).with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return {str(Path(path).relative_to(CSRC)) for path in listed if Path(path).is_relative_to(CSRC)}

    def make_all(self, workers: ThreadPoolExecutor) -> None:
        sources = sorted({source for program in PROGRAMS.values() for source in program})
        list(workers.map(lambda source: compile_one(CSRC, source, self.object_of(source)), sources))
        for kind, program in PROGRAMS.items():
            link([self.object_of(source) for source in program], self.folder / kind)

    def try_mutant(self, mutation: Mutation) -> str:
        """What became of a mutant: "caught", or why not."""
        folder = self.folder / mutation.name.replace(" ", "_")
        try:
            return self.try_in(folder, mutation)
        finally:
            shutil.rmtree(folder)

    def try_in(self, folder: Path, mutation: Mutation) -> str:
        tree = folder / "csrc"
        shutil.copytree(CSRC, tree)
        changed = set()
        for file, text, replacement in mutation.edits:
            source = (tree / file).read_text()
            if source.count(text) != 1:
                return f"{file} holds this text {source.count(text)} times, not once:\n{text}"
            (tree / file).write_text(source.replace(text, replacement))
            changed.add(file)
        kind, test = mutation.caught_by
        objects = []
        for source in PROGRAMS[kind]:
            if self.read_by(source) & changed:
                compile_one(tree, source, folder / source.replace(".cpp", ".o"))
                objects.append(folder / source.replace(".cpp", ".o"))
            else:
                objects.append(self.object_of(source))
        link(objects, folder / kind)
        done = run(folder / kind, kind, test)
        if done.returncode == 1:
            return "caught"
        shown = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return f"{kind} {test!r} ended with {done.returncode} on it:\n{shown}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Mutation's name to what became of it; the unchanged core passes the same tests first."""
    build = Build(tmp_path_factory.mktemp("mutants"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as workers:
        build.make_all(workers)
        tests = sorted({mutation.caught_by for mutation in MUTATIONS})
        for (kind, test), done in zip(tests, workers.map(lambda t: run(build.folder / t[0], *t), tests), strict=True):
            assert done.returncode == 0, f"{kind} {test!r} fails on the unchanged core:\n{done.stdout}{done.stderr}"
        found = list(workers.map(build.try_mutant, MUTATIONS))
    return dict(zip((mutation.name for mutation in MUTATIONS), found, strict=True))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_fault_is_caught(mutation: Mutation, outcomes: dict[str, str]) -> None:
    assert outcomes[mutation.name] == "caught"


def test_every_promise_has_a_fault() -> None:
    assert {mutation.promise for mutation in MUTATIONS} == set(range(1, 8))
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
