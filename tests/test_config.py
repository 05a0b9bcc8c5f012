"""The config: refusals, and both file formats both ways."""

import dataclasses
import inspect
import json
import math
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.config import AgentConfig, Hyperparameters, Service, Training, read_config


@pytest.mark.parametrize(
    ("part", "field", "value", "says"),
    [
        (Hyperparameters, "discount", 1.5, "[0, 1]"),
        (Hyperparameters, "discount", math.nan, "[0, 1]"),
        (Hyperparameters, "tau", 0.0, "(0, 1]"),
        (Hyperparameters, "learning_rate", 0, "(0, inf)"),
        (Hyperparameters, "learning_rate", math.inf, "(0, inf)"),
        (Hyperparameters, "critics", 1, "[2, inf)"),
        (Hyperparameters, "batch_size", 0, "[1, inf)"),
        (Hyperparameters, "policy_update_interval", 0, "[1, inf)"),
        (Hyperparameters, "meta_update_interval", -1, "[1, inf)"),
        (Hyperparameters, "hidden_sizes", (256, 0), "[1, inf)"),
        (Hyperparameters, "hidden_sizes", (), "at least 1"),
        (Hyperparameters, "agent", "sca", "did you mean 'sac'"),
        (Hyperparameters, "replay", "fifo", "'prioritized' or 'uniform'"),
        (Hyperparameters, "updates_per_step", -0.5, "(0, inf)"),
        (Hyperparameters, "updates_per_call", 0, "[1, inf)"),
        (Hyperparameters, "weight_decay", -0.1, "[0, inf)"),
        (Hyperparameters, "optimizer", "adamww", "did you mean 'adamw'"),
        (Hyperparameters, "activation", "elu", "'relu' or 'tanh'"),
        (Training, "engine", "nativ", "did you mean 'native'"),
        (Training, "learner_threads", 0, "[1, inf)"),
        (Training, "steps", 0, "[1, inf)"),
        (Training, "seed", -1, "[0, "),
        (Training, "environment", "", "''"),
        (Service, "keep_checkpoints", 0, "[1, inf)"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_limit(part, field, value, says):
    with pytest.raises(ValueError) as refusal:
        part(**{field: value})
    assert field in str(refusal.value)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (Hyperparameters, "batch_size", 2.5),
        (Hyperparameters, "batch_size", True),
        (Hyperparameters, "learning_rate", "fast"),
        (Hyperparameters, "hidden_sizes", 256),
        (Training, "environment", None),
        (Service, "tensorboard", 1),
        (AgentConfig, "training", Hyperparameters()),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(part, field, value):
    with pytest.raises(TypeError, match=field):
        part(**{field: value})


def test_contradictions_are_refused_and_both_values_named():
    with pytest.raises(ValueError, match=r"learning_starts is 500.*steps \(500\)"):
        AgentConfig(hyperparameters=Hyperparameters(learning_starts=500), training=Training(steps=500))
    with pytest.raises(ValueError, match=r"target_entropy is -2.0.*entropy_coefficient is 0.2"):
        Hyperparameters(entropy_coefficient=0.2, target_entropy=-2)


def test_a_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Training().seed = 1
    with pytest.raises(TypeError):
        Training("Pendulum-v1")
    with pytest.raises(ValueError, match="tau"):
        dataclasses.replace(Hyperparameters(), tau=2.0)


def test_numbers_and_lists_take_their_declared_types():
    hyperparameters = Hyperparameters(learning_rate=1, hidden_sizes=[32, 16])
    assert isinstance(hyperparameters.learning_rate, float)
    assert hyperparameters.hidden_sizes == (32, 16)


configs = st.builds(
    AgentConfig,
    hyperparameters=st.builds(
        Hyperparameters,
        agent=st.sampled_from(["sac", "td3", "ddpg", "dqn", "q_learning"]),
        hidden_sizes=st.lists(st.integers(1, 4096), min_size=1, max_size=4).map(tuple),
        learning_rate=st.floats(1e-300, 1e300),
        policy_update_interval=st.sampled_from(["auto", None, 1, 7]),
        meta_update_interval=st.sampled_from([None, 3]),
        huber_delta=st.none() | st.floats(1e-6, 10),
        entropy_coefficient=st.just("auto") | st.floats(0, 5),
        activation=st.sampled_from(["relu", "tanh", "silu", "gelu"]),
        layer_norm=st.booleans(),
        optimizer=st.sampled_from(["adam", "adamw"]),
        weight_decay=st.floats(0, 1),
        updates_per_call=st.integers(1, 64),
    ),
    training=st.builds(
        Training,
        environment=st.text(min_size=1).filter(lambda text: text.isprintable()),
        evaluation_interval=st.sampled_from([None, 5]),
        seed=st.integers(0, 2**63 - 1),
        engine=st.sampled_from(["auto", "native"]),
        learner_threads=st.none() | st.integers(1, 64),
        precision=st.sampled_from(["float32", "bfloat16"]),
    ),
    service=st.builds(Service, run_folder=st.text(), tensorboard=st.booleans()),
)


@given(configs)
def test_json_and_toml_come_back_equal(config):
    assert AgentConfig.from_json(config.to_json()) == config
    assert AgentConfig.from_toml(config.to_toml()) == config


def test_a_toml_string_keeps_control_characters():
    config = AgentConfig(service=Service(run_folder='a"b\\c\n\t\x7f'))
    assert AgentConfig.from_toml(config.to_toml()) == config


def test_none_is_left_out_of_toml_where_it_is_the_default():
    text = AgentConfig(training=Training(evaluation_interval=None)).to_toml()
    assert "huber_delta" not in text
    assert 'evaluation_interval = "none"' in text


@pytest.mark.parametrize("read", [AgentConfig.from_json, AgentConfig.from_toml])
def test_text_that_is_no_config_is_refused(read):
    with pytest.raises(ValueError, match="the config is not"):
        read("{] =")


def test_unknown_keys_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"hyperparameters has no field 'learning_rates'.*'learning_rate'"):
        AgentConfig.from_json(json.dumps({"hyperparameters": {"learning_rates": 1}}))
    with pytest.raises(ValueError, match=r"no field 'trainin'.*'training'"):
        AgentConfig.from_toml("[trainin]\nsteps = 5\n")
    with pytest.raises(TypeError, match="training is 3"):
        AgentConfig.from_json('{"training": 3}')


def test_files_are_read_by_their_ending(tmp_path):
    config = AgentConfig(training=Training(seed=5))
    (tmp_path / "a.toml").write_text(config.to_toml())
    (tmp_path / "a.json").write_text(config.to_json())
    assert read_config(tmp_path / "a.toml") == read_config(tmp_path / "a.json") == config
    with pytest.raises(ValueError, match=r"a\.yaml.*\.toml or \.json"):
        read_config(tmp_path / "a.yaml")
    with pytest.raises(OSError):
        read_config(tmp_path / "missing.toml")


def test_every_field_has_a_comment_and_every_number_a_range():
    for part in (Hyperparameters, Training, Service):
        source = inspect.getsource(part).splitlines()
        for entry in dataclasses.fields(part):
            line = next(i for i, text in enumerate(source) if text.strip().startswith(f"{entry.name}:"))
            assert "  # " in source[line] or source[line - 1].strip().startswith("# "), entry.name
        for name, hint in get_type_hints(part).items():
            numbers = {int, float} & {hint, *get_args(hint)}
            ranged = repr(get_type_hints(part, include_extras=True)[name])
            assert not numbers or "In(text=" in ranged, name
