from dataclasses import replace

import numpy as np
import pytest

from medgemma_quantization import weights as weights_module
from medgemma_quantization.affine import pack_integers, quantize, range_scales, unpack_integers
from medgemma_quantization.palette import palettize
from medgemma_quantization.plan import WeightSpec, make_plan, refuse_palettes
from medgemma_quantization.scheme import INT4, LUT4, LUT6, SCHEMES, Storage, load_scheme
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.errors import EdgeError


def heavy_tailed(shape, seed=0):
    return np.random.default_rng(seed).standard_t(5, shape).astype(np.float32) / 40


def least_error(values, entries):
    """The least squared error of any palette: every cut of the sorted values, by dynamic programming."""
    ordered = np.sort(values.astype(np.float64))
    count = len(ordered)
    sums, squares = (np.concatenate([[0], np.cumsum(x)]) for x in (ordered, ordered**2))
    start, stop = np.arange(count)[:, None], np.arange(1, count + 1)[None]
    size = np.maximum(stop - start, 1)
    cost = squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / size
    cost[stop - start < 1] = np.inf
    best = cost[0]
    for _ in range(entries - 1):
        before = np.concatenate([[np.inf], best[:-1]])
        best = (before[:, None] + cost).min(axis=0)
    return best[-1]


@pytest.mark.parametrize("storage", [LUT4, LUT6])
def test_every_weight_has_the_nearest_of_its_groups_palette(storage):
    weight = heavy_tailed((24, 40))
    tensor = palettize(weight, storage)
    assert tensor.scales.shape == (3, 1 << storage.bits)
    dense = tensor.dequantize()
    for group, palette in enumerate(tensor.scales):
        rows = slice(8 * group, 8 * group + 8)
        distances = np.abs(weight[rows][..., None] - palette)
        np.testing.assert_array_equal(np.abs(dense[rows] - weight[rows]), distances.min(axis=-1))
        assert np.isin(dense[rows], palette).all()
    assert (tensor.scales == tensor.scales.astype(np.float16)).all()


@pytest.mark.parametrize("kind", ["normal", "heavy", "two lumps"])
def test_the_palette_is_close_to_the_best_there_is(kind):
    rng = np.random.default_rng(3)
    weight = {
        "normal": rng.normal(size=(8, 96)),
        "heavy": heavy_tailed((8, 96)) * 40,
        "two lumps": np.where(rng.random((8, 96)) < 0.5, -1, 1) + rng.normal(size=(8, 96)) / 50,
    }[kind].astype(np.float32)
    found = ((palettize(weight, LUT4).dequantize() - weight) ** 2).sum()
    least = least_error(weight.reshape(-1), 16)
    # Measured: 0.1 to 0.8 % above it. float16 entries may cost as much again where weights lie close.
    assert 0.999 * least < found < 1.02 * least


def test_a_palette_beats_even_steps_where_there_are_outliers():
    weight = heavy_tailed((64, 256))
    even = Storage(bits=4, block=256)
    steps = quantize(weight, even, range_scales(weight, even)).dequantize()
    errors = [np.linalg.norm(dense - weight) for dense in (palettize(weight, LUT4).dequantize(), steps)]
    assert errors[0] < 0.7 * errors[1]


def test_equal_weights_give_equal_palettes_whatever_their_neighbours():
    weight = heavy_tailed((32, 24))
    whole, part = palettize(weight, LUT4), palettize(weight[8:16].copy(), LUT4)
    assert (whole.values[8:16] == part.values).all() and (whole.scales[1:2] == part.scales).all()


def test_few_different_weights_are_exact():
    weight = np.tile(np.array([-2, 0, 0.5, 3], np.float32), (8, 10))
    assert (palettize(weight, LUT4).dequantize() == weight).all()
    assert (palettize(np.zeros((8, 4), np.float32), LUT6).dequantize() == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000])
