"""The reference engine: one update in eager torch, for any networks on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from angle_rl import ops
from angle_rl.engines.base import PolicyLoss, Update, UpdateResult, one_by_one, target_pairs, without_gradients
from angle_rl.engines.data_parallel import everywhere, through
from angle_rl.types import Batch, RandomKey, UpdateSpec


class TorchEngine:
    """Executes updates with autograd. One thread at a time; its randomness is the key's and the replay's.

    Networks in DistributedDataParallel take a step down the mean of all processes' losses, or none if one of these is
    not finite: so they stay equal. Every process has to take the same updates then.
    """

    name = "torch"

    def __init__(self, spec: UpdateSpec, update: Update, *, why: str = "as asked for") -> None:
        self.why = why
        self._spec = spec
        self._update = update
        self._wrappers = update.data_parallel
        self._critic_parameters = [p for p in update.critics.parameters() if p.requires_grad]
        self._pairs = target_pairs(update)
        self._sample_device = None if update.device.type == "cpu" else update.device

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, `policy_steps` policy steps, and the targets' update where it is due.

        A loss or gradient that is NaN or infinite ends the update there: its step, the new priorities and the
        targets' update are left out.
        """
        spec, update = self._spec, self._update
        target_key, *policy_keys = random_key.split(1 + policy_steps)
        batch = self._sample()
        scale = update.reward_scale()
        rewards = batch.rewards if scale == 1.0 else batch.rewards * scale
        critic_weights = unlike_one(update.loss_weights())
        q, critic_loss, td_error = through(
            self._wrappers.get("critics"),
            lambda: critics_loss(spec, update, batch, rewards, critic_weights, target_key),
        )
        result = UpdateResult(
            finite=self._is_finite("critics", critic_loss),
            batch=batch,
            q=q.detach(),
            critic_loss=critic_loss.detach(),
            policy_loss=None,
            log_prob=None,
        )
        if not result.finite or not self._descend(critic_loss, update.optimizers["critics"]):
            return result._replace(finite=False)
        return self.follow(result, td_error, policy_keys, copy_targets)

    def follow(
        self, result: UpdateResult, td_error: torch.Tensor, policy_keys: Sequence[RandomKey], copy_targets: bool
    ) -> UpdateResult:
        """What follows an update's critic step, whoever took it: a policy step with each of the keys, the priorities,
        and the targets' update where it is due.

        `result` is the critic step's, `td_error` ``[batch]`` what goes into the priorities.
        """
        spec, update, batch = self._spec, self._update, result.batch
        for key in policy_keys:
            learned, stepped = self._policy_step(batch if spec.policy_batch == "critic" else self._sample(), key)
            log_prob = None if learned.log_prob is None else learned.log_prob.detach()
            result = result._replace(policy_loss=learned.loss.detach(), log_prob=log_prob)
            if not stepped:
                return result._replace(finite=False)
            update.after_policy_step(learned)

        if spec.prioritized:  # last, so that an update cut short leaves the priorities
            update.replay.update_priorities(batch.handles, td_error)
        copies = spec.targets_follow == "copies"
        if copy_targets if copies else len(policy_keys) > 0 or spec.targets_follow == "update":
            pairs = self._pairs
            ops.update_targets(pairs.targets, pairs.online, 1.0 if copies else spec.tau)
            for target, online in zip(pairs.target_buffers, pairs.online_buffers, strict=True):
                target.copy_(online)  # running statistics and constants: taken over, not averaged
        return result

    def update_many(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
        """One update after the other, each when its result is asked for."""
        return one_by_one(self, calls)

    def _sample(self) -> Batch:
        batch: Batch = self._update.replay.sample(self._spec.batch_size, device=self._sample_device)
        return batch

    def _policy_step(self, batch: Batch, key: RandomKey) -> tuple[PolicyLoss, bool]:
        """One step of the policy, through critics whose own gradients are neither computed nor touched, and whether
        it was finite and taken.
        """
        with without_gradients(self._critic_parameters):
            learned = through(self._wrappers.get("policy"), lambda: self._update.policy_loss(batch, key))
            stepped = self._is_finite("policy", learned.loss) and self._descend(
                learned.loss, self._update.optimizers["policy"]
            )
        return learned, stepped

    def _is_finite(self, network: str, loss: torch.Tensor) -> bool:
        """Whether a network's loss is finite, in all processes where there are several."""
        return everywhere(self._wrappers.get(network), _is_finite(loss))

    def _descend(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """A step down the loss; False, and no step, where a gradient is not finite."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # One look at the norm, and at every gradient only where it is not finite: large ones' squares may overflow.
        if not _is_finite(norm) and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.zero_grad(set_to_none=True)
            return False
        if self._spec.max_gradient_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._spec.max_gradient_norm, norm)
        optimizer.step()
        return True


def critics_loss(
    spec: UpdateSpec,
    update: Update,
    batch: Batch,
    rewards: torch.Tensor,
    critic_weights: torch.Tensor | None,
    key: RandomKey,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the critics descend on a batch: q ``[critics, batch]``, the loss, and td_error ``[batch]`` (no gradient).

    `rewards` ``[batch]`` are the batch's, scaled; `critic_weights` ``[critics]``, None for ones.
    """
    with torch.no_grad():
        future = update.next_values(batch, key)
        td_target = ops.twin_q_target(rewards, batch.discounts, *future)
    q = update.q_values(batch.observations, batch.actions)
    weights = batch.importance_weights if spec.prioritized else None
    loss, td_error = ops.twin_q_loss(q, td_target, weights, huber_delta=spec.huber_delta, critic_weights=critic_weights)
    return q, loss, td_error


def unlike_one(weights: torch.Tensor | None) -> torch.Tensor | None:
    """None where all are 1: nothing has to be multiplied then."""
    return None if weights is None or bool((weights == 1).all()) else weights


def _is_finite(scalar: torch.Tensor) -> bool:
    return math.isfinite(scalar.item())
