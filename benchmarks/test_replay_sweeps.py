"""The replay benchmark's races, goals, Atari rows and figures, at a small size."""

from __future__ import annotations

import numpy as np
import pytest

from angle_rl import _core
from angle_rl.bench import goals, replay_atari, replay_processes
from angle_rl.bench.libraries import Angle
from angle_rl.bench.replay_cases import Settings, insert_cases, prioritized_cases
from angle_rl.bench.replay_checks import fill
from angle_rl.bench.replay_plots import plot_all
from angle_rl.bench.replay_processes import process_rows
from angle_rl.bench.replay_race import thread_rows
from angle_rl.bench.replay_sweeps import capacity_rows
from angle_rl.bench.report import Row

SETTINGS = Settings(capacity=8192, batches=(256,), threads=1, repeats=1, seconds=0.002, race_seconds=0.1, quick=True)


@pytest.fixture
def angle():
    library = Angle(SETTINGS.capacity)
    fill(library, SETTINGS.capacity)
    return library


def row(operation, value=1.0, library="angle", **columns):
    given = {"capacity": 8192, "batch": 256, "threads": 1, "rows": "halfcheetah", "extra": {}, **columns}
    return Row(library=library, operation=operation, median_us=value, min_us=value, max_us=value, **given)


def test_native_race(angle):
    found = angle.buffer._core.race(_core.RaceOptions(seconds=0.1, first_row=8192, check_every=1))
    assert found["inserts"]["calls"] > 0
    assert found["checked_rows"] == 256 * found["cycles"]["calls"] > 0
    assert angle.buffer.stats()["inserts"] == 8192 + found["inserts"]["calls"]
    assert angle.buffer._core.sums_are_exact()


def test_native_race_refuses_other_rows():
    buffer = replay_atari.Angle(64).buffer
    with pytest.raises(ValueError, match="17 observations, 6 actions"):
        buffer._core.race(_core.RaceOptions(seconds=0.1))
    with pytest.raises(ValueError, match="batch is 0"):
        Angle(8).buffer._core.race(_core.RaceOptions(batch=0))
    with pytest.raises(ValueError, match="buffer is empty"):
        Angle(8).buffer._core.race(_core.RaceOptions(inserters=0, seconds=0.1))


def test_updates_are_of_rows_that_live(angle):
    insert = insert_cases(angle, SETTINGS.capacity)[0]
    cases = {case.operation: case for case in prioritized_cases(angle, SETTINGS.capacity, 256)}
    insert.run(SETTINGS.capacity)  # overwrites every row
    cases["update"].run(50)
    assert angle.buffer.stats()["refused_updates"] == 0
    insert.run(SETTINGS.capacity)
    with pytest.raises(RuntimeError, match="priorities were refused"):
        cases["update"].run(1)


def test_threads(angle, tmp_path):
    rows = thread_rows([angle], SETTINGS)
    found = {(row.operation, row.threads) for row in rows if row.library == "angle"}
    names = ("native_insert", "native_cycle", "concurrent_insert", "concurrent_cycle", "concurrent_cycle_out")
    assert found == {(name, threads) for name in names for threads in (1, 2)}
    assert all(row.extra["per_second"] > 0 for row in rows)
    assert {row.operation for row in rows if row.library == "floor"} == set(names)
    assert [path.name for path in plot_all(rows, tmp_path / "new", "a")] == ["a-threads.png"]


def test_processes(tmp_path):
    rows, notes = process_rows(SETTINGS)
    if notes:
        pytest.skip(notes[0])
    found = {(row.operation, row.threads) for row in rows if row.library == "angle"}
    names = [f"process{loop}_{work}" for loop in ("", "_native") for work in ("insert", "cycle")]
    assert found == {(name, count) for name in names for count in (1, 2, 4)}
    assert [path.name for path in plot_all(rows, tmp_path, "b")] == ["b-processes.png"]


def test_a_failing_worker_is_reported(monkeypatch):
    try:
        library = Angle(512, shared=True)
    except (TypeError, RuntimeError, OSError) as failure:
        pytest.skip(str(failure))
    workers = replay_processes.Workers(library.buffer, 256, 1)
    try:
        with pytest.raises(RuntimeError, match="buffer is empty"):
            workers.run("native", ("cycle",), 0.1)
        workers.processes[0].kill()
        with pytest.raises((RuntimeError, OSError)):
            workers.run("native", ("insert",), 0.1)
    finally:
        workers.close()
    assert not workers.processes[0].is_alive()


