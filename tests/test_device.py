"""Where the device kernels are, and the random numbers that they draw."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from angle_rl import _cuda_host, device
from angle_rl.types import RandomKey

KEYS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]


def in_memory(values, place):
    """Keys as 64-bit words of a tensor."""
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64)).to(place)


@pytest.fixture(name="place")
def _place(device):
    return device


def test_emulation_is_on_within_and_off_after():
    assert not device.is_emulated()
    with device.emulated():
        assert device.is_emulated()
        with device.emulated():
            assert device.backend("cuda") is _cuda_host
        assert device.is_emulated()
        assert device.memory_device("cuda:3") == torch.device("cpu")
    assert not device.is_emulated()
    with pytest.raises(ZeroDivisionError), device.emulated():
        _ = 1 / 0
    assert not device.is_emulated()


def test_the_cpu_has_the_kernels_compiled_for_it():
    assert device.backend("cpu") is _cuda_host
    assert device.memory_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("ask", [device.backend, device.memory_device])
def test_other_devices_are_refused(ask):
    with pytest.raises(ValueError, match="device is meta; device kernels work in the memory of CUDA devices"):
        ask("meta")


def test_a_build_without_kernels_says_what_was_missing(monkeypatch):
    real = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "angle_rl" and "_cuda" in (fromlist or ()):
            raise ImportError("cannot import name '_cuda'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        RuntimeError, match=r"device is cuda:0, but .* no kernels .* nvcc was not found when it was built"
    ):
        device.backend("cuda:0")


@pytest.mark.skipif(not device.CUDA_KERNELS, reason="no kernels for CUDA devices in this build")
def test_a_build_with_kernels_loads_them_on_any_machine():
    kernels = device.backend("cuda")
    assert kernels.__name__ == "angle_rl._cuda"
    assert [name for name in dir(kernels) if name[0] != "_"] == [name for name in dir(_cuda_host) if name[0] != "_"]


def test_a_machine_without_a_device_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device is cuda, but torch finds no CUDA device"):
        device.memory_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_has_an_index():
    assert device.memory_device("cuda") == torch.device("cuda", torch.cuda.current_device())


# Random numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 64, 511, 512, 513, 5001])
def test_the_same_bits_as_on_the_cpu(place, n):
    keys = in_memory(KEYS, place)
    for index, value in enumerate(KEYS):
        key = RandomKey(value)
        for dtype in (torch.float32, torch.float64):
            out = torch.full((n + 1,), torch.nan, dtype=dtype, device=place)
            device.normals(keys, index, out[:n])
            assert torch.equal(out[:n].cpu(), key.normal(n, dtype=dtype))
            assert out[n].isnan()
        out = torch.full((n + 1,), torch.nan, dtype=torch.float64, device=place)
        device.uniforms(keys, index, out[:n])
        assert torch.equal(out[:n].cpu(), key.uniform(n))
        assert out[n].isnan()


def test_any_shape_at_any_place(place):
    keys = in_memory([7], place)
    room = torch.empty(64, device=place)
    device.normals(keys, 0, room[1:22].view(3, 7))  # off a pair's boundary
    assert torch.equal(room[1:22].view(3, 7).cpu(), RandomKey(7).normal(3, 7))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_draw_reads_its_key_anew():
    keys, out = in_memory([1], "cuda"), torch.empty(1001, device="cuda")
    device.normals(keys, 0, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.normals(keys, 0, out)
    for value in (5, 2**64 - 3):
        keys.copy_(in_memory([value], "cuda"))
        graph.replay()
        assert torch.equal(out.cpu(), RandomKey(value).normal(1001))


ONE, OUT = torch.zeros(1, dtype=torch.int64), torch.zeros(4)


@pytest.mark.parametrize(
    ("fill", "arguments", "error", "message"),
    [
        (device.normals, (OUT, 0, OUT), TypeError, "keys has dtype torch.float32; it must be torch.int64"),
        (device.normals, (ONE.to("meta"), 0, OUT), ValueError, "keys is on meta; it must be on cpu, as out is"),
        (device.normals, (ONE, 1, OUT), ValueError, "index is 1; keys holds 1"),
        (device.normals, (ONE, -1, OUT), ValueError, "index is -1"),
        (device.normals, (ONE, 0, OUT[::2]), ValueError, "must be contiguous"),
        (device.normals, (ONE, 0, OUT.bfloat16()), TypeError, "out has dtype torch.bfloat16; normals come in"),
        (device.uniforms, (ONE, 0, OUT), TypeError, "out has dtype torch.float32; uniforms come in torch.float64"),
    ],
)
def test_refusals(fill, arguments, error, message):
    with pytest.raises(error, match=message):
        fill(*arguments)
