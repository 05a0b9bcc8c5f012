"""Replay files: named bytes and facts in one file, written whole or not at all, checksummed, never unpickled.

Knows nothing of replays: ``parts`` are views of bytes, ``facts`` is JSON. Nothing is copied but through the system's
page cache, so writing and reading take no memory to speak of. The layout, numbers little-endian:

    0     preamble, one page: magic, format version, checksum of both, zeros. These 24 bytes are every version's
    4096  the parts, each in blocks; the last block of each is filled with zeros to a whole page
    ...   manifest, JSON in ASCII: library version, facts, block size, the parts with their lengths and a CRC-32 a block
    -64   footer: the manifest's place, length and SHA-256, the footer's checksum, the closing magic

All functions: any thread; a reader of a file that is being replaced gets the old one, the new one or an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from angle_rl import __version__
from angle_rl.checkpoint import CheckpointError, PathLike, sync_folder
from angle_rl.types import Array

FORMAT_VERSION = 1
MAGIC = b"angle-rl replay\n"
BLOCK_BYTES = 1 << 22
_PAGE = 4096
_END = b"whole.\r\n"
_PREAMBLE = struct.Struct("<16sII")  # magic, version, CRC-32 of both
_FOOTER = struct.Struct("<QQ32sII8s")  # place, length and SHA-256 of the manifest, 0, CRC-32 of what is before, _END


class ReplayFileError(CheckpointError):
    """A replay file cannot be written there, or is missing, damaged, foreign or too new; names the file."""


class Part(NamedTuple):
    """Where a part lies in its file."""

    offset: int
    bytes: int
    checksums: list[int]  # CRC-32 of each block, the zeros after the last one included


class Manifest(NamedTuple):
    """What a replay file says of itself."""

    library_version: str  # of the writer
    facts: dict[str, Any]
    block_bytes: int
    parts: dict[str, Part]
    digest: bytes  # SHA-256, by which a file is known again


def write(
    path: PathLike,
    facts: Mapping[str, Any],
    parts: Mapping[str, Array],
    *,
    check_source: Callable[[], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Path:
    """Write the file ``path``, in place of a replay file that is there, and return it.

    Args:
        facts: JSON-able, string keys.
        parts: name -> contiguous uint8 ``[n]``, read once from front to back.
        check_source: called when the last byte has been read; what it raises ends the write.
        block_bytes: bytes under one checksum, whole pages of 4096.

    Until the last rename the old file stands, and stays if anything is raised or the process dies; what a killed writer
    left behind is removed by the next. Raises TypeError or ValueError for facts that JSON cannot hold, ReplayFileError
    where ``path`` is there and no replay file, OSError from the system.
    """
    if block_bytes < _PAGE or block_bytes % _PAGE != 0:
        raise ValueError(f"block_bytes is {block_bytes}; it must be a positive multiple of {_PAGE}")
    json.dumps(dict(facts), allow_nan=False)  # refuses before anything is written
    target = Path(os.path.realpath(path))
    _check_target(target)
    described = []
    with replacing(target) as file:
        _write_all(file, _preamble(FORMAT_VERSION))
        with ThreadPoolExecutor(1) as pool:
            for name, array in parts.items():
                view = _bytes_of(name, array)
                sums = [part.result() for part in _write_part(file, view, block_bytes, pool)]
                described.append({"name": name, "bytes": len(view), "crc32": sums})
        if check_source is not None:
            check_source()
        manifest = {
            "library_version": __version__,
            "facts": dict(facts),
            "block_bytes": block_bytes,
            "parts": described,
        }
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":")).encode("ascii")
        start = file.tell()
        _write_all(file, text)
        _write_all(file, _footer(start, text))
    return target


def read_manifest(path: PathLike) -> Manifest:
    """What the file ``path`` holds, its frame verified; the parts are not read.

    Raises ReplayFileError, naming the file, if it is missing, a folder, foreign, truncated, damaged in its frame or
    from a newer version.
    """
    with _opened(Path(path)) as file:
        return _read_manifest(Path(path), file)


def read_into(path: PathLike, manifest: Manifest, parts: Mapping[str, Array]) -> None:
    """Fill ``parts``, contiguous writable uint8 arrays of the manifest's names and lengths, from the file ``path``.

    Every block is verified as it comes in. Raises ReplayFileError, naming the file, as :func:`read_manifest` does and
    where a block's checksum differs, the file has been replaced since, or the parts do not fit; what ``parts`` hold is
    worth nothing then.
    """
    path = Path(path)
    for name in sorted(parts.keys() | manifest.parts.keys()):
        expected = manifest.parts[name].bytes if name in manifest.parts else 0
        wanted = parts[name].nbytes if name in parts else 0
        if (name in parts) != (name in manifest.parts) or wanted != expected:
            raise ReplayFileError(f"{path} does not fit: its part {name!r} has {expected} bytes, wanted are {wanted}")
    with _opened(path) as file, ThreadPoolExecutor(1) as pool:
        if _read_manifest(path, file).digest != manifest.digest:
            raise ReplayFileError(f"{path} was replaced while it was being read; read it again")
        for name, part in manifest.parts.items():
            file.seek(part.offset)
            _read_part(path, file, name, part, _bytes_of(name, parts[name]), manifest.block_bytes, pool)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[io.FileIO]:
    """An unbuffered file to be written, which at the end of the block is flushed and takes the place of ``target``.

    If the block raises, ``target`` stays as it was. Makes the folder where it is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        _remove_leftover(leftover)
    temporary = target.parent / f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with io.FileIO(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: what is left over there stays
                fcntl.flock(file, fcntl.LOCK_EX)  # let go when this process ends, however it ends
            yield file
            os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:  # the system may take less than it was given
        left = left[file.write(left) :]


def _bytes_of(name: str, array: Array) -> memoryview:
    if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
        raise TypeError(f"parts[{name!r}] is {array.dtype} {array.shape}; it must be uint8 (n,), contiguous")
    return array.data


def _remove_leftover(path: Path) -> None:
    """Delete another writer's file unless that writer lives."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # locked by its writer, gone, or not ours to delete
        pass


def _check_target(target: Path) -> None:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        with open(target, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return
    kind = "a folder" if stat.S_ISDIR(mode) else "not a replay file"
    raise ReplayFileError(f"{target} exists and is {kind}; it is left as it is")


def _preamble(version: int) -> bytes:
    start = struct.pack("<16sI", MAGIC, version)
    return (start + struct.pack("<I", zlib.crc32(start))).ljust(_PAGE, b"\0")


def _footer(start: int, manifest: bytes) -> bytes:
    fixed = struct.pack("<QQ32sI", start, len(manifest), hashlib.sha256(manifest).digest(), 0)
    return fixed + struct.pack("<I8s", zlib.crc32(fixed), _END)


def _checksum(block: memoryview, filling: bytes | memoryview) -> int:
    return zlib.crc32(filling, zlib.crc32(block))


def _write_part(file: io.FileIO, view: memoryview, block_bytes: int, pool: ThreadPoolExecutor) -> list[Future[int]]:
    sums = []
    for start in range(0, len(view), block_bytes):
        block = view[start : start + block_bytes]
        filling = bytes(-len(block) % _PAGE)
        sums.append(pool.submit(_checksum, block, filling))
        place = file.tell()
        _write_all(file, block)
        _write_all(file, filling)
        if hasattr(os, "posix_fadvise"):  # sends the block on its way to the disk while the next one is copied
            os.posix_fadvise(file.fileno(), place, len(block) + len(filling), os.POSIX_FADV_DONTNEED)
    return sums


def _read_part(
    path: Path, file: io.FileIO, name: str, part: Part, view: memoryview, block_bytes: int, pool: ThreadPoolExecutor
) -> None:
    pending: Future[int] | None = None
    for index in range(len(part.checksums)):
        block = view[index * block_bytes : (index + 1) * block_bytes]
        filling = memoryview(bytearray(-len(block) % _PAGE))
        for piece in (block, filling):
            _read_all(path, file, piece)
        if pending is not None:
            _verify(path, name, part, index - 1, pending)
        pending = pool.submit(_checksum, block, filling)
    if pending is not None:
        _verify(path, name, part, len(part.checksums) - 1, pending)


def _verify(path: Path, name: str, part: Part, index: int, checksum: Future[int]) -> None:
    if checksum.result() != part.checksums[index]:
        raise ReplayFileError(f"{path} is damaged: the checksum of block {index} of its part {name!r} differs")


def _read_all(path: Path, file: io.FileIO, into: memoryview) -> None:
    while into:
        count = file.readinto(into)
        if not count:
            raise ReplayFileError(f"{path} is truncated")
        into = into[count:]


def _read_at(path: Path, file: io.FileIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    data = bytearray(count)
    _read_all(path, file, memoryview(data))
    return bytes(data)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ReplayFileError(f"{path}: no such file") from None
    if not stat.S_ISREG(mode):
        raise ReplayFileError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no file'}, not a replay file")
    with io.FileIO(path, "rb") as file:
        yield file


def _read_manifest(path: Path, file: io.FileIO) -> Manifest:
    size = file.seek(0, os.SEEK_END)
    preamble = _read_at(path, file, 0, min(size, _PAGE))
    if not preamble.startswith(MAGIC):
        raise ReplayFileError(f"{path} is not a replay file, or its first bytes are damaged")
    if size < _PAGE + _FOOTER.size:
        raise ReplayFileError(f"{path} is truncated: it has {size} bytes")
    version = _PREAMBLE.unpack_from(preamble)[1]
    if preamble[: _PREAMBLE.size] != _preamble(version)[: _PREAMBLE.size]:
        raise ReplayFileError(f"{path} is damaged: the checksum of its first bytes differs")
    if version > FORMAT_VERSION:
        raise ReplayFileError(
            f"{path} has format version {version}; angle-rl {__version__} reads up to version {FORMAT_VERSION}"
        )
    if version < 1 or preamble != _preamble(version):
        raise ReplayFileError(f"{path} is damaged in its first page")
    footer = _read_at(path, file, size - _FOOTER.size, _FOOTER.size)
    start, length, digest, _, _, end = _FOOTER.unpack(footer)
    if end != _END:
        raise ReplayFileError(f"{path} is truncated or damaged: its end is missing")
    if start < _PAGE or start + length + _FOOTER.size != size:
        raise ReplayFileError(f"{path} is truncated or damaged: its lengths do not add up")
    text = _read_at(path, file, start, length)
    if footer != _footer(start, text):
        raise ReplayFileError(f"{path} is damaged: the checksum of its manifest or its footer differs")
    try:
        return _parse(text, start, digest)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ReplayFileError(f"{path} has a manifest that makes no sense: {error!r}") from error


def _parse(text: bytes, end: int, digest: bytes) -> Manifest:
    body = json.loads(text)
    block_bytes, facts = body["block_bytes"], body["facts"]
    if type(block_bytes) is not int or block_bytes < _PAGE or block_bytes % _PAGE != 0 or not isinstance(facts, dict):
        raise ValueError(f"block_bytes is {block_bytes!r}, facts is a {type(facts).__name__}")
    parts: dict[str, Part] = {}
    offset = _PAGE
    for described in body["parts"]:
        name, length, sums = described["name"], described["bytes"], described["crc32"]
        if type(length) is not int or length < 0 or len(sums) != -(-length // block_bytes) or name in parts:
            raise ValueError(f"the part {name!r} has {length!r} bytes and {len(sums)} checksums")
        parts[name] = Part(offset, length, sums)
        offset += -(-length // _PAGE) * _PAGE
    if offset != end:
        raise ValueError(f"the parts end at byte {offset}, the manifest begins at {end}")
    return Manifest(str(body["library_version"]), facts, block_bytes, parts, digest)