def test_weights_that_no_palette_holds_are_refused(value):
    with pytest.raises(ValueError, match="not finite, or too large for the float16"):
        palettize(np.full((8, 4), value, np.float32), LUT4)


def test_six_bits_are_packed_lowest_first():
    values = np.array([[1, 2, 3, 63, 0, 0, 0, 32]], np.int8)
    packed = pack_integers(values, LUT6)
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed[0])
    assert [int(bits[i : i + 6][::-1], 2) for i in range(0, 48, 6)] == values[0].tolist()
    for storage, top in ((LUT6, 64), (LUT4, 16)):
        some = np.random.default_rng(0).integers(0, top, (5, 12)).astype(np.int8)
        assert (unpack_integers(pack_integers(some, storage), storage) == some).all()


def test_large_matrices_are_cut_between_groups(tmp_path, monkeypatch):
    weight = heavy_tailed((40, 16))
    plan = make_plan(SCHEMES["lut4"], [WeightSpec(name="w", shape=weight.shape, role="linear")])

    def read(name, rows=None):
        return weight if rows is None else weight[rows]

    monkeypatch.setattr(weights_module, "_PIECE_VALUES", 20 * 16)
    made = quantize_weights(plan, read, tmp_path)
    expected = palettize(weight, LUT4)
    assert (made.quantized("w").dequantize() == expected.dequantize()).all()
    assert (made.quantized("w", slice(8, 24)).dequantize() == expected.dequantize()[8:24]).all()
    with pytest.raises(ValueError, match="rows 4 to 12 of w cut a palette of 8"):
        made.quantized("w", slice(4, 12))


def test_a_plan_counts_palettes_and_refuses_what_they_do_not_divide():
    spec = WeightSpec(name="w", shape=(16, 12), role="linear")
    [row] = make_plan(SCHEMES["lut6"], [spec]).rows
    assert (str(row.storage), row.stored_bits) == ("lut6 group 8", 16 * 12 * 6 + 2 * 64 * 16)
    for shape in ((20, 12), (16, 10)):
        with pytest.raises(EdgeError, match=rf"w has {shape[0]} outputs and {shape[1]} inputs, and lut6"):
            make_plan(SCHEMES["lut6"], [replace(spec, shape=shape)])
    with pytest.raises(EdgeError, match="k-means finds palettes; leave --method gptq out"):
        make_plan(SCHEMES["lut6"], [spec], method="gptq")
    pair = [
        WeightSpec(name="up", shape=(40, 32), role="linear", padded_axes=(0,)),
        WeightSpec(name="down", shape=(32, 40), role="linear", padded_axes=(1,)),
    ]
    mixed = replace(SCHEMES["lut4"], overrides=(("down", INT4),))
    with pytest.raises(EdgeError, match="up would be padded with zeros to a multiple of 32"):
        make_plan(mixed, pair)


def test_engines_without_palettes_say_so():
    spec = WeightSpec(name="w", shape=(16, 12), role="linear")
    with pytest.raises(EdgeError, match="w: the plan asks for lut4 group 8, and Some Engine has no palettes"):
        refuse_palettes(make_plan(SCHEMES["lut4"], [spec]), "Some Engine")
    refuse_palettes(make_plan(SCHEMES["fp32"], [spec]), "Some Engine")


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"bits": 4, "block": 32}, {"bits": 6, "palette": -1}])
def test_palettes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="a palette has 6 or 4 bits"):
        Storage(**({"palette": 8} | wrong))
    with pytest.raises(ValueError, match="or 6 or 4 of a palette, and are 6"):
        Storage(bits=6)


def test_a_scheme_file_names_a_palette(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(
        'name = "s"\nlinear = { bits = 6, palette = 4 }\ntable = { bits = 8, block = 32 }\n'
        'activations = "float16"\n'
    )
    scheme = load_scheme(path)
    assert scheme.linear == Storage(bits=6, palette=4)
