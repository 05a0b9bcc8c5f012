"""The README's examples run as they stand, and its two lines are there for the gate to take."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = {
    section.split("\n")[0]: examples
    for section in README.split("\n## ")
    if (examples := re.findall(r"```python\n(.*?)```", section, re.DOTALL))
}


@pytest.mark.parametrize("section", EXAMPLES)
def test_the_examples_of_a_section_run_one_after_the_other(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for example in EXAMPLES[section]:
        # A thousand steps show that it trains; the figure in the README takes a minute.
        short = re.sub(r"\bsteps=(5000|3000)\b", "steps=1200", example)
        exec(compile(short, "README.md", "exec"), names)


@pytest.mark.parametrize("end", ["angle train", "pytest"])
def test_each_of_the_two_lines_is_there_once(end):
    assert len(re.findall(rf"^python3 -m venv .*&& {end}$", README, re.MULTILINE)) == 1


def test_there_are_examples():
    assert set(EXAMPLES) >= {"Train", "Replay alone", "Fused operations"}
    assert len(EXAMPLES["Replay alone"]) >= 10
