"""The conformance kit: agents that keep the contract pass, and each way of breaking it is caught by its own check."""

import inspect
import random
import re

import numpy as np
import pytest
import torch
from conformance_agents import (
    ActsUnderOneKey,
    ChangesTheEpisode,
    ChangesTheIteration,
    CountsAgents,
    CrossEntropy,
    DiscreteState,
    Diverges,
    DrawsWhileRecording,
    FloatActions,
    ForgetsItsCounter,
    ForgetsTheBias,
    ForgetsTheOptimizer,
    ForgetsTheReplay,
    GivesActionsOnly,
    GlobalInit,
    GlobalNumPy,
    GlobalRandom,
    GlobalTorch,
    InitGivesTheState,
    InitKeepsTheKey,
    LearnsTooEarly,
    LearnsUnderOneKey,
    LinearQ,
    LosesTheKey,
    MixesRows,
    NestedRecorder,
    NeverLearns,
    NoOptimizeModel,
    OutOfBounds,
    OutOfTheBox,
    ReadsTheGlobalSeed,
    RecordsToNowhere,
    RecordsUnsteppedRows,
    ResetGivesTheState,
    ResetsParameters,
    ResetsTheOptimizer,
    ResetsTheReplay,
    ReturnsTheFirstArgument,
    SavesWhatIsNoJson,
    SkipsEnds,
    StoresTheNextStart,
    StoresTheWrongRewards,
    SwapsTheEnvironment,
    TakesTheLimitForAnEnd,
    TensorActions,
    WritesIntoTheActions,
    WritesIntoTheObservation,
    WrongShape,
    WrongSignature,
)
from gymnasium import spaces

import angle_rl.testing
from angle_rl.agents import DDPG, DQN, SAC, TD3, QLearning
from angle_rl.agents.noise import seeded_torch
from angle_rl.config import AgentConfig, Hyperparameters
from angle_rl.feed import FunctionFeed
from angle_rl.models import SquashedGaussianPolicy
from angle_rl.replay import ReplayBuffer
from angle_rl.testing import CHECKS, AgentReport, CheckFeed, ConformanceError, check_agent
from angle_rl.testing.contents import contents, difference, find_replay
from angle_rl.testing.probe import BrokenError, draw
from angle_rl.types import RandomKey

NAMES = tuple(check.__name__ for check in CHECKS)
FOUR = spaces.Discrete(4, start=1)
NESTED = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (2, 2), np.uint8),
        "rest": spaces.Tuple([spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 5]), spaces.MultiBinary(3)]),
        "half": spaces.Box(0.0, np.inf, (2,), np.float64),
    }
)


def small(agent, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            agent=agent.__name__.lower(),
            **{"hidden_sizes": (8,), "batch_size": 4, "learning_starts": 12, "replay_capacity": 500}
            | {"updates_per_step": 0.25}
            | hyperparameters,
        )
    )


# Agents that keep the contract --------------------------------------------------------------------------------


def check_discrete(agent, **options):
    return check_agent(agent, action_space=FOUR, **{"steps": 16} | options)


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG])
def test_the_own_agents_pass_every_check(agent):
    report = check_agent(agent, config=small(agent))
    assert report == AgentReport(passed=NAMES, not_applicable={})


def test_dqn_passes_every_check():
    report = check_agent(DQN, config=small(DQN), action_space=FOUR)
    assert report == AgentReport(passed=NAMES, not_applicable={})


def test_q_learning_passes_every_check_but_that_of_a_replay():
    config = AgentConfig(
        hyperparameters=Hyperparameters(agent="q_learning", learning_starts=12, learning_rate=0.5, replay="uniform")
    )
    report = check_agent(QLearning, config=config, observation_space=spaces.Discrete(6), action_space=FOUR)
    assert set(report.not_applicable) == {"records_what_happened"}


@pytest.mark.parametrize("replay", ["uniform", "prioritized"])
def test_n_step_and_both_replays_pass(replay):
    report = check_agent(SAC, config=small(SAC, replay=replay, n_step=3), num_environments=2)
    assert report.passed == NAMES


def test_a_sixth_agent_of_less_than_a_page_passes():
    assert len(inspect.getsource(CrossEntropy).splitlines()) < 60
    report = check_agent(CrossEntropy, steps=40)
    assert set(report.not_applicable) == {
        "batched_actions_equal_single_ones",  # no policy
        "records_what_happened",  # no replay
        "waits_for_learning_starts",
    }
    assert set(report.passed) == set(NAMES) - set(report.not_applicable)
    assert "no policy" in report.not_applicable["batched_actions_equal_single_ones"]


def test_an_agent_with_discrete_actions_and_no_policy_passes():
    report = check_discrete(LinearQ)
    assert set(report.not_applicable) == {"batched_actions_equal_single_ones"}


