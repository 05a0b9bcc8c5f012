"""Random keys: what is drawn depends on the key and the place alone, on every instruction set."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from angle_rl import _core
from angle_rl.types import RandomKey


def test_a_key_and_its_children_are_all_different():
    keys = [RandomKey(0), *RandomKey(0).split(100), *RandomKey(1).split(100)]
    assert len({key.value for key in keys}) == len(keys)
    assert RandomKey(0).split(2) == RandomKey(0).split(5)[:2]
    with pytest.raises(ValueError, match="n is 0"):
        RandomKey(0).split(0)
    with pytest.raises(ValueError, match="value is -1"):
        RandomKey(-1)


def test_float32_normals_are_the_float64_ones_rounded():
    key = RandomKey(3)
    wide, narrow = key.normal(7, 5, dtype=torch.float64), key.normal(7, 5)
    assert wide.shape == narrow.shape == (7, 5)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    np.testing.assert_array_equal(narrow.numpy(), wide.numpy().astype(np.float32))
    with pytest.raises(TypeError, match=r"dtype is torch\.bfloat16"):
        key.normal(2, dtype=torch.bfloat16)


def test_a_draw_depends_on_its_key_and_place_alone():
    key = RandomKey(2**64 - 1)
    long_normal, long_uniform = key.normal(1000), key.uniform(1000)
    for n in (0, 1, 2, 15, 17, 300):
        assert torch.equal(key.normal(n), long_normal[:n])
        assert torch.equal(key.uniform(n), long_uniform[:n])
    assert not torch.equal(RandomKey(5).normal(8), RandomKey(6).normal(8))


DRAW = """
import array, hashlib
from angle_rl import _core
drawn = array.array("f", bytes(4 * 5001)), array.array("d", bytes(8 * 5001))
_core.philox_normal_f32(9, drawn[0].buffer_info()[0], 5001)
_core.philox_normal_f64(9, drawn[1].buffer_info()[0], 5001)
print(hashlib.sha256(drawn[0].tobytes() + drawn[1].tobytes()).hexdigest())
"""


def test_every_instruction_set_draws_the_same_bits():
    drawn = [RandomKey(9).normal(5001, dtype=dtype).numpy().tobytes() for dtype in (torch.float32, torch.float64)]
    expected = hashlib.sha256(b"".join(drawn)).hexdigest()
    for isa in _core.available_isas():
        environment = {**os.environ, "ANGLE_ISA": isa}
        got = subprocess.run([sys.executable, "-c", DRAW], env=environment, check=True, capture_output=True, text=True)
        assert got.stdout.strip() == expected, isa
