"""Presets: each is a whole config, and the command line takes them."""

import re

import pytest

from angle_rl import cli
from angle_rl.config import AgentConfig
from angle_rl.presets import _read, find_preset, list_presets

PRESETS = list_presets()


def test_there_are_presets_and_each_environment_and_agent_has_one():
    assert len(PRESETS) >= 10
    assert len({(one.environment, one.agent) for one in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_has_a_score_or_says_why_not(preset):
    score = preset.score
    if score.mean_return is None:
        assert "not run" in score.note
        assert not score.seeds
    else:
        assert score.episodes >= 1
        assert score.seeds


def test_finding_one():
    assert find_preset("Hopper-v5", "td3").name == "hopper-td3"
    assert find_preset("Hopper-v5").environment == "Hopper-v5"
    assert find_preset("Hopper-v5", "nobody") is None
    assert find_preset("Nowhere-v0") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nsteps = 5000", "score"),
        ("[score]\nmean = 3", "mean"),
        ("[score]\n[training]\nstepss = 3", "stepss"),
    ],
)
def test_a_damaged_preset_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=f"preset odd is damaged.*{message}"):
        _read("odd", text)


def test_the_command_lists_them_and_prints_one_that_can_be_read_again(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(one.name)} +{re.escape(one.environment)} ", listed, re.M) for one in PRESETS)
    assert cli.main(["presets", "hopper-sac"]) == 0
    assert AgentConfig.from_toml(capsys.readouterr().out) == find_preset("Hopper-v5", "sac").config
    assert cli.main(["presets", "nothing"]) == 2
    assert "hopper-sac" in capsys.readouterr().err


def test_training_starts_from_the_preset_and_options_change_it(capsys, monkeypatch):
    made = []

    class Stop(ValueError):
        pass

    def note(config):
        made.append(config)
        raise Stop("enough")

    monkeypatch.setattr("angle_rl.trainer.AgentTrainer", note)
    preset = find_preset("Hopper-v5", "td3").config
    assert cli.main(["train", "--env", "Hopper-v5", "--agent", "td3", "--tau", "0.5"]) == 2
    assert made[-1].hyperparameters.tau == 0.5
    assert made[-1].hyperparameters.learning_rate == preset.hyperparameters.learning_rate
    assert made[-1].training == preset.training
    assert "preset hopper-td3" in capsys.readouterr().out
    assert cli.main(["train", "--env=Hopper-v5", "--agent", "td3", "--no-preset"]) == 2
    assert made[-1].training.steps == AgentConfig().training.steps
    assert cli.main(["train"]) == 2
    assert made[-1] == AgentConfig()