@pytest.mark.parametrize(
    "agent",
    [LinearQ, LinearQ(), lambda: LinearQ()],
    ids=["class", "agent", "function"],
)
def test_an_agent_comes_as_a_class_a_function_or_itself(agent):
    assert len(check_discrete(agent).passed) == len(NAMES) - 1


def test_an_agent_that_cannot_be_copied_is_checked_as_far_as_one_agent_goes():
    class Held(LinearQ):
        def __init__(self):
            self.file = (line for line in ())

    report = check_discrete(Held())
    alone = {"gives_the_same_for_the_same_key", "uses_each_key_once", "saves_and_restores", "rows_do_not_mix"}
    assert alone < set(report.not_applicable)
    assert "cannot be copied" in report.not_applicable["rows_do_not_mix"]
    assert "reset_keeps_what_was_learned" in report.passed


def test_nested_observations_and_an_agent_that_learns_nothing_pass():
    report = check_agent(NestedRecorder, observation_space=NESTED, action_space=spaces.MultiDiscrete([2, 3]))
    assert set(report.not_applicable) == {
        "saves_and_restores",
        "batched_actions_equal_single_ones",
        "waits_for_learning_starts",
        "learns",
        "stays_finite",
    }

    class Keeps(NestedRecorder):
        keeps_unstepped = True

    with pytest.raises(ConformanceError, match=r"ignores_rows_that_did_not_step: .* replay\.\S+ at \["):
        check_agent(Keeps, observation_space=NESTED, action_space=spaces.MultiDiscrete([20, 30]))


def test_learning_that_was_not_reached_is_told():
    report = check_discrete(LinearQ, steps=2)
    assert "not more than learning_starts" in report.not_applicable["learns"]


def test_a_feed_of_ones_own_is_run_instead():
    feed = FunctionFeed(
        lambda observation, action: (0.9 * observation, float(action) / 4),
        initial_observation=lambda key: key.normal(3).numpy(),
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=FOUR,
        step_limit=4,
    )
    report = check_agent(LinearQ, feed)
    assert "stepped in each" in report.not_applicable["ignores_rows_that_did_not_step"]
    assert "1 environment" in report.not_applicable["rows_do_not_mix"]
    assert "records_what_happened" in report.passed


