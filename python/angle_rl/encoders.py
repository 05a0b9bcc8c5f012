"""From observations of any Gymnasium space to flat features, in front of networks that take vectors.

Made from a space: a Box of numbers goes in as it is (float32, flattened), Discrete and MultiDiscrete one-hot,
MultiBinary as zeros and ones, images through a small convolution net, and the members of Dict and Tuple spaces
side by side in the space's order. Reading a module is safe from any thread while nobody trains it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from angle_rl.spaces import Space, check_observation_space

__all__ = ["EncodedCritics", "EncodedPolicy", "ImageEncoder", "ObservationEncoder", "is_image"]

SMALLEST_LARGE_IMAGE = 36
"""Sides from which the three convolutions of Mnih et al. fit; smaller images go through one."""
KERNEL = 3
"""The side of the small net's kernel: a Box with a shorter side is no image."""


def is_image(space: Space) -> bool:
    """Whether a space is taken as images.

    That is a Box of uint8 or bool with three axes, channels first or last, or with four: a history of such, oldest
    first; its sides are at least 3.
    """
    if not isinstance(space, spaces.Box) or space.dtype not in (np.uint8, np.bool_) or len(space.shape) not in (3, 4):
        return False
    _, height, width = _image_shape(space.shape[-3:])
    return min(height, width) >= KERNEL


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Whether the first of three axes is the channels: the shorter of the two ends is; of equal ones the last."""
    return shape[0] < shape[-1]


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width."""
    first, middle, last = shape
    return (first, middle, last) if _channels_first(shape) else (last, first, middle)


class ObservationEncoder(nn.Module):
    """Observations of a space -> ``[batch, width]`` float32.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these; else TypeError.

    Attributes:
        width: number of features.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        leaves = _leaves(check_observation_space(space), ())
        if not leaves:
            raise ValueError(f"observation_space is {space}, which holds nothing to observe")
        self._paths = [path for path, _ in leaves]
        parts = [_leaf_encoder(leaf) for _, leaf in leaves]
        self.width = sum(part.width for part in parts)
        self.parts = nn.ModuleList(parts)

    def forward(self, observations: Any) -> Tensor:
        """``[batch, *observation_shape]``, a dict or tuple of such as the space nests -> ``[batch, width]``."""
        features = [part(_at(observations, path)) for path, part in zip(self._paths, self.parts, strict=True)]
        return features[0] if len(features) == 1 else torch.cat(features, 1)


class VectorEncoder(nn.Module):
    """``[batch, *shape] -> [batch, width]``: the numbers themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        """Flattened, as float32; float32 vectors are not copied."""
        return values.reshape(len(values), self.width).to(torch.float32)


class OneHotEncoder(nn.Module):
    """``[batch, *shape]`` integers ``-> [batch, width]``: for each of the numbers a 1 among zeros.

    Args:
        counts: how many values each number has, ``[numbers]``.
        starts: the smallest of them, ``[numbers]``.

    A number outside its range gives zeros alone.
    """

    codes: Tensor
    owners: Tensor

    def __init__(self, counts: list[int], starts: list[int]) -> None:
        super().__init__()
        self.width = sum(counts)
        self._numbers = len(counts)
        codes = [start + code for count, start in zip(counts, starts, strict=True) for code in range(count)]
        owners = [number for number, count in enumerate(counts) for _ in range(count)]
        # They belong to the space, not to what was learned: they are not in the state dict.
        self.register_buffer("codes", torch.tensor(codes), persistent=False)  # [width], what each column stands for
        self.register_buffer("owners", torch.tensor(owners), persistent=False)  # [width], which number it looks at

    def forward(self, values: Tensor) -> Tensor:
        """A column is 1 where its number has the column's value."""
        numbers = values.reshape(len(values), self._numbers)
        return (numbers.index_select(1, self.owners) == self.codes).to(torch.float32)


