"""Updates whose critics learn in compiled code and whose policy learns in torch: for losses of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from angle_rl.engines.base import Update, UpdateResult, one_by_one
from angle_rl.engines.native import NativeEngine
from angle_rl.engines.recognize import native_refusal
from angle_rl.engines.torch import TorchEngine
from angle_rl.types import RandomKey, UpdateSpec

OWN_LOSS = {"soft": "soft", "smoothed": "deterministic", "deterministic": "deterministic"}
"""The policy loss that the compiled engine has beside each of its targets' values"""


class NativeCriticsEngine:
    """The native engine's target and critic step, the torch engine's policy steps and all that follows them.

    Takes what `critics_refusal` says nothing against, with the numbers of the torch engine: the same keys draw the
    same noise. One thread at a time.
    """

    name = "native critics"

    def __init__(
        self,
        spec: UpdateSpec,
        update: Update,
        threads: int | None = None,
        *,
        precision: str = "float32",
        why: str = "native",
    ) -> None:
        self._critics = NativeEngine(
            _critics_spec(spec), _critics_update(update), threads, precision=precision, writes_priorities=False
        )
        self._rest = TorchEngine(spec, update)
        reason = "auto: " if why == "auto" else "as configured; "
        self.why = f"{reason}policy step in torch, since its loss is not one that native knows; {self._critics.how}"

    @property
    def threads(self) -> int:
        """Those that the critics' step takes."""
        return self._critics.threads

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled part's workspace."""
        return self._critics.nbytes

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, `policy_steps` policy steps, the priorities, and the targets' update where it is due.

        Ends early as the torch engine's. TypeError or ValueError as `NativeEngine.update_many`.
        """
        _, *policy_keys = random_key.split(1 + policy_steps)  # the native engine splits the first off likewise
        result = self._critics.update(random_key, 0)
        if not result.finite:
            return result
        return self._rest.follow(result, self._critics.td_error, policy_keys, copy_targets)

    def update_many(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
        """One update after the other, each when its result is asked for."""
        return one_by_one(self, calls)


def critics_refusal(spec: UpdateSpec, update: Update) -> str | None:
    """Why critics cannot learn natively beside a policy that learns in torch, in a few words; None where they can.

    They can where the policy's loss is not known and nothing else is against the native engine.
    """
    return native_refusal(_critics_spec(spec), _critics_update(update))


def _critics_spec(spec: UpdateSpec) -> UpdateSpec:
    """For updates of no policy steps: with these no target moves."""
    return dataclasses.replace(
        spec,
        policy_loss=OWN_LOSS.get(spec.next_value, spec.policy_loss),
        policy_batch="critic",
        targets_follow="policy",
        target_entropy=None,
    )


def _critics_update(update: Update) -> Update:
    """Of the entropy coefficient the critics know no more than its value."""
    learning = {name: update.optimizers[name] for name in ("critics", "policy") if name in update.optimizers}
    return dataclasses.replace(update, optimizers=learning, log_entropy_coefficient=None)