def test_capacities_beside_the_floor(tmp_path):
    rows, notes = capacity_rows([], SETTINGS, (1024, 4096))
    assert notes == []
    assert {(row.library, row.capacity) for row in rows} == {
        (library, capacity) for library in ("angle", "floor") for capacity in (1024, 4096)
    }
    assert {row.extra["record_bytes"] for row in rows if row.operation == "insert" and row.library == "angle"} == {64}
    assert [path.name for path in plot_all(rows, tmp_path, "c")] == ["c-capacity.png"]


def test_what_memory_does_not_allow_is_noted():
    rows, notes = capacity_rows([], SETTINGS, (10**13,))
    assert rows == []
    assert len(notes) == 1
    assert "GiB are needed" in notes[0]


def test_atari_rows(monkeypatch):
    monkeypatch.setattr(replay_atari, "QUICK_CAPACITY", 300)
    rows, _ = replay_atari.atari_rows(SETTINGS)
    assert {"sample", "sample_out"} == {row.operation for row in rows if row.library == "angle"}
    assert {row.rows for row in rows} == {"atari"}


def test_atari_rows_must_be_whole():
    rows = replay_atari.make_rows(np.arange(5, 9))
    assert rows.observations[0, :, 0, 0].tolist() == [2, 3, 4, 5]
    assert replay_atari.make_rows(np.arange(2)).observations[1, :, 0, 0].tolist() == [0, 0, 0, 1]
    replay_atari.check_rows(rows, 5, 8, "x")
    with pytest.raises(RuntimeError, match="not one of those kept, 6 to 8"):
        replay_atari.check_rows(rows, 6, 8, "x")
    rows.next_observations[2, 1, 50, 50] += 1
    with pytest.raises(RuntimeError, match="x: sampled next_observations do not belong"):
        replay_atari.check_rows(rows, 5, 8, "x")


def test_goals_are_judged():
    rows = [
        row("sample", 12.0),
        row("sample", 99.0, capacity=100),
        row("sample", 50.0, library="cpprb"),
        row("sample", 40.0, library="tianshou"),
        row("sample", 6.0, library="floor"),
        row("update", 9.0),
        row("concurrent_cycle", extra={"per_second": 6000}, threads=2),
        row("concurrent_cycle", extra={"per_second": 50_000}, threads=1),
        row("native_insert", extra={"per_second": 5_000_000}, batch=1, threads=2),
        row("insert", 1.0, batch=1, extra={"bytes_a_row": 206.5}),
        row("sample", 700.0, rows="atari", capacity=2000),
        row("cycle", 10.0, rows="32 bytes", capacity=100_000),
        row("cycle", 30.0, rows="32 bytes", capacity=10_000_000),
    ]
    verdicts = {verdict.work: verdict for verdict in goals.judge(rows, 8192)}
    first = verdicts["prioritised sample, 256"]
    assert (first.measured, first.peer, first.peer_name, first.floor) == (12.0, 40.0, "tianshou", 6.0)
    assert first.words() == "met"
    assert first.floors == (2.0, pytest.approx(15 / 6.2))
    assert verdicts["update 256 priorities"].floors is None  # no floor was measured
    assert verdicts["update 256 priorities"].words() == "missed by 1.50x"
    cycles = verdicts["one inserting, one learning, Python threads: cycles"]
    assert (cycles.measured, cycles.words()) == (6000, "missed by 2.00x")
    assert verdicts["the same, native threads: inserts"].met
    assert verdicts["bytes a row"].met
    assert verdicts["Atari rows, sample 256"].missed_by == pytest.approx(700 / 600)
    assert verdicts["cycle, batch 256: 10M rows over 100k"].words() == "missed by 1.20x"
    assert verdicts["sample 8192"].words() == "not measured"
    lines = goals.goals_table(verdicts.values()).splitlines()
    assert len(lines) == 1 + len(verdicts)
    assert goals.as_dicts([first])[0]["met"] is True
