"""The benchmark of meta steps and the study's statistics, at a small size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from angle_rl.bench import meta, meta_study


def test_the_benchmark_writes_shares_and_goals(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meta, "INTERVALS", (1, 2))
    monkeypatch.setattr(meta, "GOALS", {("entropy", 2): 1e9})
    file = tmp_path / "meta.json"
    assert meta.main(["--quick", "--learner", "entropy", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    rows = [row for row in written["rows"] if row["learner"] == "entropy"]
    assert [row["interval"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["share"]) for row in rows)
    assert written["goals"][0]["met"] is True
    assert "share" in capsys.readouterr().out


def test_a_learner_that_learns_nothing_is_no_row():
    settings = meta.Settings(
        capacity=300, batch=256, threads=1, repeats=1, seconds=0.01, quick=True, sections=(), sbx_python=""
    )
    made = meta.make("entropy", "native", 2, settings)
    made.fill(meta.random_rows(300))
    meta.check(made, 2)
    with pytest.raises(RuntimeError, match="2 were due"):
        meta.check(made, 1)  # as if a step were due with every update
    made.state.meta.learners[0].learning_rate = 0.0
    made.state.meta.learners[0].adopt({name: p for name, p in made.state.meta.learners[0].meta_parameters().items()})
    with pytest.raises(RuntimeError, match="changed no meta-parameter"):
        meta.check(made, 2)


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert meta_study.interquartile_mean(np.arange(8.0)) == pytest.approx(3.5)
    assert meta_study.interquartile_mean(np.array([0.0, 1.0, 2.0, 3.0, 1000.0])) == pytest.approx(2.0)
    assert meta_study.interquartile_mean(np.array([[5.0]])) == 5.0


def test_the_interval_covers_the_mean_and_narrows_with_runs():
    generator = np.random.default_rng(1)
    widths = []
    for seeds in (5, 80):
        scores = generator.normal(1.0, 0.1, (3, seeds))
        low, high = meta_study.interval(scores, draws=400)
        assert low < meta_study.interquartile_mean(scores) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_summary_scales_by_random_play_and_the_best_run():
    runs = [
        {"way": way, "environment": "a", "seed": seed, "last": value}
        for way, values in {"meta": (10.0, 8.0), "auto": (6.0, 6.0)}.items()
        for seed, value in enumerate(values)
    ]
    meta_row, auto_row = meta_study.summary(runs, {"a": 2.0}, "last")
    assert meta_row["interquartile_mean"] == pytest.approx(0.875)
    assert auto_row["interquartile_mean"] == pytest.approx(0.5)
    assert auto_row["means"] == {"a": 6.0}
