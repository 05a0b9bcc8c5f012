"""A replay's state as arrays, saved to a file, and loaded from it: methods of :class:`ReplayBuffer`."""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.checkpoint import PathLike
from angle_rl.replay import files, sharing
from angle_rl.replay.arrays import check_integer
from angle_rl.replay.files import Manifest, ReplayFileError
from angle_rl.schema import from_json, to_json
from angle_rl.types import Array


def save(self: Any, path: PathLike) -> Path:
    """Write the buffer to the file ``path``, in place of a replay file that is there, and return its path.

    Everything that decides the next batches is in it: rows, handles, priorities and their maxima, streams, random
    state, counters and the constructor's arguments as they are now, but for schedules and the place of the memory.
    Written straight from the memory, a checksum per block, under another name until it is whole; what a killed writer
    left behind is removed.

    Raises:
        RuntimeError: another call inserted, sampled, updated or removed meanwhile, or a process died inserting and
            :meth:`repair` was not called since; there is no new file then.
        ReplayFileError: ``path`` exists and is no replay file.
    """
    core: _core.Replay = self._host_core()
    parts = core.parts()
    facts = {
        "kind": _kind(self),
        "byte_order": sys.byteorder,
        "schema": to_json(self.schema),
        "slots": len(parts["records"]) // core.record_bytes,
        "options": sharing.portable(self._options()),
    }
    before = mark(core)
    if not core.inserts_are_done():
        raise RuntimeError(
            f"save to {path}: rows are being inserted, or a process died inserting; save at rest, after repair()"
        )
    return files.write(path, facts, parts, check_source=lambda: require_unchanged(core, before, f"save to {path}"))


def load(cls: Any, path: PathLike, *, shared: bool | str | None = None, backing: Any = None, device: Any = None) -> Any:
    """The buffer that :meth:`save` wrote; from here on it does what the saved one would have done, bit for bit.

    Read straight into the new buffer's memory, every block verified before anybody sees it. A schedule is to be set
    anew.

    Args:
        shared: as in the constructor.
        backing: the constructor's ``path``: a new file to keep the memory in.
        device: the constructor's, in place of the saved buffer's: a file does not mind where it is loaded to.

    Raises ReplayFileError, naming the file, where it is missing, truncated, damaged, foreign, from a newer version or
    of the other kind of buffer; MemoryError and OSError as the constructor does.
    """
    place = sharing.place_of(shared, backing)
    manifest = files.read_manifest(path)
    buffer = cls.__new__(cls)
    with _fitting(path):
        facts = manifest.facts
        for name, own in (("kind", _kind(cls)), ("byte_order", sys.byteorder)):
            if facts[name] != own:
                raise ValueError(f"its {name} is {facts[name]!r}, not {own!r}")
        options = dict(facts["options"])
        check_integer("slots", facts["slots"], 0, check_integer("capacity", options["capacity"], 1, 2**63 - 1))
        made = options if device is None else {**options, "device": str(device)}
        buffer._create(from_json(facts["schema"]), made.copy(), place)
    try:
        with _fitting(path):
            if unknown := set(options) - set(buffer._options()):
                raise ValueError(f"its options {sorted(unknown)} are unknown")
            _fill(buffer._core, path, manifest)
    except BaseException:
        buffer.close()
        if place.kind == "file":
            os.unlink(place.target)
        raise
    return buffer


def export_state(self: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """Everything that decides the next batches: byte arrays, which are views of the buffer, and JSON-able facts.

    Only while no other call is under way; copy the views before the next insert if they are to stay.
    """
    facts = {
        "fields": [[f.name, list(f.shape), f.dtype.str] for f in self.schema.fields],
        "capacity": self.capacity,
        "prioritized": self._prioritized,
        "share_successors": self._fixed["share_successors"],
        "frame_stack": self._core.stack,
        "size": len(self),
    }
    return self._core.parts(), facts


def import_state(self: Any, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Take over what :meth:`export_state` gave, in place of all rows here.

    Raises ValueError, and changes nothing, when the state comes from another schema, capacity or kind of buffer.
    """
    own = self.export_state()[1]
    for name in ("fields", "capacity", "prioritized", "share_successors", "frame_stack"):
        if facts.get(name) != own[name]:
            raise ValueError(f"the saved replay's {name} is {facts.get(name)}; this buffer's is {own[name]}")
    for name in ("header", "index", "records"):
        if name not in arrays:
            raise ValueError(f"the saved replay lacks the array {name!r}")
    self._core.restore(**{name: np.ascontiguousarray(arrays[name]) for name in ("header", "index", "records")})


def _fill(core: _core.Replay, path: PathLike, manifest: Manifest) -> None:
    slots = manifest.facts["slots"]
    parts = core.parts(slots)
    header = np.empty_like(parts["header"])  # goes in last, once it is known to fit
    files.read_into(path, manifest, {**parts, "header": header})
    core.adopt(header, slots)


@contextlib.contextmanager
def _fitting(path: PathLike) -> Iterator[None]:
    """Errors of what a file says become a ReplayFileError that names it."""
    try:
        yield
    except ReplayFileError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ReplayFileError(f"{path} does not fit: {error}") from error


def _kind(of: Any) -> str:
    return "prioritized" if of._prioritized else "uniform"


def mark(core: _core.Replay) -> int:
    """A number that changes with every insert, sample and update: the checksum of counters, weights and streams."""
    parts = core.parts()
    return zlib.crc32(parts["index"].data, zlib.crc32(parts["header"].data))


def require_unchanged(core: _core.Replay, before: int, what: str) -> None:
    """Raises RuntimeError where :func:`mark` is no longer ``before``."""
    if mark(core) != before:
        raise RuntimeError(f"{what}: another call changed the buffer meanwhile; let no call run beside it")
