"""The command `angle`: train, evaluate, plot, info, bench."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from angle_rl.config import AgentConfig, config_from_dict, read_config
from angle_rl.device import CUDA_KERNELS

USAGE = """usage: angle COMMAND ...

commands:
  train       train an agent; `angle train` alone: SAC with prioritised replay on Pendulum-v1
  evaluate    whole episodes of a run's policy: angle evaluate RUN [--episodes N] [--best]
  plot        draw learning curves: angle plot RUN [RUN ...] [--out FILE.png]
  presets     configs for known environments, with the scores that they reached
  info        version, instruction set, threads, CUDA, and the engine of a config: angle info [--config FILE]
  bench       measure: angle bench replay|update|gpu|meta|meta-study ...

`angle COMMAND --help` says more.
"""
TRAIN = """Train an agent and leave a run folder.

Besides the options below: --env ID is --environment ID. Options change the environment's preset, if there is one
(`angle presets` lists them; --no-preset: the plain defaults), or what --config FILE, a .toml or .json config, says;
--resume RUN goes on with a run, its config and its newest checkpoint (give --steps to go further)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for a wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(USAGE)
        return 2
    wants_help = arguments[0] in ("-h", "--help")
    if not wants_help and arguments[0] not in COMMANDS:
        return _refuse(f"{arguments[0]!r} is no command; there are {', '.join(COMMANDS)}")
    try:
        if wants_help:
            print(USAGE)
            return train(["--help"])
        return COMMANDS[arguments[0]](arguments[1:])
    except SystemExit as leaving:  # an argument parser has said what is wrong, or printed its help
        return leaving.code if isinstance(leaving.code, int) else 0


def train(arguments: list[str]) -> int:
    """`angle train`: the last line printed is `mean return R over N episodes · RUN_FOLDER`."""
    from angle_rl.agents.state import LossNotFiniteError
    from angle_rl.engines import describe_engine

    parser = argparse.ArgumentParser(prog="angle train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--no-preset", action="store_true")
    files, rest = parser.parse_known_args(arguments)
    try:
        if files.config is not None and files.resume is not None:
            raise ValueError("--config and --resume are both given; a resumed run has its config")
        if files.config is None and files.resume is None and not files.no_preset:
            start = _preset_of(rest)
        else:
            start = _starting_config(files.config, files.resume)
        config = _parse_config(rest, start)
        kind = _trainer_kind(config)
        trainer = kind(config) if files.resume is None else kind.resume(files.resume, config)
    except USER_ERRORS as error:
        return _refuse(str(error))
    print(describe_engine(config.training.engine, getattr(trainer.rl_state.agent_state, "engine", None)))
    try:
        evaluation = trainer.train()
    except (LossNotFiniteError, OSError) as error:
        return _refuse(str(error), code=1)
    if evaluation is None:
        print(f"interrupted after {trainer.steps} steps; angle train --resume {trainer.run_folder} goes on")
    else:
        print(_last_line(evaluation.returns, trainer.run_folder))
    return 0


def evaluate(arguments: list[str]) -> int:
    """`angle evaluate RUN`: the same last line as `angle train`."""
    from angle_rl import runs
    from angle_rl.trainer import AgentTrainer

    parser = argparse.ArgumentParser(prog="angle evaluate", description="Evaluate a run's policy.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--episodes", type=int, default=10, help="whole episodes, at least 1 (default 10)")
    parser.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
    options = parser.parse_args(arguments)
    try:
        trainer = AgentTrainer(config_from_dict(runs.read_config(options.run)).replace(meta=None))
        best = runs.best_checkpoint(options.run)
        if options.best and best is None:
            raise ValueError(f"{options.run} has no best checkpoint; it was never evaluated")
        trainer.load(best if options.best and best is not None else options.run, without_meta=True)
        evaluation = trainer.evaluate(options.episodes)
    except USER_ERRORS as error:
        return _refuse(str(error))
    print(_last_line(evaluation.returns, options.run))
    return 0


