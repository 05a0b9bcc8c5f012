"""Where the device kernels are, and where their memory is.

The kernels in ``csrc/cuda`` are compiled twice: for CUDA devices (``_cuda``, where nvcc was found) and for the host
(``_cuda_host``, always), so that tests prove their logic on any machine. Calls on a device go to torch's current
stream and do not wait for it.

Any thread may call; two threads must not write the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from angle_rl import _cuda_host

__all__ = [
    "CUDA_KERNELS",
    "backend",
    "emulated",
    "free_memory",
    "is_emulated",
    "launch",
    "memory_device",
    "normals",
    "uniforms",
]

CUDA_KERNELS = find_spec("angle_rl._cuda") is not None
"""Whether this build has kernels for CUDA devices"""

_emulated = False


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, what asks for ``device="cuda"`` works on CPU tensors by the same kernels compiled for the host.

    For tests. It holds for the whole process, for every thread: enter and leave it while no other thread is at work.
    """
    global _emulated
    before, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = before


def is_emulated() -> bool:
    """Whether ``emulated()`` is on."""
    return _emulated


def backend(device: str | torch.device) -> ModuleType:
    """The module whose kernels read and write this device's memory.

    Args:
        device: ``"cuda"``, with or without an index, or ``"cpu"``.

    Returns:
        ``_cuda`` for a CUDA device; ``_cuda_host`` for the CPU, and for everything under ``emulated()``.

    Raises:
        RuntimeError: where this build has no kernels for CUDA devices.
        ValueError: any other kind of device.
    """
    kind = _kind(device)
    if kind == "cpu" or _emulated:
        return _cuda_host
    try:
        from angle_rl import _cuda
    except ImportError as error:
        raise RuntimeError(
            f"device is {device}, but this build of angle_rl has no kernels for CUDA devices: nvcc was not found when "
            "it was built. Put nvcc on PATH (or set CUDACXX) and build it again, or use device='cpu'"
        ) from error
    return _cuda


def memory_device(device: str | torch.device) -> torch.device:
    """Where tensors of this device lie: a CUDA device with its index, or the CPU under ``emulated()``.

    Raises:
        RuntimeError: where torch finds no CUDA device.
        ValueError: neither a CUDA device nor the CPU.
    """
    if _kind(device) == "cpu" or _emulated:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {device}, but torch finds no CUDA device (torch.cuda.is_available() is False)")
    index = torch.device(device).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def free_memory(device: str | torch.device) -> int | None:
    """Bytes of the device's memory that are free, torch's own unused ones among them; None for the CPU.

    Raises as ``memory_device`` does.
    """
    place = memory_device(device)
    if place.type == "cpu":
        return None
    unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    return torch.cuda.mem_get_info(place)[0] + unused


def launch(kernel: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Call ``kernel(*arguments, stream)`` for ``device``'s current stream, with that device made the current one."""
    if device.type == "cpu":
        kernel(*arguments, 0)
    elif device.index is None or device.index == torch.cuda.current_device():
        kernel(*arguments, torch.cuda.current_stream(device).cuda_stream)
    else:
        with torch.cuda.device(device):
            kernel(*arguments, torch.cuda.current_stream(device).cuda_stream)


def normals(keys: Tensor, index: int, out: Tensor) -> None:
    """Fill ``out`` with the standard normals of the random key ``keys[index]``, as ``RandomKey.normal`` draws them.

    Args:
        keys: int64, contiguous, on ``out``'s device: the keys' 64 bits. Read on the device, when the kernel runs.
        index: which one, from 0.
        out: float32 or float64, contiguous, of any shape.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, device, layout or range is wrong.
    """
    _check_draw(keys, index, out)
    kernels = backend(out.device)
    if out.dtype == torch.float32:
        fill = kernels.philox_normal_f32
    elif out.dtype == torch.float64:
        fill = kernels.philox_normal_f64
    else:
        raise TypeError(f"out has dtype {out.dtype}; normals come in torch.float32 and torch.float64")
    launch(fill, out.device, keys.data_ptr() + 8 * index, out.data_ptr(), out.numel())


def uniforms(keys: Tensor, index: int, out: Tensor) -> None:
    """Fill ``out`` (float64) with the uniforms in [0, 1) of ``keys[index]``, as ``RandomKey.uniform`` draws them.

    The rest as for ``normals``.
    """
    _check_draw(keys, index, out)
    if out.dtype != torch.float64:
        raise TypeError(f"out has dtype {out.dtype}; uniforms come in torch.float64")
    fill = backend(out.device).philox_uniform
    launch(fill, out.device, keys.data_ptr() + 8 * index, out.data_ptr(), out.numel())


def _kind(device: str | torch.device) -> str:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; device kernels work in the memory of CUDA devices and of the CPU")
    return kind


def _check_draw(keys: Tensor, index: int, out: Tensor) -> None:
    if keys.dtype != torch.int64:
        raise TypeError(f"keys has dtype {keys.dtype}; it must be torch.int64")
    if keys.device != out.device:
        raise ValueError(f"keys is on {keys.device}; it must be on {out.device}, as out is")
    if not keys.is_contiguous() or not out.is_contiguous():
        raise ValueError("keys and out must be contiguous")
    if not 0 <= index < keys.numel():
        raise ValueError(f"index is {index}; keys holds {keys.numel()}, counted from 0")