def test_the_global_generators_are_left_as_they_were():
    before = contents({"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()})  # noqa: NPY002
    check_discrete(LinearQ)
    after = contents({"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()})  # noqa: NPY002
    assert difference(before, after) is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"num_environments": 0}, ValueError, "num_environments is 0"),
        ({"feed": "Pendulum-v1", "action_space": FOUR}, ValueError, "a feed has its own spaces"),
        ({"agent": LinearQ(), "config": AgentConfig()}, TypeError, "agent class only"),
        ({"action_space": spaces.Text(3)}, TypeError, "action_space is Text"),
        ({"transformed": ("reward",)}, ValueError, "transformed has 'reward'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        check_agent(**{"agent": LinearQ} | arguments)


# Agents that break it -----------------------------------------------------------------------------------------


BROKEN = [
    (OutOfTheBox, "actions_lie_in_the_space", r"select_action after \d steps gave environment \d the action"),
    (ReturnsTheFirstArgument, "passes_the_state_through", r"record_observation after 0 steps .* although it recorded"),
    (ChangesTheIteration, "passes_the_state_through", r"neither .* iteration is 1 and 2"),
    (ChangesTheEpisode, "passes_the_state_through", r"optimize_model after 1 steps .* episode is 0 and 7"),
    (SwapsTheEnvironment, "passes_the_state_through", r"select_action .* environment_state.reward at \[0\]"),
    (DrawsWhileRecording, "passes_the_state_through", r"record_observation .* random_key"),
    (WritesIntoTheActions, "passes_the_state_through", r"record_observation .* wrote into its argument"),
    (TensorActions, "actions_lie_in_the_space", r"gave a Tensor"),
    (GlobalNumPy, "leaves_global_generators_alone", r"select_action after 0 steps .* numpy.random"),
    (GlobalTorch, "leaves_global_generators_alone", r"optimize_model after 1 steps .* torch"),
    (GlobalRandom, "leaves_global_generators_alone", r"reset after 0 steps .* random"),
    (GlobalInit, "leaves_global_generators_alone", r"init .* torch"),
    (ReadsTheGlobalSeed, "gives_the_same_for_the_same_key", r"other actions after \d+ steps"),
    (
        ActsUnderOneKey,
        "uses_each_key_once",
        r"select_action after 0 steps .* gave back the key .* entry|actions at \[\d\]",
    ),
    (LearnsUnderOneKey, "uses_each_key_once", r"optimize_model after \d+ steps .* network.weight"),
    (ResetsParameters, "reset_keeps_what_was_learned", r"reset after \d+ steps changed network.bias"),
    (ResetsTheOptimizer, "reset_keeps_what_was_learned", r"reset after \d+ steps changed optimizer"),
    (ForgetsTheOptimizer, "saves_and_restores", r"after import_state, optimizer"),
    (ForgetsTheBias, "saves_and_restores", r"after import_state, network.bias"),
    (ForgetsTheReplay, "saves_and_restores", r"after import_state, replay"),
    (ForgetsItsCounter, "saves_and_restores", r"steps after import_state"),
    (SavesWhatIsNoJson, "saves_and_restores", r"cannot be written as JSON"),
    (MixesRows, "rows_do_not_mix", r"after \d+ steps other observations .* environment \d"),
    (StoresTheNextStart, "records_what_happened", r"next_observations in row .* final_observation was"),
    (TakesTheLimitForAnEnd, "records_what_happened", r"terminated in row .* is \[ True\]; given was False"),
    (StoresTheWrongRewards, "records_what_happened", r"rewards in row 0 \(environment 0\)"),
    (SkipsEnds, "records_what_happened", r"holds \d+ rows (of|after) \d+ transitions"),
    (LearnsTooEarly, "waits_for_learning_starts", r"network.weight .* with 9 transitions; learning_starts is 12"),
    (NeverLearns, "learns", r"no parameter with \d+ transitions"),
    (Diverges, "stays_finite", r"network.weight at \[0, 0\] is nan"),
]


def broken_promises(monkeypatch, agent, **options):
    """What each check that an agent fails says of it, by the check's name."""
    said = {}

    def noted(check):
        def run(kit):
            try:
                check(kit)
            except BrokenError as error:
                said[check.__name__] = str(error)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(angle_rl.testing, "CHECKS", [noted(check) for check in CHECKS])
        check_agent(agent, **options)
    return said


@pytest.mark.parametrize(("agent", "check", "says"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_found_by_its_check_and_by_no_other(monkeypatch, agent, check, says):
    options = {"steps": 30} if issubclass(agent, CrossEntropy) else {"action_space": FOUR, "steps": 16}
    said = broken_promises(monkeypatch, agent, **options)
    assert list(said) == [check], said
    assert re.search(says, said[check]), said


@pytest.mark.parametrize(
    ("agent", "check", "says"),
    [
        (NoOptimizeModel, "has_five_callbacks", r"has no callback optimize_model\(rl_state\)"),
        (
            WrongSignature,
            "has_five_callbacks",
            r"record_observation\(.*\) does not take \(rl_state, action",
        ),
        (InitGivesTheState, "init_gives_a_state_and_a_new_key", r"init returned a DiscreteState"),
        (InitKeepsTheKey, "init_gives_a_state_and_a_new_key", r"gave it back, RandomKey.*network.weight"),
        (GivesActionsOnly, "callbacks_return_what_is_due", r"select_action after 0 steps returned a ndarray"),
        (OutOfBounds, "actions_lie_in_the_space", r"environment 1 the action 5, not in Discrete"),
        (WrongShape, "actions_lie_in_the_space", r"shape \[3, 1\]; \[3\] is due"),
        (FloatActions, "actions_lie_in_the_space", r"dtype float32"),
        (ResetsTheReplay, "reset_keeps_what_was_learned", r"reset after \d+ steps changed replay"),
        (ResetGivesTheState, "callbacks_return_what_is_due", r"reset after 0 steps returned \(DiscreteState, int\)"),
        (RecordsToNowhere, "callbacks_return_what_is_due", r"record_observation after 0 steps returned a NoneType"),
        (
            LosesTheKey,
            "callbacks_return_what_is_due",
            r"optimize_model after 1 steps returned a random_key .* NoneType",
        ),
        (WritesIntoTheObservation, "passes_the_state_through", r"observation at \[0, 0\]"),
        (CountsAgents, "gives_the_same_for_the_same_key", r"."),  # and so two agents are never alike anywhere
        (RecordsUnsteppedRows, "ignores_rows_that_did_not_step", r"altering them, replay"),  # which then has too many
    ],
)
def test_a_broken_promise_that_breaks_others_is_named_first(agent, check, says):
    with pytest.raises(AssertionError, match=f"^{check}: .*{says}") as error:
        check_discrete(agent)
    assert error.value.check == check


def test_what_a_callback_raises_is_the_cause():
    class Raises(LinearQ):
        def optimize_model(self, rl_state):
            raise KeyError("lost")

    with pytest.raises(ConformanceError, match=r"actions_lie_in_the_space: .* raised KeyError: 'lost'") as error:
        check_discrete(Raises)
    assert isinstance(error.value.__cause__, KeyError)


class MixingPolicy(SquashedGaussianPolicy):
    """Mixes rows where it is not exploring."""

    def sample_actions(self, observations, deterministic=False, **options):
        if deterministic:
            observations = observations - observations.mean(0)
        return super().sample_actions(observations, deterministic, **options)


class SqueezingPolicy(SquashedGaussianPolicy):
    """Loses the axis of a batch of one."""

    def sample_actions(self, observations, deterministic=False, **options):
        actions, log_prob = super().sample_actions(observations, deterministic, **options)
        return (actions.squeeze(0) if len(actions) == 1 else actions), log_prob


@pytest.mark.parametrize("policy", [MixingPolicy, SqueezingPolicy])
def test_a_policy_that_answers_a_batch_otherwise_is_found(monkeypatch, policy):
    class WithPolicy(SAC):
        def init(self, random_key, **options):
            with seeded_torch(random_key, torch.device("cpu")):
                policy_of_its_own = policy(3, options["action_space"].low, options["action_space"].high, (8,))
            return super().init(random_key, **options | {"policy": policy_of_its_own})

    options = {"agent": WithPolicy, "config": small(SAC), "num_environments": 2}
    said = broken_promises(monkeypatch, **options)
    assert list(said) == ["batched_actions_equal_single_ones"]
    assert "alone" in said["batched_actions_equal_single_ones"]


def test_rewards_kept_otherwise_pass_where_that_is_said():
    class Scales(LinearQ):
        def insert(self, state, before, action, reward, *rest):
            super().insert(state, before, action, 0.1 * reward, *rest)

    assert "records_what_happened" in check_discrete(Scales, transformed=("rewards",)).passed
    with pytest.raises(ConformanceError, match="rewards in row 0"):
        check_discrete(Scales)


def test_a_forgotten_table_counts_as_learned():
    class Forgets(CrossEntropy):
        def reset(self, random_key, rl_state):
            state, random_key = super().reset(random_key, rl_state)
            return state | {"mean": 0 * state["mean"]}, random_key

    with pytest.raises(ConformanceError, match=r"reset_keeps_what_was_learned: .* export_state.mean at \[0\]"):
        check_agent(Forgets, steps=40)


def test_an_agent_that_cannot_be_saved_is_told_so():
    class Unsaved(LinearQ):
        export_state = None

    report = check_discrete(Unsaved)
    assert "no export_state" in report.not_applicable["saves_and_restores"]


# The feed and the look into a state ---------------------------------------------------------------------------


def test_values_drawn_lie_in_their_space_and_reach_its_ends():
    values = draw(NESTED, 300, RandomKey(0))
    for index in range(300):
        row = {
            "image": values["image"][index],
            "rest": tuple(part[index] for part in values["rest"]),
            "half": values["half"][index],
        }
        assert NESTED.contains(row)
    assert set(values["rest"][0].tolist()) == {-1, 0, 1}
    assert values["rest"][1].max(0).tolist() == [1, 4]
    assert {values["image"].min(), values["image"].max()} == {0, 255}


@pytest.mark.parametrize("n", [1, 3])
def test_the_check_feed_shows_every_kind_of_row(n):
    feed = CheckFeed(NESTED, FOUR, n)
    seen, key = feed.init(RandomKey(0))
    kinds = set()
    for _ in range(20):
        before = seen
        seen, key = feed.step(key, seen, np.full(n, 2))
        moved = (seen.observation["half"] != seen.final_observation["half"]).any(1)
        kinds |= {tuple(row) for row in np.stack([seen.terminated, seen.truncated, seen.stepped, moved], 1).tolist()}
        assert (before.terminated | before.truncated)[~seen.stepped].all()
    assert kinds == {
        (False, False, True, False),  # within an episode
        (True, False, True, True),
        (True, False, True, False),  # a reset follows in a step of its own
        (False, True, True, True),
        (False, True, True, False),
        (False, False, False, False),  # that step
    }


def test_contents_reach_into_everything_and_end_on_circles():
    module = torch.nn.Linear(1, 1)
    replay = ReplayBuffer(4, {"observations": ((1,), "f4"), "actions": ((), "i8")})
    state = DiscreteState()
    state.inside = {"module": module, "itself": state, "list": [1, np.float32(2)], "none": None, "key": RandomKey(3)}
    state.optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    state.replay, state.generator = replay, np.random.default_rng(0)
    state.half = torch.ones(2, dtype=torch.bfloat16)
    found = contents(state)
    assert found["inside.module.weight"].kind == "parameter"
    assert found["inside.key.value"].value == 3
    assert found["replay.rewards"].kind == "replay"
    assert {leaf.kind for path, leaf in found.items() if path.startswith("optimizer")} == {"optimizer"}
    assert find_replay(state) is replay
    assert difference(found, contents(state)) is None
    state.generator.random()
    assert difference(found, contents(state)).startswith("generator")
    with torch.no_grad():
        module.weight += 1
    assert difference(found, contents(state)).startswith("inside.module.weight at [0, 0] is")
