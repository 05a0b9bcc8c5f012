"""What the update benchmark makes of its rows: goals, floors by threads, sweeps, figures, the README's table."""

from __future__ import annotations

import json

import pytest

from angle_rl.bench.goals import goals_table
from angle_rl.bench.headline import BEGIN, END, headline, main, rewritten
from angle_rl.bench.learners import USUAL, Sizes
from angle_rl.bench.report import floor_of, floors, place, summarize, table
from angle_rl.bench.update_cases import Found, found_from_json
from angle_rl.bench.update_goals import GOALS, judge_updates
from angle_rl.bench.update_plots import along, label, plot_updates
from angle_rl.bench.update_sweeps import OPERATION, SWEEPS, about, points


def row(library, microseconds, operation="learner_update", threads=1, batch=256, **extra):
    return summarize(library, operation, [microseconds], capacity=1000, batch=batch, threads=threads, **extra)


ROWS = [
    row("floor", 2500.0),
    row("floor", 1250.0, threads=2),
    row("angle-torch", 7000.0),
    row("angle-native", 2700.0),
    row("angle-native", 2600.0, updates_a_call=32),
    row("angle-native", 1800.0, threads=2),
    row("angle-native", 900.0, batch=64),
    row("angle-native-bf16", 1000.0),
    row("sbx", 4600.0),
    row("sbx", 3600.0, updates_a_call=32),
    row("sbx", 2600.0, threads=2, updates_a_call=32),
    row("angle-native", 2800.0, "train_step"),
    row("angle-torch", 7300.0, "train_step"),
    row("sbx", 4000.0, "train_step"),
    row("torch", 26.0, "act", batch=1),
    row("angle-native", 4.0, "act", batch=1),
    row("angle-native", 1.6e6, "import_to_first_update"),
]


def verdict(work, rows=ROWS):
    return next(found for found in judge_updates(rows) if found.work == work)


def test_goals_take_the_best_of_ours_with_one_update_a_call_on_the_threads_asked_for():
    one = verdict("SAC update, 2x256, batch 256, one core")
    assert (one.measured, one.limit, one.peer, one.peer_name, one.floor) == (2.7, 2.75, 3.6, "sbx, 32 a call", 2.5)
    assert one.met
    two = verdict("SAC update, 2x256, batch 256, two cores")
    assert (two.measured, two.floor, two.met) == (1.8, 1.25, False)
    assert two.words() == "missed by 1.20x"


def test_bfloat16_products_are_a_goal_of_their_own():
    assert verdict("SAC update, bfloat16 products, one core").measured == 1.0
    without = [found for found in ROWS if found.library != "angle-native-bf16"]
    assert verdict("SAC update, bfloat16 products, one core", without).met is None


def test_rates_are_steps_a_second_and_want_to_be_large():
    steps = verdict("HalfCheetah-v5, an update a step, one core")
    assert steps.at_least
    assert steps.measured == pytest.approx(1e6 / 2800)
    assert steps.peer == pytest.approx(250)
    assert steps.met
    assert not verdict("import to the first update, beyond torch").met
    assert verdict("act, one observation").met


def test_every_goal_is_printed_with_how_far_it_was_missed():
    text = goals_table(judge_updates(ROWS))
    assert len(text.splitlines()) == 1 + len(GOALS)
    assert "missed by 1.20x" in text
    assert "not measured" in text


def test_a_row_is_held_against_the_floor_of_its_own_threads():
    below = floors(ROWS)
    assert floor_of(place(ROWS[5]), below).median_us == 1250.0
    assert floor_of(place(ROWS[3]), below).median_us == 2500.0
    only = floors(ROWS[:1])
    assert floor_of(place(ROWS[5]), only).median_us == 2500.0
    assert floor_of(place(ROWS[14]), only) is None
    assert "1.44" in next(line for line in table(ROWS).splitlines() if "1800.000" in line)


def test_a_processs_findings_survive_the_way_to_its_parent():
    found = Found(rows=ROWS, notes=["x: why"], about={"sbx": {"jax": "1"}})
    assert found_from_json(found.to_json()) == found


