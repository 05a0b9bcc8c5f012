"""Presets: one TOML file per environment and agent, with the score that it reached, or none where it was not run.

A preset is a config as `AgentConfig.to_toml` writes it, and a table ``[score]``: either ``mean_return``,
``episodes`` (of the last evaluation) and ``seeds`` (each a run; the mean is over their evaluations), or nothing but
``note``. Thread rule: any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from angle_rl.config import AgentConfig, config_from_dict, toml_tables


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a preset reached."""

    mean_return: float | None = None  # over all seeds' last evaluations; None: it was not run
    episodes: int = 0  # in each of these
    seeds: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A config that suits an environment."""

    name: str  # the file's, without .toml
    config: AgentConfig
    score: Score

    @property
    def environment(self) -> str:
        """The environment's id."""
        return self.config.training.environment

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self.config.hyperparameters.agent


def list_presets() -> list[Preset]:
    """All presets, by environment and agent. ValueError where a file is damaged."""
    folder = resources.files(__name__)
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".toml")), key=lambda one: one.name)
    presets = [_read(one.name.removesuffix(".toml"), one.read_text(encoding="utf-8")) for one in files]
    return sorted(presets, key=lambda preset: (preset.environment, preset.agent))


def find_preset(environment: str, agent: str | None = None) -> Preset | None:
    """The preset of an environment and an agent, or None. Without an agent: the one of the best score known."""
    found = [one for one in list_presets() if one.environment == environment and agent in (None, one.agent)]
    known = [one for one in found if one.score.mean_return is not None]
    if known:
        return max(known, key=lambda one: one.score.mean_return or 0.0)
    return found[0] if found else None


def _read(name: str, text: str) -> Preset:
    tables = toml_tables(text)
    try:
        score: dict[str, Any] = tables.pop("score")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in score.items()
        }
        return Preset(
            name=name,
            config=config_from_dict(tables),
            score=Score(**values),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"preset {name} is damaged: {error}") from error
