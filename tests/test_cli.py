"""The command line, in a folder of its own."""

import json
import re

import gymnasium
import pytest

import angle_rl
from angle_rl import cli
from angle_rl.config import AgentConfig, Training

SMALL = ["--hidden-sizes", "16", "--learning-starts", "50", "--batch-size", "16", "--evaluation-episodes", "2"]
LAST_LINE = r"mean return -?\d+\.\d over {} episodes · (.+)"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def angle(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def last_line(text, episodes):
    found = re.fullmatch(LAST_LINE.format(episodes), text.splitlines()[-1])
    assert found, text
    return found.group(1)


@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_train_evaluate_resume_plot(capsys, here, agent):
    code, out, _ = angle(capsys, "train", "--agent", agent, "--steps", "120", "--seed", "3", *SMALL)
    assert code == 0
    assert out.splitlines()[0].startswith("engine native (auto: our own networks on a CPU; ")
    run = last_line(out, 2)
    assert run == f"runs/Pendulum-v1-{agent}-3"
    config = AgentConfig.from_json((here / run / "config.json").read_text())
    assert (config.hyperparameters.agent, config.training.steps) == (agent, 120)
    assert (here / run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"

    for more in ([], ["--best"]):
        code, out, _ = angle(capsys, "evaluate", run, "--episodes", "3", *more)
        assert (code, last_line(out, 3)) == (0, run)

    code, out, _ = angle(capsys, "train", "--resume", run, "--steps", "150")
    assert (code, last_line(out, 2)) == (0, run)
    steps = [json.loads(line)["step"] for line in (here / run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 150

    code, out, _ = angle(capsys, "plot", run, run, "--out", "both.png")
    assert (code, out.strip()) == (0, "both.png")
    assert (here / "both.png").exists()


def test_a_config_file_is_read_and_options_go_over_it(capsys, here):
    config = AgentConfig(training=Training(steps=1100, seed=8, evaluation_episodes=1))
    (here / "config.toml").write_text(config.to_toml())
    code, out, _ = angle(
        capsys, "train", "--config", "config.toml", *SMALL, "--steps=60", "--env=Pendulum-v1", "--no-tensorboard"
    )
    assert code == 0
    run = here / last_line(out, 2)
    assert run.name == "Pendulum-v1-sac-8"
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--discount", "2"], "discount is 2.0"),
        (["train", "--steps", "10"], "learning_starts is 1000"),
        (["train", "--stepps", "10"], "--steps"),
        (["train", "--env", "Pendulun-v1"], "Pendulum-v1"),
        (["train", "--env", "CartPole-v1", "--agent", "sac"], "SAC needs continuous actions"),
        (["train", "--device", "abacus"], "device is 'abacus'"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--resume", "missing"], "missing is no run"),
        (["train", "--resume", "a", "--config", "b"], "both given"),
        (["evaluate", "missing"], "missing is no run"),
        (["evaluate"], "RUN|run"),
        (["plot", "missing"], "missing is no run"),
        (["info", "--config", "missing.json"], "missing.json"),
        (["bench", "coffee"], "replay|update"),
        (["brain"], "train, evaluate, plot, presets, info, bench"),
    ],
)
def test_wrong_input_is_a_message_and_exit_code_2(capsys, here, arguments, says):
    code, out, err = angle(capsys, *arguments)
    assert code == 2
    assert re.search(says, err + out)
    assert "Traceback" not in err + out
    assert not (here / "runs").exists()


def test_help_names_every_field(capsys):
    import dataclasses

    config = AgentConfig()
    for arguments in (["--help"], ["train", "--help"]):
        code, out, _ = angle(capsys, *arguments)
        assert code == 0
        for part in (config.hyperparameters, config.training, config.service):
            for field in dataclasses.fields(part):
                assert "-" + field.name.replace("_", "-") in out, field.name
    assert angle(capsys)[0] == 2


def test_info(capsys):
    code, out, _ = angle(capsys, "info")
    assert code == 0
    for word in (angle_rl.__version__, "ISA", "threads", "CUDA", "engine native"):
        assert word in out


def test_the_package_exports_what_it_lists():
    assert angle_rl.AgentTrainer is __import__("angle_rl.trainer", fromlist=["x"]).AgentTrainer
    for name in angle_rl.__all__:
        assert getattr(angle_rl, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = angle_rl.Nonsense


def test_importing_the_package_is_light(run_python):
    assert run_python("import sys, angle_rl; print('torch' in sys.modules)").strip() == "False"


LOGS = ["rich", "tensorboard", "torch.utils.tensorboard"]
NOT_FOR_UPDATES = [*LOGS, "matplotlib", "pandas", "safetensors", "sympy", "torch._dynamo", "tyro"]
FIRST_UPDATE = """
import sys
from angle_rl import AgentConfig, AgentTrainer
absent = set({absent})
print("imported", *(absent & set(sys.modules)))
config = AgentConfig().replace(
    agent={agent!r}, environment={environment!r}, engine="native", hidden_sizes=(16,), batch_size=16,
    learning_starts=16, replay_capacity=100, steps=30, meta_update_interval=1, tensorboard={logs}, progress={logs},
)
class Meta:
    def update_meta_learning_model(self, states, q):
        print("updated", trainer.updates, *(absent & set(sys.modules)))
        raise SystemExit
trainer = AgentTrainer(config, meta=Meta())
print("made", *(absent & set(sys.modules)))
trainer.train()
"""


@pytest.mark.parametrize(
    ("agent", "environment"), [("sac", "Pendulum-v1"), ("td3", "Pendulum-v1"), ("dqn", "CartPole-v1")]
)
def test_a_first_update_imports_no_more_than_it_needs(run_python, agent, environment):
    """Neither what draws, logs and saves nor torch's compiler, which alone takes a second."""
    script = FIRST_UPDATE.format(agent=agent, environment=environment, absent=NOT_FOR_UPDATES, logs=False)
    assert run_python(script).splitlines() == ["imported", "made", "updated 1"]


def test_with_logs_and_a_progress_bar_a_first_update_imports_those_only(run_python):
    absent = sorted({*NOT_FOR_UPDATES} - {*LOGS})
    script = FIRST_UPDATE.format(agent="sac", environment="Pendulum-v1", absent=absent, logs=True)
    assert run_python(script).splitlines() == ["imported", "made", "updated 1"]


def test_a_failed_run_says_where_it_stands(capsys, monkeypatch):
    from angle_rl.agents.sac import SAC

    def poisoned(self, state, batch, key, own=SAC.next_values):
        values = own(self, state, batch, key)
        return values._replace(q=values.q * float("nan"))

    monkeypatch.setattr(SAC, "next_values", poisoned)
    code, _, err = angle(capsys, "train", "--steps", "60", *SMALL)
    assert code == 1
    assert "the critic loss is nan in 3 updates in a row; the last good checkpoint: there is no" in err
    assert gymnasium.registry  # the process lives on
