"""How a buffer passes between processes: where its memory is, its description, its way through a pickle, its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import reduction, util
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

from angle_rl import _core
from angle_rl.schema import Schema, from_json, to_json

FORMAT = 1  # of the description; a segment with another one is refused


class Place(NamedTuple):
    """Where a buffer's memory is."""

    kind: Literal["private", "shared", "named", "file"]
    target: str = ""  # the name, or the absolute path


class Shareable(Protocol):
    """What the functions below ask of a buffer."""

    _place: Place

    def _descriptor(self) -> int:
        """The descriptor of the memory; ValueError after close()."""
        ...

    def _options(self) -> dict[str, Any]:
        """The options that this process goes by now, as the constructor takes them."""
        ...

    @classmethod
    def _attach_to(cls, place: Place, descriptor: int | None, options: Mapping[str, Any] | None) -> Any:
        """A buffer on existing memory; `descriptor` is taken over. None: the options that the memory describes."""
        ...


def place_of(shared: Any, path: Any) -> Place:
    """The place that a constructor's `shared` and `path` ask for. TypeError or ValueError where they ask for none."""
    if shared is not None and not isinstance(shared, bool | str):
        raise TypeError(f"shared is {shared!r}; it must be True, a name or None")
    if path is None:
        if isinstance(shared, str):
            return Place("named", shared)
        return Place("shared") if shared else Place("private")
    if shared:
        raise ValueError(f"shared is {shared!r} and path is {path!r}; memory has one place, so leave one of them out")
    return Place("file", _absolute(path))


def place_to_attach(name: Any, path: Any) -> Place:
    """The place that `attach` is asked for. TypeError or ValueError where that is none, or two."""
    if (name is None) == (path is None):
        raise ValueError(f"name is {name!r} and path is {path!r}; attach takes exactly one of them")
    if path is not None:
        return Place("file", _absolute(path))
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string")
    return Place("named", name)


def _absolute(path: Any) -> str:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {path!r}; it must be a string or a path")
    return os.path.abspath(os.fspath(path))


# The description that memory carries, so that whoever attaches needs nothing else ----------


def portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that mean the same in any process: without functions."""
    return {name: value for name, value in options.items() if not callable(value)}


def describe(schema: Schema, prioritized: bool, options: Mapping[str, Any]) -> str:
    """A buffer as JSON text, with its :func:`portable` options."""
    return json.dumps(
        {
            "format": FORMAT,
            "prioritized": prioritized,
            "schema": to_json(schema),
            "options": portable(options),
        },
        allow_nan=False,
    )


def understand(text: str, prioritized: bool) -> tuple[Schema, dict[str, Any]]:
    """The schema and the options of a description. ValueError where it is none, or that of the other kind of buffer."""
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"the format is {found['format']}; this version reads {FORMAT}")
        if found["prioritized"] != prioritized:
            own, other = ("PrioritizedReplayBuffer", "ReplayBuffer")[:: 1 if prioritized else -1]
            raise ValueError(f"the buffer is a {other}; attach to it with {other}.attach, not {own}.attach")
        return from_json(found["schema"]), dict(found["options"])
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the buffer's description cannot be read: {error!r}") from None


@contextmanager
def naming(place: Place) -> Iterator[None]:
    """Errors of what was found in a place are ValueErrors with its name in front."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        where = {"named": f"shared memory {place.target!r}", "file": f"file {place.target!r}"}
        what = str(error) if isinstance(error, ValueError) else f"its description cannot be read: {error!r}"
        raise ValueError(f"{where.get(place.kind, 'shared memory')}: {what}") from None


# Pickling. Memory without a name travels as a descriptor, which only multiprocessing can pass on ----------


def allow_multiprocessing(cls: type[Any]) -> None:
    """Let multiprocessing (any start method, queues, pipes) pass buffers of exactly this class to other processes."""
    reduction.register(cls, _reduce_in_multiprocessing)


def reduce_plainly(buffer: Shareable) -> tuple[Any, ...]:
    """What any other pickle gets: the name or the path. TypeError where the memory has neither."""
    buffer._descriptor()  # not after close()
    place = buffer._place
    if place.kind == "private":
        refuse_private()
    if place.kind == "shared":
        raise TypeError(
            "a buffer with shared=True passes to other processes through multiprocessing only; for others give it "
            "a name (shared='name') or a path"
        )
    return _attach, (type(buffer), place, None, portable(buffer._options()))


def _reduce_in_multiprocessing(buffer: Shareable) -> tuple[Any, ...]:
    if buffer._place.kind != "shared":
        return reduce_plainly(buffer)
    # Given to a child as it starts, or fetched from this process by whoever unpickles it, once.
    descriptor = reduction.DupFd(buffer._descriptor())
    return _attach, (type(buffer), buffer._place, descriptor, portable(buffer._options()))


def _attach(cls: type[Any], place: Place, descriptor: Any, options: dict[str, Any]) -> Any:
    return cls._attach_to(place, None if descriptor is None else descriptor.detach(), options)


def refuse_private() -> NoReturn:
    """TypeError: this buffer stays in its process."""
    raise TypeError(
        "a private buffer stays in its process; make it with shared=True (or shared='name', path=...) to pass it to "
        "another, or save() it"
    )


def refuse_copy(buffer: Any, memo: Any = None) -> NoReturn:
    """TypeError: what `copy` and `deepcopy` give."""
    raise TypeError(
        f"a {type(buffer).__name__} is not copied; use save() and load() for a second buffer, and attach() or "
        "multiprocessing for the same memory in another process"
    )


# The end ----------


def at_end(buffer: Any, action: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Runs `action` once: when called, when the buffer is gone, or when this process ends normally.

    Only in this process: forked children never run it, nor does a process that is killed. multiprocessing's own list
    of such actions is used since its children leave out those of the standard library's `atexit`; the negative
    priority puts it after the children have been joined, who may still want to attach.
    """
    return util.Finalize(buffer, action, arguments, exitpriority=-10)


def take_name_away(buffer: Shareable) -> Callable[[], Any]:
    """As :func:`at_end`: the name that this buffer was made under, if it still stands for this memory."""
    made = os.fstat(buffer._descriptor())
    return at_end(buffer, _unlink_own, buffer._place.target, (made.st_dev, made.st_ino))


def _unlink_own(name: str, made: tuple[int, int]) -> None:
    # Somebody may have taken the name away before, and somebody else may have made a buffer under it.
    with suppress(FileNotFoundError):
        found = os.stat(f"/dev/shm/{name}")
        if (found.st_dev, found.st_ino) == made:
            _core.Segment.unlink(name)


def unlink(name: Any) -> bool:
    """Take a name away, whoever made it. False: there was none."""
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string")
    return _core.Segment.unlink(name)


class _Closed:
    """Stands in for the core of a buffer that was closed."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError("the buffer is closed")


CLOSED: Any = _Closed()
