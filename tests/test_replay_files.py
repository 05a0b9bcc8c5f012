"""Replay files as bytes: what is written comes back, and nothing else is taken for it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angle_rl.replay import ReplayFileError, files

FACTS = {"rows": 3, "nested": {"a": [1, 2.5, None, True]}, "text": "ä"}


def parts_of(*lengths):
    rng = np.random.default_rng(0)
    return {f"part{i}": rng.integers(0, 256, length, dtype=np.uint8) for i, length in enumerate(lengths)}


def read(path):
    manifest = files.read_manifest(path)
    found = {name: np.full(part.bytes, 255, np.uint8) for name, part in manifest.parts.items()}
    files.read_into(path, manifest, found)
    return manifest, found


def refused(path, match="replay file|truncated|damaged"):
    """The file is refused by name, with a message that matches."""
    with pytest.raises(ReplayFileError, match=match) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with all that a file can have, and its bytes."""
    path = tmp_path_factory.mktemp("small") / "small.replay"
    files.write(path, FACTS, parts_of(5000, 0, 4096, 9), block_bytes=4096)
    return path, path.read_bytes()


@given(st.lists(st.integers(0, 40_000), max_size=4), st.sampled_from([4096, 8192, 1 << 20]))
@settings(max_examples=30, deadline=None)
def test_what_is_written_comes_back(tmp_path_factory, lengths, block_bytes):
    path = tmp_path_factory.getbasetemp() / "any.replay"
    parts = parts_of(*lengths)
    assert files.write(path, FACTS, parts, block_bytes=block_bytes) == path
    manifest, found = read(path)
    assert manifest.facts == FACTS
    assert manifest.block_bytes == block_bytes
    assert list(found) == list(parts)
    assert all(np.array_equal(found[name], parts[name]) for name in parts)
    assert all(part.offset % 4096 == 0 for part in manifest.parts.values())


def test_a_flipped_bit_is_refused(small, tmp_path):
    """Every byte of the frame; of the parts and the zeros behind them the edges and every 13th."""
    _, good = small
    frame = [*range(64), *range(len(good) - 700, len(good))]
    edges = [byte for page in range(4096, len(good), 4096) for byte in range(page - 2, page + 10)]
    path = tmp_path / "flipped"
    path.write_bytes(good)
    with open(path, "r+b", buffering=0) as file:
        for offset in sorted({*frame, *edges, *range(0, len(good), 13)}):
            value = good[offset]
            os.pwrite(file.fileno(), bytes([value ^ 1 << offset % 8]), offset)
            refused(path)
            os.pwrite(file.fileno(), bytes([value]), offset)
    read(path)


def test_a_file_of_any_other_length_is_refused(small, tmp_path):
    _, good = small
    path = tmp_path / "cut"
    for length in [*range(len(good) - 1, len(good) - 700, -1), *range(len(good) - 700, -1, -97), *range(40)]:
        path.write_bytes(good[:length])
        refused(path, "truncated|not a replay file")
    for more in (b"\0", b"\n", good[-64:], good):
        path.write_bytes(good + more)
        refused(path, "truncated or damaged")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"angle-rl replay", bytes(100_000), b'{"format": 1}'])
def test_a_foreign_file_is_neither_read_nor_overwritten(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    refused(path, "not a replay file")
    with pytest.raises(ReplayFileError, match=r"foreign exists and is not a replay file; it is left as it is"):
        files.write(path, FACTS, parts_of(10))
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["foreign"]


def test_a_folder_a_pipe_and_nothing_are_refused(tmp_path):
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path, "is a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no file")
    with pytest.raises(ReplayFileError, match="is a folder; it is left"):
        files.write(tmp_path, FACTS, parts_of(10))
    with pytest.raises(ReplayFileError, match="is not a replay file; it is left"):
        files.write(tmp_path / "pipe", FACTS, parts_of(10))


def test_a_newer_version_is_named(small, tmp_path):
    start = struct.pack("<16sI", files.MAGIC, files.FORMAT_VERSION + 1)
    path = tmp_path / "newer"
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)) + small[1][24:])
    refused(path, f"format version {files.FORMAT_VERSION + 1}; angle-rl .* reads up to version {files.FORMAT_VERSION}")