def test_sweeps_go_through_the_usual_sizes_once():
    every = points(quick=False)
    assert every[0] == USUAL
    assert len(every) == len(set(every)) == 1 + sum(len(sweep.values) - 1 for sweep in SWEEPS)
    for sweep, values in zip(SWEEPS, (64, 1, 32, 2), strict=True):
        assert min(sweep.values) == values
    assert max(SWEEPS[2].values) == 8192
    assert about(Sizes(hidden_sizes=(64, 64), critics=4)) == {"width": 64, "depth": 2, "critics": 4}


def sweep_row(library, sizes, microseconds, threads=1):
    return row(library, microseconds, OPERATION, threads, sizes.batch, **about(sizes))


def test_lines_of_a_sweep_keep_everything_else_as_usual():
    found = [sweep_row("angle-torch", sizes, 1000.0 * place) for place, sizes in enumerate(points(quick=True), 1)]
    assert along(found, "width") == {"angle-torch": [(256, 1.0), (64, 2.0)]}
    assert along(found, "depth") == {"angle-torch": [(2, 1.0), (1, 3.0)]}
    assert along(found, "batch") == {"angle-torch": [(256, 1.0), (32, 4.0)]}
    assert along(found, "critics") == {"angle-torch": [(2, 1.0), (4, 5.0)]}


def test_figures_are_written_where_there_is_something_to_draw(tmp_path):
    assert label(ROWS[4]) == "angle-native, 32 updates a call"
    found = [
        sweep_row(library, sizes, 10.0, threads)
        for library in ("floor", "angle-torch", "angle-native", "sbx")
        for sizes in points(quick=True)
        for threads in (1, 2)
    ]
    written = plot_updates([*ROWS, *found], tmp_path, "update")
    assert [path.name for path in written] == ["update-sweeps.png", "update-threads.png"]
    assert all(path.stat().st_size > 10_000 for path in written)
    assert plot_updates([ROWS[0]], tmp_path, "nothing") == []


def read(rows):
    metadata = {
        "cpu": "A Processor",
        "cores": 2,
        "isa": "avx512",
        "os": "Linux-6",
        "python": "3.11",
        "torch": "2.13",
        "peers": {"tianshou": "2.0"},
        "sbx": {"jax": "0.10"},
        "flashbax": None,
    }
    columns = ("library", "operation", "capacity", "batch", "threads", "median_us", "min_us", "max_us", "rows")
    return {
        "metadata": metadata,
        "rows": [{name: getattr(one, name) for name in columns} | one.extra for one in rows],
    }


def test_the_headline_names_peer_processor_and_threads():
    text = headline([read(ROWS)])
    assert "A Processor, 2 cores (avx512), Linux, Python 3.11, torch 2.13; tianshou 2.0, jax 0.10." in text
    line = "| SAC update, 2x256, batch 256, one core | 1 | 2.7 ms | 3.6 ms (sbx, 32 a call) | 1.33 | 2.5 ms |"
    assert line in text.splitlines()
    assert "| HalfCheetah-v5, an update a step, one core | 1 | 357 steps/s | 250 steps/s (sbx) | 1.43 | - |" in text
    assert "import" not in text  # no peer was measured


def test_the_headline_takes_the_replays_rows_too():
    replay = [
        summarize(library, "sample", [us], capacity=1000, batch=256, threads=1)
        for library, us in (("angle", 10.0), ("cpprb", 40.0), ("floor", 5.0))
    ]
    text = headline([read(replay), read(ROWS)])
    assert "| prioritised sample, 256 | 1 | 10 µs | 40 µs (cpprb) | 4 | 5 µs |" in text
    assert text.count("A Processor") == 1
    with pytest.raises(ValueError, match="beside a peer"):
        headline([read(replay[:1])])


def test_only_what_stands_between_the_markers_is_rewritten(tmp_path, capsys):
    readme, measured = tmp_path / "README.md", tmp_path / "update.json"
    measured.write_text(json.dumps(read(ROWS)))
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert main([str(measured), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n\nA Processor")
        assert text.endswith(f"\n\n{END}\nafter\n")
        assert "old" not in text
    for broken in (f"{END} {BEGIN}", BEGIN, f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="once each"):
            rewritten(broken, "new")
    readme.write_text("no markers")
    assert main([str(measured), "--readme", str(readme)]) == 1
    assert readme.read_text() == "no markers"
    assert "once each" in capsys.readouterr().err
