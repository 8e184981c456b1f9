from dataclasses import replace

import pytest

from medgemma_quantization.plan import PackedWeight, WeightSpec, compare_packed, make_plan, read_plan
from medgemma_quantization.scheme import FLOAT32, INT4, INT8, SCHEMES, Storage
from medgemma_runtime.errors import EdgeError

# An MLP of SigLIP's awkward width, between things that stay float.
SPECS = [
    WeightSpec(name="norm.weight", shape=(64,), role="norm"),
    WeightSpec(name="fc1.weight", shape=(4304, 64), role="linear", padded_axes=(0,)),
    WeightSpec(name="fc1.bias", shape=(4304,), role="bias", padded_axes=(0,)),
    WeightSpec(name="fc2.weight", shape=(64, 4304), role="linear", padded_axes=(1,)),
    WeightSpec(name="fc2.bias", shape=(64,), role="bias"),
    WeightSpec(name="table.weight", shape=(1000, 64), role="table"),
]


def test_int4_pads_the_hidden_axis_of_both_matrices_and_the_bias_between_them():
    rows = make_plan(SCHEMES["int4"], SPECS).by_name
    assert rows["fc1.weight"].stored_shape == (4320, 64)
    assert rows["fc1.bias"].stored_shape == (4320,)
    assert rows["fc2.weight"].stored_shape == (64, 4320)
    assert rows["fc2.bias"].stored_shape == (64,)
    assert "padded with zeros to a multiple of 32" in rows["fc2.weight"].reason


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_nothing_is_padded_where_no_block_asks_for_it(scheme):
    assert all(row.stored_shape == row.shape for row in make_plan(SCHEMES[scheme], SPECS).rows)


def test_an_mlp_is_padded_for_its_own_blocks_and_not_for_another_ones():
    layers = [
        replace(spec, name=f"layers.{layer}.mlp.{spec.name}")
        for layer in (0, 1)
        for spec in SPECS
        if spec.name.startswith("fc")
    ]
    scheme = replace(SCHEMES["int4"], overrides=((r"layers\.0\..*weight", INT8),))
    rows = make_plan(scheme, layers).by_name
    assert all(row.stored_shape == row.shape for name, row in rows.items() if name.startswith("layers.0."))
    assert rows["layers.1.mlp.fc1.weight"].stored_shape == (4320, 64)
    assert rows["layers.1.mlp.fc2.weight"].stored_shape == (64, 4320)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "mobile"])
def test_the_precision_of_a_plan_is_the_scheme_s(name):
    specs = [replace(spec, shape=tuple(-(-size // 64) * 64 for size in spec.shape)) for spec in SPECS]
    assert make_plan(SCHEMES[name], specs).precision == name


def test_mobile_is_int4_for_a_decoder_and_int8_for_an_encoder():
    def plan(part):
        return make_plan(SCHEMES["mobile"], [replace(spec, part=part) for spec in SPECS])

    assert plan("decoder").precision == "int4" and plan("encoder").precision == "int8"
    assert plan("decoder").by_name["fc1.weight"].storage == Storage(bits=4, block=64)
    assert plan("encoder").by_name["fc1.weight"].storage == INT8
    for part in ("encoder", "decoder"):
        assert plan(part).by_name["table.weight"].storage == Storage(bits=4, block=64)
    assert "of the decoder" in plan("decoder").by_name["fc1.weight"].reason


def test_bits_per_weight_counts_scales_and_padding():
    plan = make_plan(SCHEMES["int4"], SPECS)
    matrices = 2 * 4320 * 64 + 1000 * 64
    floats = 64 + 4320 + 64
    count = 2 * 4304 * 64 + 1000 * 64 + 64 + 4304 + 64
    assert plan.bits_per_weight == pytest.approx((matrices * 4.5 + floats * 32) / count)


def test_every_row_has_a_reason_and_vectors_stay_float():
    plan = make_plan(SCHEMES["int8"], SPECS)
    assert all(row.reason for row in plan.rows)
    assert {row.name for row in plan.rows if row.storage == FLOAT32} == {
        "norm.weight",
        "fc1.bias",
        "fc2.bias",
    }


def test_the_first_override_that_matches_wins():
    scheme = replace(SCHEMES["int4"], overrides=((r"fc2\..*weight", INT8), (r"fc.*weight", FLOAT32)))
    rows = make_plan(scheme, SPECS).by_name
    assert (rows["fc2.weight"].storage, rows["fc1.weight"].storage) == (INT8, FLOAT32)
    assert "override" in rows["fc2.weight"].reason


def test_requests_that_cannot_be_met():
    with pytest.raises(EdgeError, match="no weight matches"):
        make_plan(replace(SCHEMES["int8"], overrides=(("fc3.*", INT8),)), SPECS)
    with pytest.raises(EdgeError, match="only linear and table"):
        make_plan(replace(SCHEMES["int8"], overrides=((r"norm\.weight", INT8),)), SPECS)
    odd = WeightSpec(name="odd.weight", shape=(8, 40), role="linear")
    with pytest.raises(EdgeError, match=r"odd.weight has 40 inputs, no multiple of the block 32"):
        make_plan(SCHEMES["int4"], [*SPECS, odd])


def test_a_plan_survives_its_file_and_keeps_its_hash(tmp_path):
    plan = make_plan(SCHEMES["int4"], SPECS)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    again = read_plan(path)
    assert again == plan
    assert again.sha256 == plan.sha256
    path.write_text(plan.to_json().replace('"bits": 4', '"bits": "4"', 1))
    with pytest.raises(EdgeError, match="is no QuantPlan"):
        read_plan(path)
    with pytest.raises(EdgeError, match="cannot be read"):
        read_plan(tmp_path / "none.json")


def test_packed_weights_are_held_against_the_plan():
    plan = make_plan(SCHEMES["int4"], SPECS)
    packed = [PackedWeight(name=row.name, storage=row.storage, shape=row.stored_shape) for row in plan.rows]
    compare_packed(plan, packed)
    with pytest.raises(RuntimeError, match="1 weights of the plan were not packed"):
        compare_packed(plan, packed[1:])
    with pytest.raises(RuntimeError, match="was packed as float32"):
        compare_packed(plan, [*packed[:1], replace(packed[1], storage=FLOAT32), *packed[2:]])
    with pytest.raises(RuntimeError, match=r"\(64, 4304\)"):
        compare_packed(plan, [*packed[:3], replace(packed[3], shape=(64, 4304)), *packed[4:]])
    with pytest.raises(RuntimeError, match="not in the plan"):
        compare_packed(plan, [*packed, replace(packed[0], name="lm_head.weight")])
    assert INT4 in {weight.storage for weight in packed}