class ImageEncoder(nn.Module):
    """Images ``[batch, (history,) *image] -> [batch, width]``: convolutions and one dense layer, ReLU after each.

    Sides from 36 on: 32 kernels 8x8 with stride 4, 64 of 4x4 with stride 2, 64 of 3x3, and 512 units (Mnih et al.
    2015, doi:10.1038/nature14236); smaller: 16 kernels 3x3 and 128 units (Young and Tian 2019, arXiv:1903.03176).
    Numbers are divided by the largest that the space allows (255).

    Args:
        space: a Box for which `is_image` holds; else ValueError. A history's images become further channels.
    """

    def __init__(self, space: Space) -> None:
        if not is_image(space):
            raise ValueError(
                f"space is {space}; an image is a Box of uint8 or bool, channels first or last, with sides of at "
                f"least {KERNEL}"
            )
        super().__init__()
        shape = tuple(space.shape or ())
        self._channels_first = _channels_first(shape[-3:])
        channels, height, width = _image_shape(shape[-3:])
        self._image = (channels * (shape[0] if len(shape) == 4 else 1), height, width)
        self._scale = 1.0 / max(float(np.max(space.high)), 1.0)  # type: ignore[attr-defined]
        large = min(height, width) >= SMALLEST_LARGE_IMAGE
        layers: list[nn.Module] = []
        channels = self._image[0]
        for kernels, side, stride in [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if large else [(16, KERNEL, 1)]:
            layers += [nn.Conv2d(channels, kernels, side, stride), nn.ReLU(inplace=True)]
            channels, height, width = kernels, (height - side) // stride + 1, (width - side) // stride + 1
        self.width = 512 if large else 128
        dense = nn.Linear(channels * height * width, self.width)
        self.layers = nn.Sequential(*layers, nn.Flatten(), dense, nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if not self._channels_first:
            images = images.movedim(-1, -3)
        features: Tensor = self.layers(images.reshape(len(images), *self._image).to(torch.float32) * self._scale)
        return features


class EncodedPolicy(nn.Module):
    """A policy for flat observations behind an encoder of its own. `sample_actions` is as in ``PolicyModel``."""

    def __init__(self, encoder: nn.Module, policy: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.policy = policy

    def features(self, observations: Any) -> Tensor:
        """``[batch, width]``, the policy's last hidden layer."""
        features: Tensor = self.policy.features(self.encoder(observations))  # type: ignore[operator]
        return features

    def forward(self, observations: Any) -> Any:
        """What the policy gives for the features."""
        return self.policy(self.encoder(observations))

    def sample_actions(
        self, observations: Any, deterministic: bool = False, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``actions`` (``[batch, action_dim]``) and ``log_prob`` (``[batch]``)."""
        actions: tuple[Tensor, Tensor] = self.policy.sample_actions(  # type: ignore[operator]
            self.encoder(observations), deterministic, noise=noise
        )
        return actions


class EncodedCritics(nn.Module):
    """Critics for flat observations behind an encoder that they share."""

    def __init__(self, encoder: nn.Module, critics: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.critics = critics

    def forward(self, observations: Any, actions: Tensor) -> Tensor:
        """Observations as the encoder takes them and ``[batch, action_dim]`` -> q, ``[critics, batch]``."""
        q: Tensor = self.critics(self.encoder(observations), actions)
        return q

    def action_values(self, observations: Any) -> Tensor:
        """q of every action, ``[critics, batch, actions]``, where the critics have `action_values`."""
        q: Tensor = self.critics.action_values(self.encoder(observations))  # type: ignore[operator]
        return q


def _leaf_encoder(space: Space) -> VectorEncoder | OneHotEncoder | ImageEncoder:
    if isinstance(space, spaces.Discrete):
        return OneHotEncoder([int(space.n)], [int(space.start)])
    if isinstance(space, spaces.MultiDiscrete):
        starts = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape)
        return OneHotEncoder(space.nvec.flatten().tolist(), starts.flatten().tolist())
    if is_image(space):
        return ImageEncoder(space)
    return VectorEncoder(int(np.prod(space.shape or ())))


def _leaves(space: Space, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Space]]:
    """The arrays of a nested space in its order, each with the keys that lead to it."""
    if isinstance(space, spaces.Dict):
        members: list[tuple[Any, Space]] = list(space.spaces.items())
    elif isinstance(space, spaces.Tuple):
        members = list(enumerate(space.spaces))
    else:
        return [(path, space)]
    return [leaf for key, member in members for leaf in _leaves(member, (*path, key))]


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
