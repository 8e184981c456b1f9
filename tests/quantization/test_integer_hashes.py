import hashlib

import numpy as np
import pytest

from medgemma_quantization.integer_hashes import (
    INTEGERS_NAME,
    compare_hashes,
    hash_integers,
    read_hashes,
    write_hashes,
)
from medgemma_quantization.plan import WeightSpec, make_plan
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import keep_integers, quantize_weights
from medgemma_runtime.errors import ArtifactError

SPECS = [
    WeightSpec(name="fc.weight", shape=(2, 32), role="linear"),
    WeightSpec(name="fc.bias", shape=(2,), role="bias"),
]
# Row 0 is 0 1 2 ... 7 -8 -7 ... -1 twice; of two integers in a byte the first has the low bits.
VALUES = np.stack([np.tile(np.roll(np.arange(-8, 8), 8), 2), np.full(32, 7)]).astype(np.int8)
PACKED = bytes.fromhex("1032547698badcfe" * 2 + "77" * 16)


@pytest.fixture
def weights(tmp_path):
    plan = make_plan(SCHEMES["int4"], SPECS)
    made = quantize_weights(plan, lambda name, rows=None: np.ones((2, 32), np.float32), tmp_path)
    keep_integers(plan.by_name["fc.weight"], tmp_path, VALUES, np.array([[0.5], [2]], np.float32))
    return made


def test_a_hash_is_that_of_integers_and_scales_as_documented(weights):
    np.testing.assert_array_equal(weights.quantized("fc.weight").values, VALUES)
    scales = bytes.fromhex("0000003f 00000040")
    assert hash_integers(weights) == {"fc.weight": hashlib.sha256(PACKED + scales).hexdigest()}
    assert hash_integers(weights, ["fc.bias"]) == {}


def test_one_integer_or_scale_makes_another_hash(weights, tmp_path):
    stated = hash_integers(weights)
    compare_hashes(hash_integers(weights), stated)
    row = weights.plan.by_name["fc.weight"]
    other = VALUES.copy()
    other[1, 31] = 6
    for values, scales in [(other, [[0.5], [2]]), (VALUES, [[0.5], [4]])]:
        keep_integers(row, tmp_path, values, np.array(scales, np.float32))
        with pytest.raises(ArtifactError, match=r"the integers of fc\.weight are not those that were made"):
            compare_hashes(hash_integers(weights), stated)


def test_hashes_are_read_as_they_were_written(weights, tmp_path):
    write_hashes(hash_integers(weights), tmp_path)
    assert read_hashes(tmp_path) == hash_integers(weights)
    for damage in (b"[]", b'{"fc.weight": 1}', b"\xff"):
        (tmp_path / INTEGERS_NAME).write_bytes(damage)
        with pytest.raises(ArtifactError, match="holds no hashes of integers; export the model again"):
            read_hashes(tmp_path)
    (tmp_path / INTEGERS_NAME).unlink()
    with pytest.raises(ArtifactError, match="holds no hashes"):
        read_hashes(tmp_path)
