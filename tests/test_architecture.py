"""ARCHITECTURE.md names real things."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOOP = (ROOT / "ARCHITECTURE.md").read_text().split("\n## ")[0]  # the table of the loop's steps
TABLE = [line for line in LOOP.splitlines() if line.startswith("|")][2:]


def test_every_row_has_five_columns():
    assert len(TABLE) >= 12
    assert all(len(row.strip("|").split("|")) == 5 for row in TABLE)


def test_python_names_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "python" / "angle_rl").rglob("*.py"))
    for row in TABLE:
        for name in re.findall(r"`([^`]+)`", row.strip("|").split("|")[1]):
            if name.endswith(".py"):
                assert (ROOT / "python" / "angle_rl" / name).exists(), name
                continue
            last = re.sub(r"\(.*", "", name).split(".")[-1]
            assert re.search(rf"(def|class) {last}\b", source) or f".{last}(" in source, name


def test_native_names_exist():
    for row in TABLE:
        cell = row.strip("|").split("|")[2]
        for path, names in re.findall(r"`(\w+/[\w.]+)`([^`]*)", cell):
            source = (ROOT / "csrc" / path).read_text()
            for name in re.findall(r"[a-z_]{4,}", re.sub(r"\(.*?\)", "", names)):
                assert name in source, (path, name)


def test_tests_and_benchmarks_exist():
    for row in TABLE:
        cells = row.strip("|").split("|")
        for name in re.findall(r"`([^`]+)`", cells[3]):
            path, _, function = name.partition("::")
            found = [p for p in (ROOT / path, ROOT / "tests" / path, ROOT / "csrc" / "tests" / path) if p.exists()]
            assert found, name
            assert not function or f"def {function}(" in found[0].read_text(), name
        for script, operations in re.findall(r"`(\w+\.py)` ([\w, ]+)", cells[4]):
            source = (ROOT / "python" / "angle_rl" / "bench" / script).read_text()
            for operation in re.findall(r"\w+", operations):
                assert f'"{operation}"' in source, (script, operation)
