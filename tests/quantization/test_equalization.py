"""Factors change weights so that products stay, and methods choose them as their papers say."""

from dataclasses import replace

import numpy as np
import pytest

from medgemma_quantization.equalization import FACTORS_NAME, Equalization, note_equalized, read_factors
from medgemma_quantization.folds import Fold
from medgemma_quantization.methods.awq import EXPONENTS, awq_factors
from medgemma_quantization.methods.rounding import nearest
from medgemma_quantization.methods.smoothquant import smooth
from medgemma_quantization.observers import Moments
from medgemma_quantization.plan import WeightSpec, make_plan
from medgemma_quantization.scheme import INT4, SCHEMES
from medgemma_runtime.errors import EdgeError

NORM = Fold(source="norm", kind="gain", readers=("q.weight", "k.weight"), factors=64)
GROUPED = Fold(source="v", kind="rows", readers=("o.weight",), factors=64, head_width=32, group=2)


def observed(x: np.ndarray) -> tuple[Moments, np.ndarray]:
    moments = Moments.zeros(x.shape[1])
    moments.add(x)
    return moments, np.abs(x).max(axis=0)


def make_case(width: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of very different magnitudes, [400, width], and a matrix [48, width]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, width)) * np.exp(1.5 * rng.normal(size=width))
    return x.astype(np.float32), rng.normal(size=(48, width)).astype(np.float32)


def error(weight: np.ndarray, x: np.ndarray, columns: np.ndarray) -> float:
    rounded = nearest(INT4, None)(weight * columns).dequantize() / columns
    return float(np.square(x @ (rounded - weight).T).sum())


class TestAwq:
    def test_the_factors_have_the_least_error_of_all_exponents(self):
        x, weight = make_case()
        found = awq_factors(NORM, *observed(x), [(INT4, weight)])
        magnitude = np.abs(x).mean(axis=0)
        tried = [magnitude**exponent for exponent in EXPONENTS]
        errors = [error(weight, x, (f / np.exp(np.log(f).mean())).astype(np.float32)) for f in tried]
        assert error(weight, x, found) == pytest.approx(min(errors), rel=1e-4)
        assert min(errors) < 0.8 * errors[0]

    def test_readers_share_one_choice(self):
        x, weight = make_case()
        other = make_case(seed=3)[1]
        found = awq_factors(NORM, *observed(x), [(INT4, weight), (INT4, other)])
        both = error(weight, x, found) + error(other, x, found)
        ones = np.ones(64, np.float32)
        assert both <= error(weight, x, ones) + error(other, x, ones)

    def test_heads_that_share_values_share_factors(self):
        x, weight = make_case(width=128)
        found = awq_factors(GROUPED, *observed(x), [(INT4, weight)])
        assert found.shape == (64,)
        columns = GROUPED.expand(found)
        # Query heads 0 and 1 read value head 0, the next two value head 1.
        for head, source in enumerate((0, 0, 1, 1)):
            np.testing.assert_array_equal(
                columns[32 * head : 32 * head + 32], found[32 * source : 32 * source + 32]
            )

    def test_an_input_that_is_never_there_has_a_finite_factor(self):
        x, weight = make_case()
        x[:, 5] = 0
        found = awq_factors(NORM, *observed(x), [(INT4, weight)])
        assert np.isfinite(found).all() and (found > 0).all()

    def test_one_sample_of_one_row_is_enough(self):
        x, weight = make_case()
        found = awq_factors(NORM, *observed(x[:1]), [(INT4, weight)])
        assert error(weight, x[:1], found) <= error(weight, x[:1], np.ones(64, np.float32))

    def test_inputs_that_are_always_zero_are_refused(self):
        x, weight = make_case()
        with pytest.raises(ValueError, match="zero in every sample"):
            awq_factors(NORM, *observed(x * 0), [(INT4, weight)])


class TestSmoothQuant:
    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_factors_are_those_of_the_paper(self, alpha):
        x, weight = make_case()
        found = smooth(alpha)(NORM, *observed(x), [(INT4, weight), (INT4, 2 * weight)])
        reference = np.abs(x).max(axis=0) ** alpha / np.abs(2 * weight).max(axis=0) ** (1 - alpha)
        np.testing.assert_allclose(found / found[0], reference / reference[0], rtol=1e-5)
        assert np.log(found.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)

    def test_half_makes_peaks_of_inputs_and_weights_alike(self):
        x, weight = make_case()
        found = smooth(0.5)(NORM, *observed(x), [(INT4, weight)])
        inputs, columns = np.abs(x / found).max(axis=0), np.abs(weight * found).max(axis=0)
        np.testing.assert_allclose(inputs / columns, (inputs / columns)[0], rtol=1e-4)

    def test_an_alpha_outside_0_and_1_is_refused(self):
        with pytest.raises(ValueError, match=r"alpha must lie between 0 and 1 and is 1\.5"):
            smooth(1.5)

    def test_weights_that_are_zero_are_refused(self):
        x, weight = make_case()
        with pytest.raises(ValueError, match="inputs or weights are zero"):
            smooth()(NORM, *observed(x), [(INT4, weight * 0)])


