"""What a run leaves: folder, config, metrics, rotation, resuming, the learning curve, the progress bar."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from angle_rl import checkpoint, runs
from angle_rl.runs import Progress, create_run, resume_run


def make(root, **options):
    arguments = {
        "environment": "Pendulum-v1",
        "agent": "sac",
        "seed": 3,
        "config": {"a": 1},
        "loggers": ("jsonl",),
    }
    return create_run(root, **{**arguments, **options})


def steps_of(folder):
    return [int(path.name.removeprefix("step-")) for path in runs.list_checkpoints(folder)]


def test_the_folder_is_named_after_the_run_and_never_reused(tmp_path):
    names = [make(tmp_path / "runs").folder.name for _ in range(3)]
    assert names == ["Pendulum-v1-sac-3", "Pendulum-v1-sac-3-2", "Pendulum-v1-sac-3-3"]
    assert make(tmp_path, environment="ALE/Pong-v5").folder.parent == tmp_path
    assert (tmp_path / "ALE-Pong-v5-sac-3").is_dir()


@pytest.mark.parametrize(
    ("text", "name"),
    [("../../etc", "etc"), ("module:Env-v0", "module-Env-v0"), ("..", "unnamed"), ("a b", "a-b")],
)
def test_safe_names(text, name):
    assert runs.safe_name(text) == name


def test_the_config_comes_back(tmp_path):
    config = {"training": {"steps": 10, "environment": "Pendulum-v1"}, "x": [1.5, None]}
    run = make(tmp_path, config=config)
    assert runs.read_config(run.folder) == config
    with pytest.raises(ValueError, match="is no run"):
        runs.read_config(tmp_path)
    (run.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        runs.read_config(run.folder)


def test_bad_arguments_make_no_folder(tmp_path):
    for options in ({"loggers": ("csv",)}, {"loggers": "jsonl"}, {"keep_checkpoints": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(tmp_path, **options)
    with pytest.raises(TypeError):
        make(tmp_path, config={"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_flushed_line_by_line_and_strict_json(tmp_path):
    run = make(tmp_path)
    run.log(1, {"loss/critic": 0.5, "entropy_coefficient": np.float32(1.0)})
    run.log(2, {"loss/critic": math.nan, "loss/policy": torch.tensor(2.0)})

    def refuse(name):
        raise AssertionError(name)

    text = (run.folder / "metrics.jsonl").read_text()  # before closing
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert lines == [
        {"step": 1, "loss/critic": 0.5, "entropy_coefficient": 1.0},
        {"step": 2, "loss/critic": None, "loss/policy": 2.0},
    ]
    assert runs.read_metrics(run.folder) == lines
    run.close()
    run.close()


def test_a_line_cut_short_is_left_out_and_a_damaged_one_named(tmp_path):
    run = make(tmp_path)
    run.log(1, {"a": 1})
    run.close()
    file = run.folder / "metrics.jsonl"
    whole = file.read_text()
    for cut in range(1, len(whole)):
        file.write_text(whole + whole[:cut])
        assert [line["step"] for line in runs.read_metrics(run.folder)][:1] == [1]
    file.write_text("nonsense\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        runs.read_metrics(run.folder)


def test_tensorboard_holds_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make(tmp_path, loggers=("jsonl", "tensorboard")) as run:
        for step in (1, 5, 9):
            run.log(step, {"evaluation/mean_return": step * 2.0})
    with resume_run(run.folder, step=5, loggers=("tensorboard",)) as resumed:
        resumed.log(7, {"evaluation/mean_return": 70.0})
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("evaluation/mean_return")] == [(1, 2), (5, 10), (7, 70)]


def test_no_logger_leaves_no_logs(tmp_path):
    with make(tmp_path, loggers=()) as run:
        run.log(1, {"a": 1.0})
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path):
    run = make(tmp_path, keep_checkpoints=2)
    assert runs.newest_checkpoint(run.folder) is None
    assert runs.best_checkpoint(run.folder) is None
    returns = {10: -5.0, 20: -1.0, 30: -3.0, 40: math.nan, 50: -1.0}
    saved = []
    for step, mean in returns.items():
        run.save_checkpoint(step, {"a": torch.tensor(step)}, {"steps": step})
        saved.append(run.save_best(mean, {"a": torch.tensor(step)}, {"steps": step}))
    assert saved == [True, True, False, False, False]
    assert steps_of(run.folder) == [40, 50]
    assert runs.newest_checkpoint(run.folder).name == "step-00000050"
    tensors, state = checkpoint.load(runs.best_checkpoint(run.folder))
    assert (tensors["a"].item(), state) == (20, {"steps": 20, "best_return": -1.0})
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [
        "best",
        "step-00000040",
        "step-00000050",
    ]


def test_many_digits_sort_by_number(tmp_path):
    run = make(tmp_path, keep_checkpoints=3)
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        run.save_checkpoint(step, {}, {})
    assert steps_of(run.folder) == [99_999_999, 100_000_000, 1_000_000_000]


def test_a_resumed_run_reads_as_if_never_interrupted(tmp_path):
    run = make(tmp_path, keep_checkpoints=5)
    for step in range(1, 10):
        run.log(step, {"x": step})
        if step % 3 == 0:
            run.save_checkpoint(step, {}, {"steps": step})
    run.save_best(4.0, {}, {})
    run.close()
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "x"')  # killed while writing
    (run.folder / "checkpoints" / ".step-00000012.new-1-abcd").mkdir()
    with resume_run(run.folder, step=6, loggers=("jsonl",)) as resumed:
        assert resumed.folder == run.folder
        assert resumed.best_return == 4.0
        assert not resumed.save_best(3.0, {}, {})
        resumed.log(7, {"x": 70})
    assert [(line["step"], line["x"]) for line in runs.read_metrics(run.folder)] == [
        *((step, step) for step in range(1, 7)),
        (7, 70),
    ]
    assert steps_of(run.folder) == [3, 6]
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [
        "best",
        "step-00000003",
        "step-00000006",
    ]
    with pytest.raises(ValueError, match="is no run"):
        resume_run(tmp_path / "elsewhere", step=0)


def fill(run, scale=1.0, evaluations=True):
    for step in range(1, 200):
        run.log(step, {"train/episode_return": scale * step, "train/episode_length": 5})
        if evaluations and step % 20 == 0:
            run.log(
                step,
                {
                    "evaluation/mean_return": scale * step,
                    "evaluation/std_return": 3.0,
                    "evaluation/episodes": 5,
                },
            )
    run.close()


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def test_learning_curves_are_pictures_of_the_runs(tmp_path):
    one, two, empty, partial = (make(tmp_path) for _ in range(4))
    fill(one)
    fill(two, scale=-1.0)
    fill(partial, evaluations=False)
    empty.log(1, {"loss/critic": 1.0})
    assert one.plot() == one.folder / "learning_curve.png"
    single = pixels(one.folder / "learning_curve.png")
    both = pixels(runs.plot_learning_curve([one.folder, two.folder], tmp_path / "deep" / "both.png"))
    assert (np.asarray(single) != 255).any()
    orange = (abs(both.astype(int) - (255, 127, 14)).sum(-1) < 30).sum()
    assert orange > 100  # the second run has a colour of its own
    assert (abs(single.astype(int) - (255, 127, 14)).sum(-1) < 30).sum() == 0
    pixels(partial.plot())
    pixels(empty.plot())
    assert list(tmp_path.glob("**/.learning*")) == []
    with pytest.raises(ValueError, match="run_folders is empty"):
        runs.plot_learning_curve([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="is no run"):
        runs.plot_learning_curve([tmp_path], tmp_path / "x.png")


def test_a_spread_that_is_missing_or_not_finite_does_not_stop_the_plot(tmp_path):
    run = make(tmp_path)
    run.log(1, {"evaluation/mean_return": 1.0})
    run.log(2, {"evaluation/mean_return": math.nan, "evaluation/std_return": math.nan})
    run.log(3, {"evaluation/mean_return": 2.0, "evaluation/std_return": 0.5})
    pixels(run.plot())


def test_moving_means():
    values = [1.0, 2.0, 6.0, 3.0]
    assert runs._moving_mean(values, 2) == [1.0, 1.5, 4.0, 4.5]
    assert runs._moving_mean(values, 1) == values


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_those_of_the_last_seconds(monkeypatch, capfd):
    clock = Clock()
    monkeypatch.setattr(runs.time, "perf_counter", clock)
    with Progress(10_000, completed=500, updates=100) as progress:
        assert set(progress.rates().values()) == {0.0}
        steps, updates = 500, 100
        for _ in range(400):  # 20 s at 200 steps/s and 100 updates/s
            clock.now += 0.05
            steps, updates = steps + 10, updates + 5
            progress.update(steps, updates)
        assert progress.rates()["speed/steps_per_second"] == pytest.approx(200, rel=0.02)
        for _ in range(240):  # 12 s at 20 steps/s: the fast time is forgotten
            clock.now += 0.05
            steps += 1
            progress.update(steps, updates, mean_return=-3.0)
        rates = progress.rates()
        assert rates["speed/steps_per_second"] == pytest.approx(20, rel=0.02)
        assert rates["speed/updates_per_second"] == pytest.approx(0, abs=1.0)
    assert not progress.visible  # no terminal here
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_speed_and_return_on_a_terminal(monkeypatch):
    import rich.console

    out = io.StringIO()
    make_console = rich.console.Console
    monkeypatch.setattr(
        rich.console,
        "Console",
        lambda **_: make_console(file=out, force_terminal=True, width=160, color_system=None),
    )
    clock = Clock()
    with Progress(1000) as progress:
        assert progress.visible
        monkeypatch.setattr(runs.time, "perf_counter", clock)
        clock.now = progress._samples[0][0]
        for step in range(0, 1001, 100):
            clock.now += 1.0
            progress.update(step, step // 2, mean_return=-123.4)
    text = out.getvalue()
    assert "1000/1000" in text
    assert "return -123.4" in text
    assert "updates/s" in text
    assert "ETA" in text
    assert not Progress(10, enabled=False).visible
