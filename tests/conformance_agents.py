"""Agents for the conformance kit's tests: some that keep the contract, and one for each way of breaking it."""

import random

import numpy as np
import torch

from angle_rl.agents.noise import seeded_torch
from angle_rl.replay import ReplayBuffer
from angle_rl.spaces import row_of
from angle_rl.testing.probe import draw
from angle_rl.types import RandomKey


class CrossEntropy:
    """The cross-entropy method over linear policies: each environment tries one, the best eighth make the next."""

    def init(self, random_key, *, observation_space, action_space, **options):
        size = (observation_space.shape[0] + 1) * action_space.shape[0]
        state = {"mean": np.zeros(size), "std": np.ones(size), "scores": np.zeros(0), "tried": np.zeros((0, size))}
        self.low, self.high = action_space.low, action_space.high
        return state, random_key

    def reset(self, random_key, rl_state):
        key, random_key = random_key.split(2)
        state, seen = dict(rl_state.agent_state), rl_state.environment_state
        new = (seen.terminated | seen.truncated) if seen.stepped.any() else np.ones(len(seen.reward), bool)
        drawn = state["mean"] + state["std"] * key.normal(len(new), len(state["mean"])).numpy()
        state["trying"] = np.where(new[:, None], drawn, state.get("trying", drawn))
        state["returns"] = np.where(new, 0.0, state.get("returns", np.zeros(len(new))))
        return state, random_key

    def select_action(self, rl_state, iteration):
        rows = rl_state.environment_state.observation
        weights = rl_state.agent_state["trying"].reshape(len(rows), -1, rows.shape[1] + 1)
        values = np.einsum("nai,ni->na", weights[:, :, :-1], rows) + weights[:, :, -1]
        return np.clip(values, self.low, self.high).astype(np.float32), rl_state

    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        state = dict(next_rl_state.agent_state)
        state["returns"] = state["returns"] + np.where(next_rl_state.environment_state.stepped, reward, 0.0)
        return next_rl_state._replace(agent_state=state)

    def optimize_model(self, rl_state):
        state, seen = dict(rl_state.agent_state), rl_state.environment_state
        ended = seen.terminated | seen.truncated
        state["scores"] = np.concatenate([state["scores"], state["returns"][ended]])
        state["tried"] = np.concatenate([state["tried"], state["trying"][ended]])
        if len(state["scores"]) >= 8:
            best = state["tried"][np.argsort(state["scores"])[-len(state["scores"]) // 4 :]]
            state["mean"], state["std"] = best.mean(0), best.std(0) + 0.05
            state["scores"], state["tried"] = state["scores"][:0], state["tried"][:0]
        return rl_state._replace(agent_state=state)

    def export_state(self, state):
        return {name: torch.as_tensor(state[name]) for name in ("mean", "std", "scores", "tried")}, {}

    def import_state(self, state, tensors, values):
        state.update({name: tensor.numpy().copy() for name, tensor in tensors.items()})


class DiscreteState:
    """What `LinearQ` learns and counts; no policy."""


class LinearQ:
    """Q-learning with a linear network, a replay and an epsilon that falls: what the broken agents are made from."""

    class config:
        class hyperparameters:
            learning_starts = 12

    def init(self, random_key, *, observation_space, action_space, replay=None, **options):
        network_key, replay_key, random_key = random_key.split(3)
        state = DiscreteState()
        with seeded_torch(network_key, torch.device("cpu")):
            state.network = torch.nn.Linear(observation_space.shape[0], int(action_space.n))
        state.optimizer = torch.optim.Adam(state.network.parameters(), 0.01)
        state.replay = ReplayBuffer(
            200, observation_space=observation_space, action_space=action_space, seed=replay_key.seed()
        )
        state.steps, state.start = 0, int(action_space.start)
        return state, random_key

    def reset(self, random_key, rl_state):
        return rl_state.agent_state, random_key

    def select_action(self, rl_state, iteration):
        state, observations = rl_state.agent_state, rl_state.environment_state.observation
        explore_key, action_key, random_key = rl_state.random_key.split(3)
        n = len(observations)
        with torch.no_grad():
            greedy = state.network(torch.as_tensor(observations)).argmax(1)
        some = (action_key.uniform(n) * 4).long()
        actions = torch.where(explore_key.uniform(n) < self.epsilon(state), some, greedy) + state.start
        return actions.numpy(), rl_state._replace(random_key=random_key)

    def epsilon(self, state):
        return max(0.1, 1 - state.steps / 100)

    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        before, after = rl_state.environment_state, next_rl_state.environment_state
        self.insert(rl_state.agent_state, before, action, reward, terminated, after, np.flatnonzero(after.stepped))
        return next_rl_state

    def insert(self, state, before, action, reward, terminated, after, rows):
        arrays = (before.observation, action, reward, after.final_observation, terminated, after.truncated)
        if len(rows):
            state.replay.insert(*(array[rows] for array in arrays), streams=rows)
            state.steps += len(rows)

    def optimize_model(self, rl_state):
        state = rl_state.agent_state
        if state.steps > self.config.hyperparameters.learning_starts:
            self.update(state, state.replay.sample(8))
        return rl_state

    def update(self, state, batch):
        with torch.no_grad():
            target = batch.rewards + batch.discounts * state.network(batch.next_observations).max(1).values
        q = state.network(batch.observations).gather(1, (batch.actions - state.start)[:, None]).squeeze(1)
        state.optimizer.zero_grad()
        (q - target).square().mean().backward()
        state.optimizer.step()

    def export_state(self, state):
        tensors = dict(state.network.state_dict())
        for index, slots in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizers.{index}.{slot}": tensor for slot, tensor in slots.items()}
        arrays, facts = state.replay.export_state()
        tensors |= {f"replay.{name}": torch.as_tensor(array) for name, array in arrays.items()}
        return tensors, {"replay": facts, "steps": state.steps}

    def import_state(self, state, tensors, values):
        state.network.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
        slots = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizers."):
                _, index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = tensor.clone()
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        parts = {name: tensors[f"replay.{name}"].numpy() for name in ("header", "index", "records")}
        state.replay.import_state(parts, values["replay"])
        state.steps = values["steps"]


class NestedRecorder:
    """Acts at random on nested observations, and keeps them."""

    keeps_unstepped = False

    def init(self, random_key, *, observation_space, action_space, **options):
        replay = ReplayBuffer(200, observation_space=observation_space, action_space=action_space)
        return {"replay": replay, "space": action_space}, random_key

    def reset(self, random_key, rl_state):
        return rl_state.agent_state, random_key

    def select_action(self, rl_state, iteration):
        key, random_key = rl_state.random_key.split(2)
        n = len(rl_state.environment_state.reward)
        return draw(rl_state.agent_state["space"], n, key), rl_state._replace(random_key=random_key)

    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        before, after = rl_state.environment_state, next_rl_state.environment_state
        rows = np.flatnonzero(after.stepped | self.keeps_unstepped)
        given = (before.observation, action, reward, after.final_observation, terminated, after.truncated)
        if len(rows):
            next_rl_state.agent_state["replay"].insert(*(row_of(part, rows) for part in given), streams=rows)
        return next_rl_state

    def optimize_model(self, rl_state):
        return rl_state


# Agents that break it ----------------------------------------------------------------------------------------


class NoOptimizeModel:
    init, reset = LinearQ.init, LinearQ.reset
    select_action, record_observation = LinearQ.select_action, LinearQ.record_observation


class WrongSignature(LinearQ):
    def record_observation(self, rl_state, action, reward, next_rl_state):
        return next_rl_state


class InitGivesTheState(LinearQ):
    def init(self, random_key, **options):
        return super().init(random_key, **options)[0]


class InitKeepsTheKey(LinearQ):
    def init(self, random_key, **options):
        return super().init(random_key, **options)[0], random_key


class ReturnsTheFirstArgument(LinearQ):
    def record_observation(self, rl_state, *arguments):
        super().record_observation(rl_state, *arguments)
        return rl_state


class ChangesTheIteration(LinearQ):
    def record_observation(self, *arguments):
        state = super().record_observation(*arguments)
        return state._replace(iteration=state.iteration + 1)


class ChangesTheEpisode(LinearQ):
    def optimize_model(self, rl_state):
        return super().optimize_model(rl_state)._replace(episode=7)


class SwapsTheEnvironment(LinearQ):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        seen = state.environment_state
        return action, state._replace(environment_state=seen._replace(reward=seen.reward + 1))


class WritesIntoTheObservation(LinearQ):
    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        state = super().record_observation(rl_state, action, reward, terminated, next_rl_state)
        rl_state.environment_state.observation[:] = 0
        return state


class WritesIntoTheActions(LinearQ):
    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        state = super().record_observation(rl_state, action, reward, terminated, next_rl_state)
        action -= 1
        return state


class DrawsWhileRecording(LinearQ):
    def record_observation(self, *arguments):
        state = super().record_observation(*arguments)
        return state._replace(random_key=state.random_key.split(1)[0])


class GivesActionsOnly(LinearQ):
    def select_action(self, rl_state, iteration):
        return super().select_action(rl_state, iteration)[0]


class ResetGivesTheState(LinearQ):
    def reset(self, random_key, rl_state):
        return rl_state.agent_state, random_key.value


class RecordsToNowhere(LinearQ):
    def record_observation(self, *arguments):
        super().record_observation(*arguments)


class LosesTheKey(LinearQ):
    def optimize_model(self, rl_state):
        return super().optimize_model(rl_state)._replace(random_key=None)


class OutOfBounds(LinearQ):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        return np.where(np.arange(len(action)) == 1, 5, action), state


class OutOfTheBox(CrossEntropy):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        return action + np.float32(0.5), state


class WrongShape(LinearQ):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        return action[:, None], state


class FloatActions(LinearQ):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        return action.astype(np.float32), state


class TensorActions(LinearQ):
    def select_action(self, rl_state, iteration):
        action, state = super().select_action(rl_state, iteration)
        return torch.as_tensor(action), state


class GlobalNumPy(LinearQ):
    def select_action(self, rl_state, iteration):
        np.random.random()  # noqa: NPY002
        return super().select_action(rl_state, iteration)


class GlobalTorch(LinearQ):
    def optimize_model(self, rl_state):
        torch.rand(1)
        return super().optimize_model(rl_state)


class GlobalRandom(LinearQ):
    def reset(self, random_key, rl_state):
        random.random()
        return super().reset(random_key, rl_state)


class GlobalInit(LinearQ):
    def init(self, random_key, **options):
        torch.manual_seed(0)
        return super().init(random_key, **options)


class ReadsTheGlobalSeed(LinearQ):
    def epsilon(self, state):
        return torch.initial_seed() % 2


class CountsAgents(LinearQ):
    made = 0

    def __init__(self):
        CountsAgents.made += 1
        self.number = CountsAgents.made

    def init(self, random_key, **options):
        return super().init(random_key.split(self.number)[-1], **options)


class ActsUnderOneKey(LinearQ):
    def select_action(self, rl_state, iteration):
        return super().select_action(rl_state, iteration)[0], rl_state


class LearnsUnderOneKey(LinearQ):
    def update(self, state, batch):
        super().update(state, batch._replace(rewards=batch.rewards + self.key.normal(len(batch.rewards))))

    def optimize_model(self, rl_state):
        self.key = rl_state.random_key
        return super().optimize_model(rl_state)


class ResetsParameters(LinearQ):
    def reset(self, random_key, rl_state):
        if rl_state.environment_state.terminated.any():
            rl_state.agent_state.network.bias.data.zero_()
        return rl_state.agent_state, random_key


class ResetsTheOptimizer(LinearQ):
    def reset(self, random_key, rl_state):
        state = rl_state.agent_state
        state.optimizer = torch.optim.Adam(state.network.parameters(), 0.01)
        return state, random_key


class ResetsTheReplay(LinearQ):
    def reset(self, random_key, rl_state):
        state = rl_state.agent_state
        state.replay.remove(state.replay.export_arrays()["handles"][:1])
        return state, random_key


class ForgetsTheOptimizer(LinearQ):
    def export_state(self, state):
        tensors, values = super().export_state(state)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizers.")}, values


class ForgetsTheBias(LinearQ):
    def import_state(self, state, tensors, values):
        super().import_state(state, tensors | {"bias": state.network.bias.detach().clone()}, values)


class ForgetsTheReplay(LinearQ):
    def import_state(self, state, tensors, values):
        parts, facts = state.replay.export_state()
        parts = {f"replay.{name}": torch.as_tensor(part) for name, part in parts.items()}
        super().import_state(state, tensors | parts, values | {"replay": facts})


class ForgetsItsCounter(LinearQ):
    def import_state(self, state, tensors, values):
        super().import_state(state, tensors, values | {"steps": 0})


class SavesWhatIsNoJson(LinearQ):
    def export_state(self, state):
        tensors, values = super().export_state(state)
        return tensors, values | {"key": RandomKey(0)}


class MixesRows(LinearQ):
    def select_action(self, rl_state, iteration):
        seen = rl_state.environment_state
        if rl_state.agent_state.steps > 20:
            shifted = seen._replace(observation=seen.observation - 3 * seen.observation.mean(0))
            action, state = super().select_action(rl_state._replace(environment_state=shifted), iteration)
            return action, state._replace(environment_state=seen)
        return super().select_action(rl_state, iteration)


class RecordsUnsteppedRows(LinearQ):
    def insert(self, state, before, action, reward, terminated, after, rows):
        super().insert(state, before, action, reward, terminated, after, np.arange(len(action)))


class StoresTheNextStart(LinearQ):
    def insert(self, state, before, action, reward, terminated, after, rows):
        super().insert(
            state, before, action, reward, terminated, after._replace(final_observation=after.observation), rows
        )


class TakesTheLimitForAnEnd(LinearQ):
    def insert(self, state, before, action, reward, terminated, after, rows):
        super().insert(state, before, action, reward, terminated | after.truncated, after, rows)


class StoresTheWrongRewards(LinearQ):
    def insert(self, state, before, action, reward, terminated, after, rows):
        super().insert(state, before, action, reward[::-1], terminated, after, rows)


class SkipsEnds(LinearQ):
    def insert(self, state, before, action, reward, terminated, after, rows):
        super().insert(state, before, action, reward, terminated, after, rows[~terminated[rows]])


class LearnsTooEarly(LinearQ):
    def optimize_model(self, rl_state):
        if rl_state.agent_state.steps > 8:
            self.update(rl_state.agent_state, rl_state.agent_state.replay.sample(4))
        return rl_state


class NeverLearns(LinearQ):
    def update(self, state, batch):
        pass


class Diverges(LinearQ):
    def update(self, state, batch):
        super().update(state, batch._replace(rewards=batch.rewards * (1 if state.steps < 20 else np.nan)))
