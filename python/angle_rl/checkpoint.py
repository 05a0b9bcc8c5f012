"""Checkpoints on disk: written whole or not at all, checksummed, never unpickled.

A checkpoint is a folder of two files. ``tensors.safetensors`` holds the arrays in the safetensors format, so
any reader of that format opens it; ``state.json`` holds the rest, the SHA-256 of the tensor file and its own.
The folder is written under a temporary name beside its place, flushed to the disk and renamed. All functions:
one writer per path; a reader of a checkpoint that is being replaced gets the old one, the new one or a
CheckpointError.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from angle_rl import __version__
from angle_rl.types import Array

FORMAT = "angle-rl-checkpoint"
FORMAT_VERSION = 1
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
_CHUNK = 1 << 22  # bytes hashed or written at a time
_FLOAT_KEY = "$float"  # {"$float": "nan"}: JSON has no spelling of its own for a float that is not finite
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

PathLike: TypeAlias = "str | os.PathLike[str]"


class CheckpointError(ValueError):
    """A checkpoint cannot be written there, or is missing, damaged, foreign or too new; names the file."""


def save(path: PathLike, tensors: Mapping[str, torch.Tensor | Array], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint folder ``path``, replacing a checkpoint that is there, and return it.

    ``tensors``: name -> tensor or NumPy array of any shape, a float, int or bool dtype, any device, strided
    or sharing memory as it likes. Written piece by piece straight from their memory: only a tensor that is
    not contiguous, or not on the CPU, is copied, one at a time.
    ``state``: nested dicts with string keys, lists, tuples (read back as lists), strings, ints, floats (NaN
    and infinities included), bools, None and NumPy scalars.

    Until the last rename the old checkpoint is what ``load`` finds; after a crash at any moment ``load``
    finds the old or the new one whole. Raises TypeError for a value that cannot be stored, naming it, and
    CheckpointError where ``path`` exists and is not a checkpoint; nothing is changed then.
    """
    target = Path(path)
    arrays = {name: _as_tensor(name, tensor) for name, tensor in tensors.items()}
    encoded = _encode(dict(state), "state")
    _restore_previous(target)
    if target.exists() and not (target / STATE_FILE).is_file():
        raise CheckpointError(f"{target} exists and is not a checkpoint (it has no {STATE_FILE}); it is left as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.new-*"):  # of a writer that was killed
        shutil.rmtree(leftover)
    temporary = target.parent / f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        digest = _write_tensors(temporary / TENSORS_FILE, arrays)
        body = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "library_version": __version__,
            "tensors_sha256": digest,
            "tensors": {name: [_DTYPES[t.dtype], list(t.shape)] for name, t in arrays.items()},
            "state": encoded,
        }
        body["sha256"] = _body_digest(body)
        with open(temporary / STATE_FILE, "w", encoding="ascii") as file:
            json.dump(body, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load(path: PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the checkpoint folder ``path``: its tensors (CPU, the shapes and dtypes saved) and its state.

    Both checksums are verified first. The tensors are private maps of the file, read as they are touched, so
    a large replay is not held twice; they stay valid after the folder is replaced or removed.
    Raises CheckpointError, naming the file, if it is missing, truncated, altered, foreign or from a newer
    version.
    """
    folder = find(path)
    if folder is None:
        raise CheckpointError(f"{Path(path)}: no checkpoint here (a folder with {STATE_FILE} and {TENSORS_FILE})")
    body = _read_state(folder / STATE_FILE)
    tensors_file = folder / TENSORS_FILE
    if not tensors_file.is_file():
        raise CheckpointError(f"{tensors_file} is missing")
    if _file_digest(tensors_file) != body["tensors_sha256"]:
        raise CheckpointError(f"{tensors_file} is truncated or damaged: its checksum differs from {STATE_FILE}'s")
    return _read_tensors(tensors_file, body["tensors"]), _decode(body["state"])


def load_state(path: PathLike) -> dict[str, Any]:
    """The state alone, its checksum verified; the tensor file is not opened. Raises as ``load`` does."""
    folder = find(path)
    if folder is None:
        raise CheckpointError(f"{Path(path)}: no checkpoint here (a folder with {STATE_FILE} and {TENSORS_FILE})")
    state: dict[str, Any] = _decode(_read_state(folder / STATE_FILE)["state"])
    return state


def find(path: PathLike) -> Path | None:
    """Where the checkpoint ``path`` lies: there, beside it if a crash cut a replacement short, or None."""
    target = Path(path)
    for folder in (target, _previous(target)):
        if (folder / STATE_FILE).is_file():
            return folder
    return None


def remove(path: PathLike) -> None:
    """Delete the checkpoint ``path``, if there is one; its state first, so that half of it is none."""
    while folder := find(path):
        (folder / STATE_FILE).unlink()
        shutil.rmtree(folder)


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _restore_previous(target: Path) -> None:
    """Undo a replacement that was cut between its two renames."""
    if not target.exists() and _previous(target).exists():
        os.replace(_previous(target), target)


def _put_in_place(temporary: Path, target: Path) -> None:
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    os.replace(temporary, target)
    sync_folder(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush the folder's own entries to the disk, so that a rename in it outlasts a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_tensor(name: str, value: torch.Tensor | Array) -> torch.Tensor:
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"a tensor is named {name!r}; names are strings other than '__metadata__'")
    if isinstance(value, np.ndarray):
        try:
            tensor = _from_numpy(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"tensors[{name!r}] has dtype {value.dtype}, which a checkpoint cannot hold") from error
    elif isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        raise TypeError(f"tensors[{name!r}] is a {type(value).__name__}; a checkpoint takes tensors and NumPy arrays")
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise TypeError(f"tensors[{name!r}] is {tensor.dtype}, {tensor.layout}, which a checkpoint cannot hold")
    return tensor


def _from_numpy(value: Array) -> torch.Tensor:
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if any(stride < 0 for stride in value.strides):
        value = value.copy()
    with warnings.catch_warnings():  # torch warns about read-only memory; nothing here writes to it
        warnings.simplefilter("ignore")
        return torch.from_numpy(value)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write the safetensors file; SHA-256 of it. Wide elements first, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            digest.update(piece)
            file.write(piece)
        for name in order:
            flat = tensors[name].cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
            for start in range(0, len(data), _CHUNK):
                digest.update(data[start : start + _CHUNK])
                file.write(data[start : start + _CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _read_tensors(path: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no tensor file that can be read: {error}") from error
    found = {name: [_DTYPES[t.dtype], list(t.shape)] for name, t in tensors.items()}
    if found != dict(expected):
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise CheckpointError(f"{path}: tensors {names} are not as {STATE_FILE} describes them")
    return tensors


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes().decode("ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or damaged, or not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library (no format {FORMAT!r})")
    version = body.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} is damaged: its version is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, written by angle-rl {body.get('library_version')}; "
            f"angle-rl {__version__} reads up to version {FORMAT_VERSION}"
        )
    if body.pop("sha256", None) != _body_digest(body):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return body


def _body_digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: repr(float(value))}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT_KEY:
                raise TypeError(f"{where} has the key {key!r}; keys are strings other than {_FLOAT_KEY!r}")
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold; pass arrays as tensors")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_KEY}:
            return float(value[_FLOAT_KEY])
        return {key: _decode(item) for key, item in value.items()}
    return value
