import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medgemma_quantization.affine import (
    QuantizedTensor,
    pack_int4,
    quantize,
    range_scales,
    round_scale,
    unpack_int4,
)
from medgemma_quantization.scheme import INT4, INT8, Storage

WEIGHTS = arrays(np.float32, (4, 64), elements=st.floats(-100, 100, width=32))


def test_hand_computed_int8_row():
    weight = np.array([[126.0, 0.5, -63.5, 0.4, 0.0, -127.0]], np.float32)
    tensor = quantize(weight, INT8, range_scales(weight, INT8))
    assert tensor.scales.tolist() == [[1.0]]
    assert tensor.values.tolist() == [[126, 0, -64, 0, 0, -127]]  # halves go to the even neighbour


def test_a_heavy_pair_widens_the_int8_scale():
    weight = np.array([[127.0, -127.0]], np.float32)
    tensor = quantize(weight, INT8, range_scales(weight, INT8))
    assert tensor.scales.tolist() == [[2.0]]
    assert tensor.values.tolist() == [[64, -64]]


@given(WEIGHTS)
def test_neighbouring_int8_values_never_exceed_128_together(weight):
    values = quantize(weight, INT8, range_scales(weight, INT8)).values.astype(int)
    assert np.abs(values).reshape(4, 32, 2).sum(axis=2).max() <= 128


def test_hand_computed_int4_block_uses_the_longer_negative_side():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = [-8.0, 7.0, 2.5]
    tensor = quantize(weight, INT4, range_scales(weight, INT4))
    assert tensor.scales.tolist() == [[1.0]]
    assert tensor.values[0, :3].tolist() == [-8, 7, 2]


@given(WEIGHTS, st.sampled_from([INT8, INT4, Storage(bits=4, block=16), Storage(bits=8, block=32)]))
def test_no_weight_is_clipped_and_every_error_is_at_most_half_a_step(weight, storage):
    tensor = quantize(weight, storage, range_scales(weight, storage))
    step = np.repeat(tensor.scales, 64 // tensor.scales.shape[1], axis=1)
    error = np.abs(tensor.dequantize().astype(np.float64) - weight)
    assert (error <= step * (0.5 + 1e-6)).all()


@given(arrays(np.float32, 50, elements=st.floats(0, 60000, width=32)))
def test_scales_are_exact_in_float16_and_bfloat16_and_never_smaller(scales):
    rounded = round_scale(scales)
    assert (rounded == rounded.astype(np.float16).astype(np.float32)).all()
    # bfloat16 is the upper half of a float32.
    assert (rounded.view(np.uint32) & 0xFFFF == 0).all()
    assert (rounded >= scales).all()
    normal = scales > 2.0**-14
    assert (rounded[normal] <= scales[normal] * (1 + 2.0**-7)).all()


def test_a_zero_weight_is_stored_exactly():
    tensor = quantize(np.zeros((2, 32), np.float32), INT4, range_scales(np.zeros((2, 32), np.float32), INT4))
    assert not tensor.dequantize().any()


@given(arrays(np.int8, (3, 8), elements=st.integers(-8, 7)), st.sampled_from([0, 8]))
def test_packing_int4_is_invertible(values, offset):
    assert (unpack_int4(pack_int4(values, offset=offset), offset=offset) == values).all()


def test_packed_int4_has_the_first_integer_in_the_low_half():
    assert pack_int4(np.array([[1, -1]], np.int8)).tolist() == [[0xF1]]
    assert pack_int4(np.array([[1, -1]], np.int8), offset=8).tolist() == [[0x79]]


def test_errors():
    with pytest.raises(ValueError, match="100 inputs are no multiple of the block 32"):
        range_scales(np.ones((2, 100), np.float32), INT4)
    with pytest.raises(ValueError, match="not finite"):
        range_scales(np.full((2, 32), np.nan, np.float32), INT4)
    with pytest.raises(ValueError, match="float16's range"):
        range_scales(np.full((1, 32), 1e7, np.float32), INT4)
    with pytest.raises(ValueError, match="odd number"):
        pack_int4(np.zeros((1, 3), np.int8))
    with pytest.raises(ValueError, match="two neighbouring int8 values exceed 128"):
        quantize(np.full((1, 2), 100, np.float32), INT8, np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="needs scales"):
        QuantizedTensor(storage=INT4, values=np.zeros((2, 64), np.int8), scales=np.ones((2, 1), np.float32))
