"""The engine for a CUDA device: k updates, from sampled rows to new priorities, recorded once and launched in one call.

Launching an update's hundreds of small kernels one by one takes the host far longer than the device needs for them. A
CUDA graph holds them all. What it holds is fixed, so all that changes between launches lies in tensors: parameters,
moments and the replay where they are; keys, learning rates, reward scale and loss weights in one tensor that the host
fills before each launch. And the host cannot look at a loss in between: what TorchEngine leaves out after one that is
not finite, the device leaves out by itself, see `masked`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map

from angle_rl.engines.base import PolicyLoss, Update, UpdateResult, target_pairs, without_gradients
from angle_rl.engines.graph_keys import CannotCaptureError, DrawProgram, Draws
from angle_rl.engines.masked import (
    kept_where_failed,
    learning_rates,
    mark_not_finite,
    numbers_in_graph,
    recordable,
    state_tensors,
    step_refusal,
)
from angle_rl.engines.torch import TorchEngine, critics_loss, unlike_one
from angle_rl.models import takes_noise
from angle_rl.types import Batch, RandomKey, UpdateSpec

MOST_GRAPHS = 16
"""Plans that are kept recorded; the one that was launched longest ago goes first"""

Plan = tuple[tuple[int, bool], ...]
"""Policy steps, and whether targets are copied, of each update of a call"""


def graph_refusal(spec: UpdateSpec, update: Update) -> str | None:
    """Why updates cannot be recorded, in a few words; None where they can, as far as can be seen beforehand.

    Any thread, while nobody changes the parts.
    """
    if update.device.type != "cuda":
        return f"the networks are on {update.device}"
    if not getattr(update.replay, "resident", False):
        return "the replay keeps its rows in the host's memory"
    if update.changes_on_host is not None:
        return update.changes_on_host
    policy: Any = update.policy
    if policy is not None and not takes_noise(type(policy).sample_actions):
        return "the policy's sample_actions takes no noise="
    for name, optimizer in update.optimizers.items():
        reason = step_refusal(optimizer)
        if reason is not None:
            return f"the optimizer of {name} {reason}"
    return None


class CudaGraphEngine:
    """Executes updates as CUDA graphs, for any networks that can be recorded. One thread at a time.

    The first call with a plan takes its updates in torch, the second records them, and from then on they are launched.
    After each call the host waits for the device once, to learn which update was not finite. Where recording fails,
    updates go on in torch, and a RuntimeWarning says why; `name` and `why` change accordingly.

    The numbers are TorchEngine's from the same keys, but for rounding. After an update that is not finite, those behind
    it in the same call change nothing and draw nothing, as if they had not been asked for.

    Args:
        capture: False: nothing is recorded, the same steps are taken one by one, on any device (for tests).

    The replay has, besides `sample` and `update_priorities`: ``resident``, True; ``refresh()``, before each call;
    ``launched(samples=)``, after each launch of so many draws; ``sample(n, out=, where=)`` and ``update_priorities(
    handles, td_errors, where=)``, a bool scalar on the device without which nothing changes, of which neither waits
    for it.
    """

    def __init__(self, spec: UpdateSpec, update: Update, *, why: str = "as asked for", capture: bool = True) -> None:
        self.name = "cuda_graph"
        self.why = why
        self._spec = spec
        self._update = update
        self._capture = capture
        self._device = update.device
        self._optimizers = list(update.optimizers.values())
        self._critic_parameters = [p for p in update.critics.parameters() if p.requires_grad]
        self._pairs = target_pairs(update)
        modules = (update.critics, update.policy, update.target_critics, update.target_policy)
        self._learned = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
        if update.log_entropy_coefficient is not None:
            self._learned.append(update.log_entropy_coefficient)
        self._statistics = [
            buffer
            for module in modules
            if module is not None
            for part in module.modules()
            if isinstance(part, torch.nn.modules.batchnorm._NormBase)
            for buffer in part.buffers(recurse=False)
        ]
        self._one = torch.ones((), device=self._device)
        tau = 1.0 if spec.targets_follow == "copies" else spec.tau
        self._moved, self._left = (
            {d: torch.tensor(pair, dtype=d, device=self._device) for d in {t.dtype for t in self._pairs.targets}}
            for pair in ([1.0 - tau, tau], [1.0, 0.0])
        )
        self._batches: dict[str, Batch] = {}  # the critics' and the policy's own, filled anew by every update
        self._coefficient: torch.Tensor | None = None  # where the entropy coefficient lies in all graphs
        self._samples = 0  # drawn since this was last set to 0
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._torch: TorchEngine | None = None  # takes the updates from now on

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, `policy_steps` policy steps, the priorities, and the targets' update where it is due."""
        (result,) = self.update_many([(random_key, policy_steps, copy_targets)])
        return result

    def update_many(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
        """The updates, in one launch; ends after the first that is not finite. Waits for the device once."""
        if not calls:
            return
        outcome = None
        if self._torch is None:
            try:
                outcome = self._take(calls)
            except CannotCaptureError as reason:
                self._give_up(str(reason))
        if outcome is None:
            assert self._torch is not None
            yield from self._torch.update_many(calls)
            return
        for result, (critics_failed, failed) in zip(outcome.results, outcome.flags.tolist(), strict=True):
            if critics_failed:
                result = result._replace(policy_loss=None, log_prob=None)
            yield result._replace(finite=not failed)
            if failed:
                return

    # Calls ----------

    def _take(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> _Outcome:
        """The updates, taken, recorded and launched, or launched."""
        update = self._update
        keys = [key for key, _, _ in calls]
        plan = tuple((policy_steps, copies) for _, policy_steps, copies in calls)
        weights = unlike_one(update.loss_weights())
        numbers = [update.reward_scale(), *learning_rates(self._optimizers)]
        weighted = 0 if weights is None else len(weights)
        if weights is not None:
            numbers += weights.tolist()
        update.replay.refresh()
        self._place_coefficient()
        which = (plan, weighted, *map(numbers_in_graph, self._optimizers))
        recorded = self._recorded.get(which)
        if recorded is None or recorded.addresses != self._addresses():
            inputs = _Inputs(0, len(numbers), self._device)
            inputs.send([], numbers)
            draws = Draws(keys, self._device)
            with _aside(self._device):
                outcome = self._body(plan, draws, inputs, weighted)
            self._recorded[which] = _Recorded(
                program=draws.finish(), samples=self._samples, addresses=self._addresses()
            )
            self._recorded.move_to_end(which)
            if len(self._recorded) > MOST_GRAPHS:
                self._recorded.popitem(last=False)
            if draws.refusal is not None:
                self._give_up(draws.refusal)
            return outcome
        self._recorded.move_to_end(which)
        known = recorded.program
        inputs = recorded.inputs = recorded.inputs or _Inputs(known.entries, len(numbers), self._device)
        inputs.send(known.values(keys), numbers)

        def body() -> _Outcome:
            draws = Draws(keys, self._device, known, inputs.keys)
            outcome = self._body(plan, draws, inputs, weighted)
            draws.finish()
            return outcome

        if not self._capture:
            return body()
        if recorded.graph is None:
            recorded.graph = _Graph(body, self._device)
        recorded.graph.launch()
        update.replay.launched(samples=recorded.samples)
        torch.autograd.graph.increment_version(self._learned)
        return recorded.graph.outcome

    def _give_up(self, reason: str) -> None:
        """From now on in torch."""
        warnings.warn(f"engine cuda_graph: {reason}; updates go on in torch", RuntimeWarning, stacklevel=4)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)  # they may lie in what was recorded
        if self._coefficient is not None:
            self._update.set_entropy_coefficient(self._coefficient)
        self._recorded.clear()
        self.name, self.why = "torch", f"not cuda_graph, since {reason}"
        self._torch = TorchEngine(self._spec, self._update, why=self.why)

    def _place_coefficient(self) -> None:
        """Have the entropy coefficient where graphs read it."""
        current = self._update.entropy_coefficient()
        if current is None or current is self._coefficient:
            return
        if self._coefficient is None:
            self._coefficient = current.detach().to(self._device, copy=True)
        else:
            self._coefficient.copy_(current.detach())
        self._update.set_entropy_coefficient(self._coefficient)

    def _addresses(self) -> list[int]:
        """Where all lies that an update changes."""
        moments = [tensor for optimizer in self._optimizers for tensor in state_tensors(optimizer)]
        return [tensor.data_ptr() for tensor in (*self._learned, *moments)]

    # What is recorded: nothing below may wait for the device, or read on the host what changes ----------

    def _body(self, plan: Plan, draws: Draws, inputs: _Inputs, weighted: int) -> _Outcome:
        """The updates of a plan."""
        self._samples = 0
        rates = len(inputs.floats) - 1 - weighted
        scale, weights = inputs.floats[0], inputs.floats[1 + rates :] if weighted else None
        failed = torch.zeros((), device=self._device)  # 1 from the first step on that is not finite
        flags = torch.empty(len(plan), 2, device=self._device)
        results = []
        with recordable(self._optimizers, list(inputs.floats[1 : 1 + rates].unbind())):
            for key, (policy_steps, copies), flag in zip(draws.keys(), plan, flags.unbind(), strict=True):
                # GraphKey is a RandomKey in all that updates do with one.
                results.append(self._single(key, policy_steps, copies, scale, weights, failed, flag))
        last = self._update.entropy_coefficient()
        if self._coefficient is not None and last is not None and last is not self._coefficient:
            self._coefficient.copy_(last)
            self._update.set_entropy_coefficient(self._coefficient)
        return _Outcome(results, flags)

    def _single(
        self,
        key: Any,
        policy_steps: int,
        copies: bool,
        scale: torch.Tensor,
        weights: torch.Tensor | None,
        failed: torch.Tensor,
        flag: torch.Tensor,
    ) -> UpdateResult:
        """One update. Sets `flag` ``[2]`` to whether it ended at the critics, and whether it ended early at all."""
        spec, update = self._spec, self._update
        target_key, *policy_keys = key.split(1 + policy_steps)
        batch = self._sample("critics", failed)
        with self._no_statistics_after(failed):
            q, loss, td_error = critics_loss(spec, update, batch, batch.rewards * scale, weights, target_key)
            self._descend(loss, update.optimizers["critics"], failed)
        flag[0].copy_(failed)
        result = UpdateResult(True, batch, q.detach(), loss.detach(), None, None)
        for policy_key in policy_keys:
            own = batch if spec.policy_batch == "critic" else self._sample("policy", failed)
            before = failed.clone() if result.policy_loss is not None else None
            with without_gradients(self._critic_parameters), self._no_statistics_after(failed):
                learned = update.policy_loss(own, policy_key)
                self._descend(learned.loss, update.optimizers["policy"], failed)
            self._after_policy_step(learned, failed)
            policy_loss, log_prob = (
                learned.loss.detach(),
                None if learned.log_prob is None else learned.log_prob.detach(),
            )
            if before is not None and result.policy_loss is not None:  # the step that failed has the last word
                policy_loss = torch.where(before > 0, result.policy_loss, policy_loss)
                if log_prob is not None and result.log_prob is not None:
                    log_prob = torch.where(before > 0, result.log_prob, log_prob)
            result = result._replace(policy_loss=policy_loss, log_prob=log_prob)
        if spec.prioritized:
            update.replay.update_priorities(batch.handles, td_error, where=failed == 0)
        follows = len(policy_keys) > 0 or spec.targets_follow == "update"
        if copies if spec.targets_follow == "copies" else follows:
            self._move_targets(failed)
        flag[1].copy_(failed)
        return result

    def _sample(self, whose: str, failed: torch.Tensor) -> Batch:
        """A batch; the one before, or at first zeros, where `failed` is 1."""
        self._samples += 1
        replay, size = self._update.replay, self._spec.batch_size
        batch = self._batches.get(whose)
        if batch is None and whose == "critics":  # the first of all, before which nothing can have failed
            first: Batch = replay.sample(size)
            self._batches[whose] = first
            return first
        if batch is None:
            batch = self._batches[whose] = Batch(*tree_map(torch.zeros_like, self._batches["critics"]))
        replay.sample(size, out=batch, where=failed == 0)
        return batch

    def _descend(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, failed: torch.Tensor) -> None:
        """A step down the loss, or none where it or a gradient is not finite: then `failed` becomes 1."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        mark_not_finite([*gradients, loss], failed, self._one)
        if self._spec.max_gradient_norm is not None:
            norm = torch.nn.utils.get_total_norm(gradients)
            torch.nn.utils.clip_grads_with_norm_(parameters, self._spec.max_gradient_norm, norm)
        with kept_where_failed(failed, [optimizer]):
            optimizer.step()

    @contextmanager
    def _no_statistics_after(self, failed: torch.Tensor) -> Iterator[None]:
        """Inside, running statistics of batches stay as they are where `failed` is 1 already on the way in."""
        if not self._statistics:
            yield
            return
        before, stay = [buffer.clone() for buffer in self._statistics], failed > 0
        yield
        for buffer, old in zip(self._statistics, before, strict=True):
            buffer.copy_(torch.where(stay, old, buffer))

    def _after_policy_step(self, learned: PolicyLoss, failed: torch.Tensor) -> None:
        """What follows a policy step. After one that was left out, optimisers and the entropy coefficient stay."""
        update = self._update
        others = [optimizer for name, optimizer in update.optimizers.items() if name not in ("critics", "policy")]
        before = update.entropy_coefficient()
        with kept_where_failed(failed, others):
            update.after_policy_step(learned)
        after = update.entropy_coefficient()
        if before is not None and after is not None and after is not before:
            update.set_entropy_coefficient(torch.where(failed > 0, before, after))

    @torch.no_grad()
    def _move_targets(self, failed: torch.Tensor) -> None:
        """target <- tau * online + (1 - tau) * target, or nothing where `failed` is 1."""
        pairs, finite = self._pairs, failed == 0
        for dtype, moved in self._moved.items():
            keep, share = torch.where(finite, moved, self._left[dtype]).unbind()
            targets = [target for target in pairs.targets if target.dtype == dtype]
            online = [
                online for online, target in zip(pairs.online, pairs.targets, strict=True) if target.dtype == dtype
            ]
            torch._foreach_mul_(targets, keep)
            torch._foreach_add_(targets, torch._foreach_mul(online, share))
        for target, source in zip(pairs.target_buffers, pairs.online_buffers, strict=True):
            target.copy_(torch.where(finite, source, target))


# Their parts ----------


class _Outcome(NamedTuple):
    """What updates leave: tensors that the next launch fills anew."""

    results: list[UpdateResult]  # `finite` and whether the policy's part counts are not known yet
    flags: torch.Tensor  # [updates, 2] float32: 1 where it failed at the critics, and where it failed at all


@dataclass(kw_only=True)
class _Recorded:
    """What is known of a plan whose updates were taken before."""

    program: DrawProgram
    samples: int  # batches drawn
    addresses: list[int]  # of all that its updates change
    inputs: _Inputs | None = None
    graph: _Graph | None = None


class _Inputs:
    """Numbers that the host sets before a launch: int64 for keys and float32, sent together.

    Fill it again only when the device has taken what was sent before.
    """

    def __init__(self, keys: int, floats: int, device: torch.device) -> None:
        words = keys + (floats + 1) // 2
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(words, dtype=torch.int64, device=device)
        array = self._host.numpy()
        self._keys, self._floats = array[:keys], array[keys:].view(np.float32)[:floats]
        self.keys = self._sent[:keys]
        self.floats = self._sent[keys:].view(torch.float32)[:floats]

    def send(self, keys: list[int], floats: list[float]) -> None:
        """Set them, on torch's current stream."""
        self._keys[:] = keys
        self._floats[:] = floats
        self._sent.copy_(self._host, non_blocking=True)


class _Graph:
    """One recorded body. CannotCaptureError where it cannot be recorded; nothing has run then."""

    def __init__(self, body: Callable[[], _Outcome], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": another thread may go on allocating on the device meanwhile.
            current = torch.cuda.stream(torch.cuda.current_stream(device))  # comes back also where recording breaks off
            own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with current, torch.cuda.graph(self._graph, stream=own, capture_error_mode="thread_local"):
                self.outcome = body()
        except CannotCaptureError:
            raise
        except Exception as error:  # whatever a module does that the first run, which was not recorded, let it do
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CannotCaptureError(f"recording failed ({first})") from error

    def launch(self) -> None:
        """Run it, on torch's current stream."""
        self._graph.replay()


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a stream of its own, after what the current one has and before what it will have."""
    if device.type != "cuda":
        yield
        return
    current, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(current)
    with torch.cuda.stream(own):
        yield
    current.wait_stream(own)