def with_manifest(good, change):
    """The same file with another manifest, all checksums right."""
    start, length = struct.unpack_from("<QQ", good, len(good) - 64)
    body = json.loads(good[start : start + length])
    change(body)
    text = json.dumps(body).encode()
    fixed = struct.pack("<QQ32sI", start, len(text), hashlib.sha256(text).digest(), 0)
    return good[:start] + text + fixed + struct.pack("<I", zlib.crc32(fixed)) + good[-8:]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.clear(),
        lambda body: body.pop("parts"),
        lambda body: body.update(facts=[]),
        lambda body: body.update(block_bytes=0),
        lambda body: body.update(block_bytes=True),
        lambda body: body.update(block_bytes=8192),
        lambda body: body["parts"][0].update(bytes=-1, crc32=[]),
        lambda body: body["parts"][0].update(bytes=1 << 62),
        lambda body: body["parts"][0].update(crc32=[1]),
        lambda body: body["parts"][0].update(crc32=None),
        lambda body: body["parts"][0].update(name=body["parts"][1]["name"]),
        lambda body: body["parts"].pop(),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(small, tmp_path, change):
    path = tmp_path / "odd"
    path.write_bytes(with_manifest(small[1], lambda body: None))
    read(path)
    path.write_bytes(with_manifest(small[1], change))
    refused(path, "makes no sense")


def test_parts_that_do_not_fit_are_refused(small):
    path, _ = small
    manifest, found = read(path)
    for wrong in (
        {**found, "part0": np.zeros(5001, np.uint8)},
        {**found, "more": np.zeros(0, np.uint8)},
        {name: found[name] for name in list(found)[1:]},
    ):
        with pytest.raises(ReplayFileError, match=r"small.replay does not fit: its part '(part0|more)'"):
            files.read_into(path, manifest, wrong)
    with pytest.raises(TypeError, match=r"parts\['part2'\] is float32"):
        files.read_into(path, manifest, {**found, "part2": np.zeros(1024, np.float32)})


def test_a_file_replaced_between_manifest_and_parts_is_refused(tmp_path):
    path = tmp_path / "a.replay"
    files.write(path, {"n": 1}, parts_of(10))
    manifest = files.read_manifest(path)
    files.write(path, {"n": 2}, parts_of(10))
    with pytest.raises(ReplayFileError, match=r"a.replay was replaced while it was being read"):
        files.read_into(path, manifest, parts_of(10))


@pytest.mark.parametrize("facts", [{"a": np.zeros(2)}, {"a": float("nan")}, {"a": object()}, {(1, 2): 3}])
def test_facts_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path, facts):
    with pytest.raises((TypeError, ValueError)):
        files.write(tmp_path / "a", facts, parts_of(10))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("block_bytes", [0, -4096, 100, 4097])
def test_blocks_are_whole_pages(tmp_path, block_bytes):
    with pytest.raises(ValueError, match=f"block_bytes is {block_bytes}"):
        files.write(tmp_path / "a", FACTS, parts_of(10), block_bytes=block_bytes)


def test_an_error_on_the_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.replay"

    def fail():
        raise RuntimeError("moved")

    with pytest.raises(RuntimeError, match="moved"):
        files.write(path, FACTS, parts_of(10_000), check_source=fail)
    assert os.listdir(tmp_path) == []
    files.write(path, {"n": 1}, parts_of(10))
    good = path.read_bytes()
    for bad in (fail, None):
        parts = parts_of(10_000) if bad else {"x": np.zeros((2, 2), np.uint8)}
        with pytest.raises((RuntimeError, TypeError)):
            files.write(path, FACTS, parts, check_source=bad)
        assert path.read_bytes() == good
        assert os.listdir(tmp_path) == ["a.replay"]


def test_bytes_reach_the_disk_before_their_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path)))
        fsync(descriptor)

    def spy_replace(source, target):
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    path = files.write(tmp_path / "a", FACTS, parts_of(10))
    assert calls == [("fsync", False), ("replace", str(path)), ("fsync", True)]


def test_leftovers_go_unless_their_writer_lives(tmp_path):
    path = tmp_path / "a[1].replay"
    dead, alive, other = (tmp_path / name for name in (".a[1].replay.new-1-aa", ".a[1].replay.new-2-bb", ".b.new-1-aa"))
    for leftover in (dead, alive, other):
        leftover.write_bytes(b"half")
    with open(alive, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        files.write(path, FACTS, parts_of(10))
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, other.name, path.name])
    files.write(path, FACTS, parts_of(10))
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, path.name])


def test_a_writer_holds_its_own_file(tmp_path):
    with files.replacing(tmp_path / "a") as file:
        file.write(b"first")
        with files.replacing(tmp_path / "a") as second:
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_link_is_followed_and_a_folder_made(tmp_path):
    real = tmp_path / "there" / "real.replay"
    (tmp_path / "link").symlink_to(real)
    assert files.write(tmp_path / "link", FACTS, parts_of(10)) == real
    assert (tmp_path / "link").is_symlink()
    read(tmp_path / "link")
