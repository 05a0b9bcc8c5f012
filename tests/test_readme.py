"""The README's examples run as they stand, and its two lines are there for the gate to take."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A thousand steps show that it trains; the figure in the README takes a minute.
    exec(compile(example.replace("steps=5000", "steps=1200"), "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("end", ["angle train", "pytest"])
def test_each_of_the_two_lines_is_there_once(end):
    assert len(re.findall(rf"^python3 -m venv .*&& {end}$", README, re.MULTILINE)) == 1


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
