"""A replay's rows as a plain dict of arrays, in memory and in NumPy's npz files: methods of :class:`ReplayBuffer`."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.checkpoint import PathLike
from angle_rl.replay.files import ReplayFileError, replacing
from angle_rl.replay.saving import mark, require_unchanged
from angle_rl.schema import Schema, unflatten
from angle_rl.types import Array

_FACTS = (("handles", "i8"), ("streams", "i8"), ("terminated", "?"), ("truncated", "?"), ("priorities", "f4"))
_OPTIONAL = ("truncated", "streams", "priorities")
_CHUNK = 4096  # rows read at a time


def export_arrays(self: Any) -> dict[str, Array]:
    """Copies of all rows, oldest first, as plain arrays ``[rows, ...]``.

    The schema's fields by name, nested ones with dots ("next_observations.camera"); ``terminated`` and ``truncated``
    bool; ``streams`` and ``handles`` int64; of a prioritised buffer ``priorities`` float32, without priority_epsilon.
    Raises RuntimeError if another call changed the buffer meanwhile.
    """
    core = self._host_core()
    before = mark(core)
    arrays = _rows(core, self.schema)
    require_unchanged(core, before, "export_arrays")
    if not self._prioritized:
        del arrays["priorities"]
    return arrays


def insert_arrays(self: Any, arrays: Mapping[str, Array]) -> Any:
    """Insert rows that :meth:`export_arrays` gave, or arrays named so; returns their handles here, int64 ``[rows]``.

    ``truncated``, ``streams`` and ``priorities`` may be left out, and a uniform buffer leaves priorities aside;
    ``handles`` are another buffer's and left aside. Raises as :meth:`insert` does, and ValueError for a missing or an
    unknown name or unequal lengths; nothing is inserted then.
    """
    arguments = _insert_arguments(self.schema, arrays)
    if not self._prioritized:
        arguments.pop("priorities", None)
    return self.insert(**arguments)


def save_npz(self: Any, path: PathLike) -> Path:
    """Write :meth:`export_arrays` to a file named exactly ``path``, uncompressed npz, in place of what is there.

    Under another name until it is whole. Returns its path. Raises ReplayFileError where ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ReplayFileError(f"{target} is a folder; it is left as it is")
    arrays = self.export_arrays()
    with replacing(target) as raw:
        file = io.BufferedWriter(raw)
        np.savez(file, **arrays)
        file.detach()  # flushes, and leaves the file open
    return target


def insert_npz(self: Any, path: PathLike) -> Any:
    """:meth:`insert_arrays` of an npz file. Nothing is unpickled: arrays of Python objects are refused.

    Raises as it does, and ReplayFileError, naming the file, where it is missing, damaged or something else.
    """
    return self.insert_arrays(_read_npz(Path(path)))


def _rows(core: _core.Replay, schema: Schema) -> dict[str, Array]:
    slots = min(core.next_ticket, core.capacity)
    oldest = core.next_ticket % core.capacity if slots == core.capacity else 0
    kinds = [(f.name, f.shape, f.dtype) for f in schema.fields]
    kinds += [(name, (), np.dtype(dtype)) for name, dtype in _FACTS]
    arrays = {name: np.empty((slots, *shape), dtype) for name, shape, dtype in kinds}
    done = 0
    for first, end in ((oldest, slots), (0, oldest)):
        for start in range(first, end, _CHUNK):
            found = core.rows(start, min(_CHUNK, end - start))
            count = len(found[-1])  # a slot may hold no row, or one that was removed
            for array, values in zip(arrays.values(), found, strict=True):
                array[done : done + count] = values
            done += count
    arrays = {name: array[:done] for name, array in arrays.items()}
    if (np.diff(arrays["handles"]) < 0).any():  # a slot may hold a row of the lap before
        order = np.argsort(arrays["handles"])
        arrays = {name: array[order] for name, array in arrays.items()}
    return arrays


def _insert_arguments(schema: Schema, arrays: Mapping[str, Array]) -> dict[str, Any]:
    names = [f.name for f in schema.fields]
    for name in (*names, "terminated"):
        if name not in arrays:
            raise ValueError(f"the arrays lack {name!r}")
    known = {*names, "terminated", "handles", *_OPTIONAL}
    for name in arrays:
        if name not in known:
            raise ValueError(f"the arrays hold {name!r}, which this buffer's rows do not; they have {sorted(known)}")
    values = {name: np.asarray(arrays[name]) for name in arrays}
    n = values[names[0]].shape[:1]
    for name, value in values.items():
        if value.ndim == 0 or value.shape[:1] != n:
            raise ValueError(f"arrays[{name!r}] has the shape {value.shape}; {names[0]!r} has {n} rows")
    columns = [values[name] for name in names]
    arguments = {
        "observations": unflatten(schema.observation_structure, columns),
        "actions": unflatten(schema.action_structure, columns),
        "rewards": columns.pop(0),
        "next_observations": unflatten(schema.observation_structure, columns),
        "terminated": values["terminated"],
    }
    return {**arguments, **{name: values[name] for name in _OPTIONAL if name in values}}


def _read_npz(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise ReplayFileError(f"{path}: no such file")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array and no names")
        with file:
            return {name: file[name] for name in file.files}
    except MemoryError:
        raise
    except Exception as error:  # the readers of damaged zip members raise a dozen kinds
        raise ReplayFileError(f"{path} is no npz file of plain arrays, or damaged: {error}") from error
