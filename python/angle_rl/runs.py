"""What a training run leaves behind: a folder with its config, metrics, checkpoints and learning curve.

::

    runs/Pendulum-v1-sac-0/
      config.json                        the whole config
      metrics.jsonl                      one object per line: "step", then metrics by name
      tensorboard/                       the same scalars
      checkpoints/step-00010000/         the newest few (see ``angle_rl.checkpoint``)
      checkpoints/best/                  the one with the highest mean evaluation return
      learning_curve.png
      hyperparameters.png                where meta-learners set any

Metric names: ``evaluation/mean_return``, ``evaluation/std_return``, ``evaluation/episodes``;
``train/episode_return``, ``train/episode_length`` where an episode ended; ``loss/critic``, ``loss/policy``,
``entropy_coefficient``; ``meta/loss/<learner>``, ``meta/<hyperparameter>``, ``meta/skipped``, ``meta/time_share``;
``speed/steps_per_second``, ``speed/updates_per_second``. Returns are sums of undiscounted rewards, steps are
transitions stored. Everything here belongs to one thread.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from angle_rl import checkpoint
from angle_rl.checkpoint import PathLike
from angle_rl.types import Array

LOGGERS = ("jsonl", "tensorboard")
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "learning_curve.png"
HYPERPARAMETERS_FILE = "hyperparameters.png"
_STEP_NAME = re.compile(r"step-(\d{8,})")


class Run:
    """An open run folder, for metrics and checkpoints. ``create_run`` and ``resume_run`` make it.

    ``folder``: where it lies. ``best_return``: the highest mean evaluation return saved so far, or None.
    A context manager that closes itself. One thread.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        loggers: Sequence[str] = LOGGERS,
        keep_checkpoints: int = 3,
        purge_step: int | None = None,
    ) -> None:
        _check_service(loggers, keep_checkpoints)
        self.folder = Path(folder)
        self.keep_checkpoints = keep_checkpoints
        best = best_checkpoint(self.folder)
        self.best_return: float | None = None if best is None else _saved_return(best)
        self._metrics = (
            open(self.folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
            if "jsonl" in loggers
            else None
        )
        self._tensorboard = (
            _tensorboard_writer(self.folder / "tensorboard", purge_step) if "tensorboard" in loggers else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars at ``step``: one flushed line of metrics.jsonl, one TensorBoard scalar each.

        A value that is not finite is written as null in the JSON line.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if self._metrics is not None:
            line = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._metrics.write(json.dumps({"step": int(step), **line}) + "\n")
            self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, int(step))

    def save_checkpoint(self, step: int, tensors: Mapping[str, torch.Tensor | Array], state: Mapping[str, Any]) -> Path:
        """Write ``checkpoints/step-<step>``, keep the newest few. Raises as ``checkpoint.save``."""
        path = checkpoint.save(self.folder / "checkpoints" / f"step-{step:08d}", tensors, state)
        for old in list_checkpoints(self.folder)[: -self.keep_checkpoints]:
            checkpoint.remove(old)
        return path

    def save_best(
        self,
        mean_return: float,
        tensors: Mapping[str, torch.Tensor | Array],
        state: Mapping[str, Any],
    ) -> bool:
        """Write ``checkpoints/best`` if ``mean_return`` exceeds the best so far; whether it did.

        The state stored is ``state`` with ``"best_return": mean_return`` added. NaN is never the best.
        """
        mean_return = float(mean_return)
        if math.isnan(mean_return) or (self.best_return is not None and mean_return <= self.best_return):
            return False
        checkpoint.save(self.folder / "checkpoints" / "best", tensors, {**state, "best_return": mean_return})
        self.best_return = mean_return
        return True

    def plot(self) -> Path:
        """Write this run's ``learning_curve.png`` and return its path.

        Where meta-learners set hyperparameters, ``hyperparameters.png``, too.
        """
        plot_hyperparameters([self.folder], self.folder / HYPERPARAMETERS_FILE)
        return plot_learning_curve([self.folder], self.folder / CURVE_FILE)

    def close(self) -> None:
        """Flush and close the logs. May be called twice."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def create_run(
    root: PathLike,
    *,
    environment: str,
    agent: str,
    seed: int,
    config: Mapping[str, Any],
    loggers: Sequence[str] = LOGGERS,
    keep_checkpoints: int = 3,
) -> Run:
    """Make ``<root>/<environment>-<agent>-<seed>/`` with the config in it, and open it.

    Characters that do not belong in a file name become ``-``. If the folder is there already, ``-2``, ``-3``,
    … is added: nothing of an older run is touched. ``config`` must be JSON (TypeError before anything is
    made).
    """
    _check_service(loggers, keep_checkpoints)
    text = json.dumps(config, indent=2, allow_nan=False)
    name = f"{safe_name(environment)}-{safe_name(agent)}-{seed}"
    Path(root).mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    _write_text(folder / CONFIG_FILE, text + "\n")
    return Run(folder, loggers=loggers, keep_checkpoints=keep_checkpoints)


def resume_run(folder: PathLike, *, step: int, loggers: Sequence[str] = LOGGERS, keep_checkpoints: int = 3) -> Run:
    """Open an existing run to go on from ``step``.

    What was logged past ``step`` is dropped from metrics.jsonl (and hidden in TensorBoard), checkpoints of
    later steps are removed, so the run reads as if it had never been interrupted. ``checkpoints/best`` stays.
    Raises ValueError if ``folder`` is no run.
    """
    _check_service(loggers, keep_checkpoints)
    folder = _existing_run(folder)
    for path in list_checkpoints(folder):
        if _step_of(path) > step:
            checkpoint.remove(path)
    for leftover in folder.glob("checkpoints/.*.new-*"):
        shutil.rmtree(leftover)
    metrics = folder / METRICS_FILE
    if metrics.exists():
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        _write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
    return Run(folder, loggers=loggers, keep_checkpoints=keep_checkpoints, purge_step=step + 1)


def safe_name(text: str) -> str:
    """``text`` as a part of a file name: "ALE/Pong-v5" -> "ALE-Pong-v5"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def read_config(folder: PathLike) -> dict[str, Any]:
    """The config.json of a run. Raises ValueError if ``folder`` is no run or the file no JSON object."""
    path = _existing_run(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def read_metrics(folder: PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, each a dict with "step"; a value that was not finite is None.

    A last line cut short by a crash is left out; any other damaged line raises ValueError with its number.
    """
    path = _existing_run(folder) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError('no object with an integer "step"')
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append(entry)
    return found


def list_checkpoints(folder: PathLike) -> list[Path]:
    """The run's ``checkpoints/step-…`` folders, oldest first."""
    parent = Path(folder) / "checkpoints"
    if not parent.is_dir():
        return []
    # ".step-….previous": what a crash between the two renames of a replacement leaves of "step-…".
    names = {path.name.removeprefix(".").removesuffix(".previous") for path in parent.iterdir()}
    paths = [parent / name for name in names if _STEP_NAME.fullmatch(name) and checkpoint.find(parent / name)]
    return sorted(paths, key=_step_of)


def newest_checkpoint(folder: PathLike) -> Path | None:
    """The checkpoint of the run's latest step, or None."""
    paths = list_checkpoints(folder)
    return paths[-1] if paths else None


def best_checkpoint(folder: PathLike) -> Path | None:
    """The run's ``checkpoints/best``, or None."""
    path = Path(folder) / "checkpoints" / "best"
    return path if checkpoint.find(path) else None


def plot_learning_curve(run_folders: Sequence[PathLike], out_png: PathLike) -> Path:
    """Draw the runs' returns against environment steps into a PNG file and return its path.

    A solid line with a band is the evaluations' mean ± standard deviation over episodes; a thin line is the
    moving mean of the training episodes' returns. Needs no display and leaves matplotlib's global state
    alone. Raises ValueError for an empty list and for a folder that is no run.
    """
    if not run_folders:
        raise ValueError("run_folders is empty; at least 1 run is drawn")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [(_existing_run(folder), read_metrics(folder)) for folder in run_folders]
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (folder, lines) in enumerate(runs):
        color = f"C{number % 10}"
        prefix = f"{folder.resolve().name}: " if len(runs) > 1 else ""
        steps, returns = _series(lines, "train/episode_return")
        if steps:
            width = max(1, min(100, len(steps) // 20))
            label = f"{prefix}training episodes" + (f", moving mean of {width}" if width > 1 else "")
            axes.plot(steps, _moving_mean(returns, width), color=color, alpha=0.5, linewidth=0.9, label=label)
        steps, means = _series(lines, "evaluation/mean_return")
        if steps:
            spread = dict(zip(*_series(lines, "evaluation/std_return"), strict=True))
            low = [mean - spread.get(step, 0.0) for step, mean in zip(steps, means, strict=True)]
            high = [mean + spread.get(step, 0.0) for step, mean in zip(steps, means, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0.0)
            axes.plot(steps, means, color=color, marker="o", markersize=3, label=f"{prefix}evaluation, mean ± std")
    if axes.lines:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "no episode has ended", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of an episode")
    axes.set_title(runs[0][0].resolve().name if len(runs) == 1 else f"{len(runs)} runs")
    axes.grid(alpha=0.3)
    return _write_figure(figure, out_png)


def plot_hyperparameters(run_folders: Sequence[PathLike], out_png: PathLike) -> Path | None:
    """Draw the hyperparameters that meta-learners set against environment steps, a panel each, into a PNG file.

    Returns its path; None, and no file, where no run has any. Raises ValueError for a folder that is no run.
    """
    runs = [(_existing_run(folder), read_metrics(folder)) for folder in run_folders]
    others = ("meta/loss/", "meta/skipped", "meta/time_share")
    names = sorted(
        {name for _, lines in runs for line in lines for name in line if name.startswith("meta/")}
        - {name for _, lines in runs for line in lines for name in line if name.startswith(others)}
    )
    if not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 2.5 * len(names) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, number + 1)
        for folder, lines in runs:
            axes.plot(*_series(lines, name), marker=".", markersize=3, label=folder.resolve().name)
        axes.set_ylabel(name.removeprefix("meta/").replace("_", " "))
        axes.grid(alpha=0.3)
        if number == 0:
            axes.legend(fontsize="small")
    axes.set_xlabel("environment steps")
    return _write_figure(figure, out_png)


def _write_figure(figure: Any, out_png: PathLike) -> Path:
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, out)
    return out


class Progress:
    """A progress bar on the error stream with steps/s, updates/s, return and ETA; it draws only on a
    terminal.

    ``total``: steps at the end; ``completed``: steps done by an earlier part of the run. Rates are over the
    last
    ``window`` seconds, and are kept also where nothing is drawn. A context manager; one thread.
    """

    def __init__(
        self, total: int, *, completed: int = 0, updates: int = 0, enabled: bool = True, window: float = 10.0
    ) -> None:
        self._window = window
        self._samples: deque[tuple[float, int, int]] = deque([(time.perf_counter(), completed, updates)])
        self._return: float | None = None
        self._bar: progress.Progress | None = None
        if not enabled:
            return
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rates]}"),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=total, completed=completed, rates="")

    @property
    def visible(self) -> bool:
        """Whether a bar is drawn."""
        return self._bar is not None

    def update(self, steps: int, updates: int, mean_return: float | None = None) -> None:
        """The run has done ``steps`` steps and ``updates`` updates; the last return, where a new one is
        known. Cheap.
        """
        if mean_return is not None:
            self._return = mean_return
        now = time.perf_counter()
        if len(self._samples) > 1 and now - self._samples[-2][0] < 0.1:
            self._samples[-1] = (now, steps, updates)
            return
        self._samples.append((now, steps, updates))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self._window:
            self._samples.popleft()
        if self._bar is not None:
            rates = self.rates()
            text = "{:.0f} steps/s {:.0f} updates/s".format(*rates.values())
            if self._return is not None:
                text += f" return {self._return:.1f}"
            self._bar.update(self._task, completed=steps, rates=text)

    def rates(self) -> dict[str, float]:
        """``speed/steps_per_second`` and ``speed/updates_per_second`` over the window; 0 before the first
        update.
        """
        (start, steps, updates), (end, last_steps, last_updates) = self._samples[0], self._samples[-1]
        seconds = end - start
        return {
            "speed/steps_per_second": (last_steps - steps) / seconds if seconds > 0 else 0.0,
            "speed/updates_per_second": (last_updates - updates) / seconds if seconds > 0 else 0.0,
        }

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._samples[-1][1])
            self._bar.stop()


def _check_service(loggers: Sequence[str], keep_checkpoints: int) -> None:
    if keep_checkpoints < 1:
        raise ValueError(f"keep_checkpoints is {keep_checkpoints}; at least 1 is kept")
    unknown = [name for name in loggers if name not in LOGGERS]
    if isinstance(loggers, str) or unknown:
        raise ValueError(f"loggers is {loggers!r}; a sequence of names out of {LOGGERS} is taken")


def _tensorboard_writer(folder: Path, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=purge_step)


def _existing_run(folder: PathLike) -> Path:
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path} is no run: it has no {CONFIG_FILE}")
    return path


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _saved_return(path: Path) -> float | None:
    value = checkpoint.load_state(path).get("best_return")
    return value if isinstance(value, float) else None


def _write_text(path: Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each place, of fewer at the start."""
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means
