"""The file benchmark's operations at a small size; each asserts what the operation answered."""

from __future__ import annotations

import json

import numpy as np
import pytest

from angle_rl.bench.libraries import Angle
from angle_rl.bench.replay_checks import fill
from angle_rl.bench.replay_files import check, main, plain_read, plain_write
from angle_rl.replay import PrioritizedReplayBuffer

CAPACITY = 8192


@pytest.fixture
def buffer():
    library = Angle(CAPACITY)
    fill(library, CAPACITY)
    return library.buffer


def test_save(benchmark, buffer, tmp_path):
    path = benchmark(lambda: buffer.save(tmp_path / "a"))
    check(buffer, path)


def test_load(benchmark, buffer, tmp_path):
    buffer.save(tmp_path / "a")
    assert len(benchmark(lambda: PrioritizedReplayBuffer.load(tmp_path / "a"))) == CAPACITY


def test_the_floors_write_and_read_all(tmp_path):
    parts = [np.arange(100, dtype=np.uint8), np.zeros(0, np.uint8), np.full(5000, 7, np.uint8)]
    plain_write(tmp_path / "a", [part.data for part in parts])
    assert np.array_equal(plain_read(tmp_path / "a"), np.concatenate(parts))


def test_a_wrong_file_fails_the_check(buffer, tmp_path, monkeypatch):
    other = Angle(CAPACITY).buffer
    monkeypatch.setattr(PrioritizedReplayBuffer, "load", lambda path: other)
    with pytest.raises(RuntimeError, match="differs"):
        check(buffer, tmp_path / "a")


def test_a_run_writes_every_operation(tmp_path, capsys):
    path = tmp_path / "files.json"
    assert main(["--capacity", "2048", "--repeats", "2", "--json", str(path), "--folder", str(tmp_path)]) == 0
    found = {(row["library"], row["operation"]) for row in json.loads(path.read_text())["rows"]}
    assert found == {("angle", "save"), ("angle", "load"), ("floor", "save"), ("floor", "load")}
    assert "x floor" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["files.json"]
    with pytest.raises(SystemExit):
        main(["--capacity", "1"])