def plot(arguments: list[str]) -> int:
    """`angle plot RUN...`: prints the files that it drew, that of learned hyperparameters where there are any."""
    from angle_rl import runs

    parser = argparse.ArgumentParser(prog="angle plot", description="Draw the learning curves of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, help="the PNG file (one run: in its folder; several: here)")
    options = parser.parse_args(arguments)
    single = options.runs[0] / runs.CURVE_FILE if len(options.runs) == 1 else Path(runs.CURVE_FILE)
    try:
        out = options.out or single
        print(runs.plot_learning_curve(options.runs, out))
        beside = runs.HYPERPARAMETERS_FILE if options.out is None else f"{out.stem}-hyperparameters.png"
        learned = runs.plot_hyperparameters(options.runs, out.parent / beside)
        if learned is not None:
            print(learned)
    except USER_ERRORS as error:
        return _refuse(str(error))
    return 0


def presets(arguments: list[str]) -> int:
    """`angle presets`: a line each, or one preset as TOML."""
    from angle_rl.presets import list_presets

    parser = argparse.ArgumentParser(prog="angle presets", description="Configs for known environments.")
    parser.add_argument("name", nargs="?", help="print this preset as TOML, to change it and train with --config")
    options = parser.parse_args(arguments)
    found = {preset.name: preset for preset in list_presets()}
    if options.name is not None:
        if options.name not in found:
            return _refuse(f"there is no preset {options.name!r}; there are {', '.join(found)}")
        print(found[options.name].config.to_toml().rstrip())
        return 0
    print(f"{'preset':<22}{'environment':<28}{'agent':<12}{'steps':>10}  score")
    for name, preset in found.items():
        score = preset.score
        steps = preset.config.training.steps
        text = score.note
        if score.mean_return is not None:
            seeds = f"{len(score.seeds)} seed{'' if len(score.seeds) == 1 else 's'}"
            text = f"{score.mean_return:,.1f} ({score.episodes} episodes of {seeds}){'; ' if text else ''}{text}"
        print(f"{name:<22}{preset.environment:<28}{preset.agent:<12}{steps:>10,}  {text}")
    return 0


def info(arguments: list[str]) -> int:
    """`angle info`: what this installation is and takes."""
    import torch

    from angle_rl import __version__, _core
    from angle_rl.engines import describe_engine

    parser = argparse.ArgumentParser(prog="angle info", description="What this installation is and takes.")
    parser.add_argument("--config", type=Path, help="a .toml or .json config, for its engine and threads")
    options = parser.parse_args(arguments)
    try:
        config = AgentConfig() if options.config is None else read_config(options.config)
    except USER_ERRORS as error:
        return _refuse(str(error))
    threads = config.training.threads or torch.get_num_threads()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    kernels = "with" if CUDA_KERNELS else "without"
    print(f"angle-rl  {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"ISA       {_core.isa()} (this machine can run {', '.join(_core.available_isas())})")
    print(f"threads   {threads}")
    print(f"CUDA      {cuda} (torch: {torch.version.cuda or 'CPU build'}; built {kernels} device kernels)")
    print(f"engine    {describe_engine(config.training.engine, device=config.training.device)}")
    return 0


def bench(arguments: list[str]) -> int:
    """`angle bench replay|update|gpu|meta|meta-study`: the rest of the arguments is the benchmark's."""
    if not arguments or arguments[0] not in ("replay", "update", "gpu", "meta", "meta-study"):
        asked = arguments and arguments[0] in ("-h", "--help")
        print("usage: angle bench replay|update|gpu|meta|meta-study ...", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    code: int = importlib.import_module(f"angle_rl.bench.{arguments[0].replace('-', '_')}").main(arguments[1:])
    return code


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "plot": plot,
    "presets": presets,
    "info": info,
    "bench": bench,
}
# What a wrong argument, file or environment raises. CheckpointError is a ValueError, gymnasium's errors are not.
USER_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, MemoryError, ImportError)


def _preset_of(arguments: list[str]) -> AgentConfig:
    """The preset of the environment and agent that the options name, or the default config; says which."""
    from angle_rl.presets import find_preset

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--environment", "--env")
    parser.add_argument("--agent")
    named, _ = parser.parse_known_args(arguments)
    if named.environment is None:
        return AgentConfig()
    preset = find_preset(named.environment, named.agent)
    if preset is None:
        return AgentConfig()
    print(f"preset {preset.name} (angle presets {preset.name} prints it; --no-preset leaves it out)")
    return preset.config


def _trainer_kind(config: AgentConfig) -> Any:
    """The trainer's class that a config asks for."""
    if config.hyperparameters.meta is None:
        from angle_rl.trainer import AgentTrainer

        return AgentTrainer
    from angle_rl.meta_trainer import MetaLearnerTrainer

    return MetaLearnerTrainer


def _starting_config(config_file: Path | None, run: Path | None) -> AgentConfig:
    """The config that the options change: a run's, a file's, or the default one."""
    from angle_rl import runs

    if run is not None:
        return config_from_dict(runs.read_config(run))
    return AgentConfig() if config_file is None else read_config(config_file)


def _parse_config(arguments: list[str], default: AgentConfig | None) -> AgentConfig:
    """The config that the options describe, every field of it an option."""
    import tyro

    arguments = [
        "--environment" + word[5:] if word == "--env" or word.startswith("--env=") else word for word in arguments
    ]
    return tyro.cli(
        AgentConfig,
        prog="angle train",
        description=TRAIN,
        args=arguments,
        default=AgentConfig() if default is None else default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _last_line(returns: Sequence[float], run_folder: Path | None) -> str:
    return f"mean return {sum(returns) / len(returns):.1f} over {len(returns)} episodes · {run_folder}"


def _refuse(message: str, code: int = 2) -> int:
    print(f"angle: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
