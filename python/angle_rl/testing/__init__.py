"""Conformance kits: `check_agent` puts an agent through the contract of `angle_rl.agents.base`, `check_feed` a feed
through that of `angle_rl.feed.DataFeed`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from angle_rl.feed import make_feed
from angle_rl.spaces import Space
from angle_rl.testing import acting, learning
from angle_rl.testing.feeds import check_feed
from angle_rl.testing.kit import ConformanceError, Kit, NotApplicableError
from angle_rl.testing.probe import BrokenError, CheckFeed, global_seed

__all__ = ["AgentReport", "CheckFeed", "ConformanceError", "check_agent", "check_feed"]

CHECKS: tuple[Callable[[Kit], None], ...] = (
    acting.has_five_callbacks,
    acting.init_gives_a_state_and_a_new_key,
    acting.actions_lie_in_the_space,
    acting.callbacks_return_what_is_due,
    acting.passes_the_state_through,
    acting.leaves_global_generators_alone,
    acting.gives_the_same_for_the_same_key,
    acting.uses_each_key_once,
    learning.reset_keeps_what_was_learned,
    learning.saves_and_restores,
    acting.rows_do_not_mix,
    acting.batched_actions_equal_single_ones,
    learning.ignores_rows_that_did_not_step,
    learning.records_what_happened,
    learning.waits_for_learning_starts,
    learning.learns,
    learning.stays_finite,
)

UNLIKELY_SEED = 1_926_507_311
"""Of the global generators while a check runs: an agent that seeds them with a number of its own changes them."""

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentReport:
    """What `check_agent` found in an agent that breaks no promise."""

    passed: tuple[str, ...]  # names of the checks that passed
    not_applicable: dict[str, str]  # the others, each with the reason why it says nothing about this agent


def check_agent(
    agent: Any,
    feed: Any = None,
    *,
    config: Any = None,
    observation_space: Space | None = None,
    action_space: Space | None = None,
    num_environments: int = 3,
    steps: int | None = None,
    learning_starts: int | None = None,
    options: Mapping[str, Any] | None = None,
    transformed: tuple[str, ...] = (),
    seed: int = 0,
) -> AgentReport:
    """Put an agent through the contract, check by check; `CHECKS` has them, a function each.

    Args:
        agent: an agent class (made with `config`, or with nothing), a function of nothing that makes a fresh
            agent, or an agent. An agent is deep-copied before use; where it cannot be, checks that compare two
            agents do not apply, and the report says so.
        feed: where to run it, what `make_feed` takes; it must give the same for the same keys. None: a
            `CheckFeed` of the two spaces and `num_environments`.
        observation_space, action_space: of one environment, without `feed`; default: Boxes of 3 and of 2 floats.
        steps: how often the environments step in a run; None: until learning_starts, then 16 times.
        learning_starts: transitions before the first update; None: what ``agent.config`` says, if it does.
        options: for the agent's init, beside the spaces.
        transformed: fields of the replay that the agent keeps otherwise than it was given them, say
            ``("rewards",)``; their values are not compared.
        seed: of the keys. The global generators are left as they were.

    Small networks and a small learning_starts make it a matter of seconds.

    Raises ConformanceError, an AssertionError, at the first broken promise: its text names the check, the place
    and the values. What a callback raises by itself is its ``__cause__``. TypeError or ValueError where the
    arguments contradict one another. One thread.
    """
    make, same_agent = _factory(agent, config)
    if feed is not None and (observation_space is not None or action_space is not None):
        raise ValueError("feed and a space are both given; a feed has its own spaces")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    for name in transformed:
        if name not in FIELDS:
            raise ValueError(f"transformed has {name!r}; a replay's fields are {', '.join(FIELDS)}")
    if feed is None:
        observation_space = observation_space or spaces.Box(-np.inf, np.inf, (3,), np.float32)
        action_space = action_space or spaces.Box(np.array([-1, -2], np.float32), np.array([1, 3], np.float32))
        feed = CheckFeed(observation_space, action_space, num_environments)
    else:
        feed = make_feed(feed)
    if learning_starts is None:
        hyperparameters = getattr(getattr(make(), "config", None), "hyperparameters", None)
        learning_starts = getattr(hyperparameters, "learning_starts", None)
    if steps is None:
        # A third more than needed: environments that are reset in a step of their own record nothing then.
        steps = math.ceil(4 / 3 * (learning_starts or 16) / feed.num_environments) + 16
    kit = Kit(
        make=make,
        same_agent=same_agent,
        feed=feed,
        options=dict(options or {}),
        steps=steps,
        learning_starts=learning_starts,
        transformed=transformed,
        seed=seed,
    )
    passed, not_applicable = [], {}
    for check in CHECKS:
        name = check.__name__
        try:
            with global_seed(UNLIKELY_SEED):
                check(kit)
        except NotApplicableError as reason:
            not_applicable[name] = str(reason)
        except BrokenError as broken:
            raise ConformanceError(broken.check or name, str(broken)) from broken.__cause__
        except Exception as error:
            raise ConformanceError(name, f"the agent raised {type(error).__name__}: {error}") from error
        else:
            passed.append(name)
    return AgentReport(passed=tuple(passed), not_applicable=not_applicable)


def _factory(agent: Any, config: Any) -> tuple[Callable[[], Any], str | None]:
    """A function that makes an agent, and why it makes but one; None where each is fresh."""
    if isinstance(agent, type):
        kind = agent
        return (kind if config is None else lambda: kind(config)), None
    if config is not None:
        raise TypeError("config is given; it goes with an agent class only")
    if callable(agent) and not any(hasattr(agent, name) for name in acting.CALLBACKS):
        return agent, None
    try:
        copy.deepcopy(agent)
    except Exception as error:  # it holds something that cannot be copied
        reason = f"two agents are needed, and this {type(agent).__name__} cannot be copied ({error}); pass a function"
        return (lambda: agent), reason
    return (lambda: copy.deepcopy(agent)), None
