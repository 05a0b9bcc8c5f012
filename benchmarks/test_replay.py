"""The replay benchmark's operations at a small size; each asserts what the operation answered."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from angle_rl import _core
from angle_rl.bench import peers
from angle_rl.bench.flashbax_process import Flashbax
from angle_rl.bench.libraries import Angle, AngleUniform
from angle_rl.bench.replay import at_least_one, main
from angle_rl.bench.replay_checks import check_floor, check_library, check_statistics, compare_draws, fill
from angle_rl.bench.report import Row, table
from angle_rl.bench.rows import SMALL, check_indices, check_rows, make_rows
from angle_rl.bench.timing import calibrate, clock, one_setting, race, round_robin

CAPACITY = 8192
BATCH = 256


@pytest.fixture
def angle():
    library = Angle(CAPACITY)
    fill(library, CAPACITY)
    return library


def fresh(count):
    return make_rows(np.arange(CAPACITY, CAPACITY + count, dtype=np.int64))


def test_insert(benchmark, angle):
    row = angle.ready_row(fresh(1), 0)
    handles = benchmark(lambda: angle.insert(row))
    assert handles.shape == (1,)
    assert handles[0] >= CAPACITY


def test_insert_batch(benchmark, angle):
    rows = angle.ready_rows(fresh(1024))
    handles = benchmark(lambda: angle.insert_many(rows))
    assert np.array_equal(np.diff(handles), np.ones(1023))


def test_sample(benchmark, angle):
    batch = benchmark(lambda: angle.sample(BATCH))
    check_indices(angle.arrays(batch), CAPACITY, CAPACITY, "angle")


def test_sample_out(benchmark, angle):
    batch = benchmark(lambda: angle.sample_out(BATCH))
    check_indices(angle.arrays(batch), CAPACITY, CAPACITY, "angle")


def test_update(benchmark, angle):
    handles = angle.handles(angle.sample(BATCH))
    errors = angle.ready_errors(np.ones(BATCH, np.float32))
    assert benchmark(lambda: angle.update(handles, errors)) == 0


def test_cycle(benchmark, angle):
    row = angle.ready_row(fresh(1), 0)
    errors = angle.ready_errors(np.ones(BATCH, np.float32))

    def cycle():
        angle.insert(row)
        batch = angle.sample(BATCH)
        return batch, angle.update(angle.handles(batch), errors)

    batch, refused = benchmark(cycle)
    assert refused == 0
    check_rows(angle.arrays(batch), "angle")


def test_uniform_sample(benchmark):
    library = AngleUniform(CAPACITY)
    fill(library, CAPACITY)
    batch = benchmark(lambda: library.sample(BATCH))
    check_indices(library.arrays(batch), CAPACITY, CAPACITY, "angle")


def test_concurrent(angle):
    row = angle.ready_row(fresh(1), 0)
    errors = angle.ready_errors(np.ones(BATCH, np.float32))
    calls = race([lambda: angle.insert(row), lambda: angle.update(angle.handles(angle.sample(BATCH)), errors)], 0.2)
    assert [len(each) > 0 and each.min() > 0 for each in calls] == [True, True]
    assert len(angle.buffer) == CAPACITY
    assert angle.buffer.stats()["inserts"] == CAPACITY + len(calls[0])
    check_rows(angle.arrays(angle.sample(BATCH)), "angle")


def test_floor(benchmark):
    floor = _core.ReplayFloor(CAPACITY, 1)
    benchmark(lambda: floor.cycle(BATCH, 1))
    assert floor.sums_agree()
    assert len(floor.indices()) == BATCH


def test_floor_refuses_zero():
    with pytest.raises(ValueError, match="capacity is 0"):
        _core.ReplayFloor(0, 1)
    floor = _core.ReplayFloor(8, 1)
    with pytest.raises(ValueError, match="batch and iterations"):
        floor.sample(0, 1)
    with pytest.raises(ValueError, match="beyond the capacity"):
        floor.weight(8)


@pytest.mark.parametrize("capacity", [1, 7, 1000, 5000, 20_000])
def test_floor_draws_what_it_claims(capacity):
    check_floor(capacity)


def test_small_rows_pass_the_check():
    library = Angle(CAPACITY, SMALL)
    fill(library, CAPACITY)
    assert library.buffer._core.record_bytes == 64
    batch = library.arrays(library.sample(BATCH))
    assert batch.observations.shape == (BATCH, 3)
    check_indices(batch, CAPACITY, CAPACITY, "angle")


def test_draws_are_a_multinomials():
    found = check_statistics(capacity=20_000, draws=400_000)
    assert len(found) == 8  # two priorities in two halves, independent and stratified
    assert all(drawn.good for drawn in found)
    assert {drawn.rows for drawn in found if drawn.priority == 1e-3 and drawn.half == "first"} <= set(range(900, 1100))


def test_wrong_draws_fail_the_statistics():
    generator = np.random.default_rng(0)
    rows, draws = 2000, 200_000
    priorities = np.where(np.arange(rows) % 10 == 0, 1e-3, 1.0)
    due = priorities / priorities.sum()
    fair = generator.multinomial(draws, due)
    assert all(drawn.good for drawn in compare_draws(fair, priorities, "independent"))
    lost = due * np.where((priorities < 1) & (np.arange(rows) >= rows // 2), 0.1, 1.0)
    lost_rows = generator.multinomial(draws * 50, lost / lost.sum())
    bad = [drawn for drawn in compare_draws(lost_rows, priorities, "independent") if not drawn.good]
    assert [(drawn.half, drawn.priority) for drawn in bad] == [("second", 1e-3)]
    even = np.round(draws * due).astype(np.int64)  # too regular for independent draws, and welcome from stratified ones
    assert not all(drawn.good for drawn in compare_draws(even, priorities, "independent"))
    assert all(drawn.good for drawn in compare_draws(even, priorities, "stratified") if drawn.priority == 1)
    clumped = 2 * generator.multinomial(draws // 2, due)
    assert not any(drawn.good for drawn in compare_draws(clumped, priorities, "stratified") if drawn.priority == 1)


@pytest.mark.parametrize("kind", [Angle, AngleUniform])
def test_our_answers_pass_the_check(kind):
    check_library(kind)


@pytest.mark.parametrize("kind", peers.KINDS, ids=lambda kind: kind.__name__)
def test_peers_answers_pass_the_check(kind):
    why = peers.why_not(kind, lambda kind: kind(8))
    if why is not None:
        pytest.skip(why)
    check_library(kind)


def test_a_failing_peer_is_named_with_its_reason():
    def absent(capacity):
        raise ImportError("undefined symbol: tree\nand more")

    assert peers.why_not(absent, lambda kind: kind(8)) == "absent: undefined symbol: tree"
    assert peers.why_not(Angle, lambda kind: kind(8)) is None


class Swapped(AngleUniform):
    """A replay that mixes its rows up."""

    def arrays(self, batch):
        sampled = super().arrays(batch)
        return sampled._replace(rewards=np.roll(sampled.rewards, 1))


class Blind(Angle):
    """A replay that ignores new priorities."""

    def update(self, handles, td_errors):
        return 0


class Stale(Angle):
    """A replay that names the wrong rows."""

    def arrays(self, batch):
        sampled = super().arrays(batch)
        return sampled._replace(indices=sampled.indices + 1)


@pytest.mark.parametrize(
    ("kind", "complaint"), [(Swapped, "rewards do not belong"), (Blind, "drew groups"), (Stale, "newest one")]
)
def test_wrong_answers_fail_the_check(kind, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        check_library(kind)


def test_flashbax_says_why_not(tmp_path):
    with pytest.raises(RuntimeError, match="does not start"):
        Flashbax(str(tmp_path / "python"), CAPACITY, BATCH)


def test_clocks_take_turns():
    order = []
    clocks = [clock(lambda name=name: order.append(name)) for name in "ab"]
    times = round_robin(clocks, repeats=3, seconds=1e-5)
    assert [len(found) for found in times] == [3, 3]
    assert all(value > 0 for found in times for value in found)
    assert calibrate(clock(lambda: None), 1e-5, multiple=4) % 4 == 0
    turns = "".join(order).replace("aa", "a")
    assert turns.rindex("a") > turns.index("b")


def test_settings_are_put_back():
    import gc

    import torch

    before = torch.get_num_threads()
    with one_setting(1):
        assert torch.get_num_threads() == 1
        assert not gc.isenabled()
    assert gc.isenabled()
    assert torch.get_num_threads() == before


def test_a_race_raises_what_a_thread_raised():
    def fail():
        raise ArithmeticError("learner")

    with pytest.raises(ArithmeticError, match="learner"):
        race([lambda: None, fail], 5.0)


def test_table_shows_both_ratios():
    common = {"operation": "sample", "capacity": 10, "batch": 4, "threads": 1, "min_us": 1.0, "max_us": 9.0}
    rows = [
        Row(library="floor", median_us=2.0, **common),
        Row(library="angle", median_us=4.0, **common),
        Row(library="cpprb", median_us=12.0, **common),
        Row(library="tianshou", median_us=20.0, **common),
    ]
    rows.append(
        Row(
            library="angle",
            operation="sample",
            capacity=10,
            batch=4,
            threads=1,
            median_us=3.0,
            min_us=1.0,
            max_us=9.0,
            rows="atari",
        )
    )
    text = table(rows)
    assert "sample  batch 4  capacity 10  rows atari" in text
    lines = {line.split()[0]: line.split() for line in text.split("\n\n")[0].splitlines()[2:]}
    assert lines["angle"][-2:] == ["2.00", "3.00"]
    assert lines["cpprb"][-2:] == ["6.00", "1.00"]
    assert lines["floor"][-2:] == ["1.00", "-"]


def test_bad_arguments_are_refused(capsys):
    assert at_least_one("3") == 3
    for arguments in (["--batch", "0"], ["--repeats", "-1"], ["--only", "coffee"], ["--capacity", "100"]):
        with pytest.raises(SystemExit):
            main(arguments)
    complaints = capsys.readouterr().err
    assert "must be at least 8192" in complaints
    assert "'coffee' does not name sections; they are table, batch, threads" in complaints


def test_one_section_alone(tmp_path, capsys):
    path = tmp_path / "draws.json"
    assert main(["--quick", "--only", "statistics", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["rows"] == []
    assert len(written["statistics"]) == 8
    assert {goal["met"] for goal in written["goals"]} == {None}
    assert "as due" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_quick_run_writes_every_operation(tmp_path, capsys):
    path = tmp_path / "replay.json"
    assert main(["--quick", "--capacity", "4096", "--repeats", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    ours = {row["operation"] for row in written["rows"] if row["library"] == "angle"}
    names = "insert insert_batch sample sample_out update cycle uniform_sample native_insert native_cycle"
    names += " concurrent_insert concurrent_cycle concurrent_cycle_out"
    assert set(names.split()) <= ours
    if "not measured: processes" not in capsys.readouterr().out:
        assert {"process_insert", "process_cycle", "process_native_insert", "process_native_cycle"} <= ours
        assert (tmp_path / "replay-processes.png").stat().st_size > 0
    assert {"library", "operation", "rows", "capacity", "batch", "threads", "median_us", "min_us", "max_us"} <= set(
        written["rows"][0]
    )
    assert {row["rows"] for row in written["rows"]} >= {"halfcheetah", "32 bytes", "atari"}
    assert written["metadata"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for sweep in ("capacity", "batch", "threads"):
        assert (tmp_path / f"replay-{sweep}.png").stat().st_size > 0
