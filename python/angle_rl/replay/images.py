"""Which observations are images, which are stacks of frames, and what a row of them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from angle_rl.replay.arrays import check_flag, check_integer
from angle_rl.schema import Field, Schema

_MOST_FRAMES = 64
_SURE_STACKS = (2, 4)  # first axes that no image format uses for colours: 1 is grey, 3 colour


def _is_image(field: Field) -> bool:
    return field.dtype == np.uint8 and len(field.shape) >= 2


def shares_successors(schema: Schema, asked: Any, frame_stack: Any) -> bool:
    """Whether next observations are read from the next row. ValueError where frame stacks need it and it is refused."""
    frames = 1 if frame_stack is None else check_integer("frame_stack", frame_stack, 1, _MOST_FRAMES)
    if asked is None:
        return any(_is_image(field) for field in schema.observations) or frames > 1
    if not check_flag("share_successors", asked) and frames > 1:
        raise ValueError(f"frame_stack is {frames} and share_successors False; stacks need shared successors")
    return bool(asked)


def frames_of(schema: Schema, asked: Any, share: bool) -> list[int]:
    """The frames of each of the schema's fields, 1 for none. ValueError where no observation is such a stack."""
    frames = []
    for field in schema.observations:
        stacked = len(field.shape) >= 3 and field.shape[0] == asked
        if asked is None:
            stacked = share and _is_image(field) and len(field.shape) == 3 and field.shape[0] in _SURE_STACKS
        frames.append(field.shape[0] if stacked else 1)
    if asked is not None and asked > 1 and max(frames) == 1:
        raise ValueError(f"frame_stack is {asked}; no observation has the shape ({asked}, height, width)")
    if len({k for k in frames if k > 1}) > 1:  # two guesses that differ: neither is sure
        frames = [1] * len(frames)
    return [*frames, *[1] * (len(schema.actions) + 1), *frames]


def record_bytes(schema: Schema, share: bool, frames: Sequence[int]) -> int:
    """About what one row takes, as Python's integers have it: shapes may be beyond all memory."""
    kept = schema.fields[: -len(schema.observations)] if share else schema.fields
    sizes = [math.prod(f.shape) * f.dtype.itemsize // k for f, k in zip(kept, frames, strict=False)]
    return (24 + sum(sizes) + 63) // 64 * 64 + 9  # the header before, whole cache lines, the leaf and its sums