_RNG = np.random.default_rng(1)
WEIGHTS = {
    "norm.weight": _RNG.normal(size=64).astype(np.float32),
    "norm.bias": _RNG.normal(size=64).astype(np.float32),
    "q.weight": _RNG.normal(size=(32, 64)).astype(np.float32),
    "k.weight": _RNG.normal(size=(16, 64)).astype(np.float32),
    "v.weight": _RNG.normal(size=(64, 24)).astype(np.float32),
    "v.bias": _RNG.normal(size=64).astype(np.float32),
    "o.weight": _RNG.normal(size=(8, 128)).astype(np.float32),
}
FACTORS = {
    source: np.exp(np.random.default_rng(2).normal(size=64)).astype(np.float32) for source in ("norm", "v")
}


class TestWeights:
    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return WEIGHTS[name] if rows is None else WEIGHTS[name][rows]

    def test_a_layer_norm_takes_factors_back(self):
        read = Equalization(folds=(NORM,), factors={"norm": FACTORS["norm"]}).reader(self.read)
        unit = np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32)
        for name in NORM.readers:
            before = (unit * self.read("norm.weight") + self.read("norm.bias")) @ self.read(name).T
            after = (unit * read("norm.weight") + read("norm.bias")) @ read(name).T
            np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)

    def test_an_rms_norm_takes_factors_back_from_its_gain_and_not_from_what_is_stored(self):
        fold = replace(NORM, kind="gain less one")
        read = Equalization(folds=(fold,), factors={"norm": FACTORS["norm"]}).reader(self.read)
        stored = read("norm.weight")
        np.testing.assert_allclose(
            1 + stored, (1 + self.read("norm.weight")) / FACTORS["norm"], rtol=1e-5, atol=1e-6
        )

    def test_values_and_their_readers_in_grouped_heads(self):
        read = Equalization(folds=(GROUPED,), factors={"v": FACTORS["v"]}).reader(self.read)
        x = np.random.default_rng(3).normal(size=(5, 24)).astype(np.float32)

        def output(read) -> np.ndarray:
            values = (x @ read("v.weight").T + read("v.bias")).reshape(5, 2, 1, 32)
            return np.repeat(values, 2, axis=2).reshape(5, -1) @ read("o.weight").T

        np.testing.assert_allclose(output(read), output(self.read), rtol=1e-4, atol=1e-4)

    def test_some_rows_are_those_of_the_whole(self):
        folds, rows = (NORM, GROUPED), slice(7, 20)
        read = Equalization(folds=folds, factors=FACTORS).reader(self.read)
        for name in WEIGHTS:
            np.testing.assert_array_equal(read(name, rows), read(name)[rows], err_msg=name)

    def test_a_fold_without_factors_changes_nothing(self):
        read = Equalization(folds=(NORM, GROUPED), factors={}).reader(self.read)
        for name in WEIGHTS:
            np.testing.assert_array_equal(read(name), self.read(name))

    def test_what_is_saved_is_read_back(self, tmp_path):
        Equalization(folds=(NORM, GROUPED), factors=FACTORS).save(tmp_path)
        again = read_factors(tmp_path, (NORM, GROUPED))
        assert again.factors.keys() == FACTORS.keys()
        for source in FACTORS:
            np.testing.assert_array_equal(again.factors[source], FACTORS[source])
        assert [path.name for path in tmp_path.iterdir()] == [FACTORS_NAME]

    def test_factors_that_are_of_no_use_are_refused(self, tmp_path):
        with pytest.raises(EdgeError, match="holds no factors"):
            read_factors(tmp_path, (NORM,))
        (tmp_path / FACTORS_NAME).write_bytes(b"something else")
        with pytest.raises(EdgeError, match="holds no factors"):
            read_factors(tmp_path, (NORM,))
        with pytest.raises(EdgeError, match=r"factors of other \(64,\) belong to another model"):
            Equalization(folds=(NORM,), factors={"other": FACTORS["v"]})
        with pytest.raises(EdgeError, match="belong to another model"):
            Equalization(folds=(NORM,), factors={"norm": FACTORS["v"][:5]})
        for bad in (0.0, np.nan, -1.0):
            with pytest.raises(EdgeError, match="not finite or not above zero"):
                Equalization(folds=(NORM,), factors={"norm": np.full(64, bad, np.float32)})


def test_the_plan_says_what_is_scaled_and_what_takes_it_back():
    specs = [
        WeightSpec(name="norm.weight", shape=(64,), role="norm"),
        WeightSpec(name="q.weight", shape=(32, 64), role="linear"),
        WeightSpec(name="v.weight", shape=(64, 64), role="linear"),
        WeightSpec(name="o.weight", shape=(32, 128), role="linear"),
    ]
    fold = replace(NORM, readers=("q.weight", "v.weight"))
    plan = note_equalized(make_plan(SCHEMES["int4"], specs), (fold, GROUPED))
    reasons = {row.name: row.reason.partition("; ")[2] for row in plan.rows}
    assert reasons == {
        "norm.weight": "a vector; takes back the scale of what reads it",
        "q.weight": "columns scaled, which the norm before takes back",
        "v.weight": "columns scaled, which the norm before takes back; takes back the scale of what reads it",
        "o.weight": "columns scaled, which the matrix before takes back",
    }
