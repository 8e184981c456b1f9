"""Bits go where they are worth most, and what cannot be chosen is refused."""

import json
import re
from dataclasses import replace
from itertools import combinations

import pytest

from medgemma_quantization.budget import (
    Budget,
    Sensitivity,
    Share,
    check_floor,
    choose_bits,
    parse_size,
    predicted_kl,
    read_sensitivity,
    write_sensitivity,
)
from medgemma_quantization.plan import QuantPlan, WeightSpec, make_plan
from medgemma_quantization.scheme import INT8_BLOCKS, SCHEMES
from medgemma_runtime.errors import EdgeError

# Names to inputs and cost at 4 bits; every matrix has 64 outputs.
COSTS = {"a": (64, 0.08), "b": (640, 0.10), "c": (64, 0.01), "d": (128, 0.0)}

# Bytes that 8 bits add: half a byte a weight, less two for each of 16-bit scales in blocks, more for rows'.
ADDED = {name: 64 * inputs // 2 - 2 * (64 * inputs // 32 - 64) for name, (inputs, _) in COSTS.items()}
ADDED["table"] = 32 * 64 // 2


def make_weights() -> list[WeightSpec]:
    matrices = [
        WeightSpec(name=name, shape=(64, inputs), role="linear") for name, (inputs, _) in COSTS.items()
    ]
    return [
        *matrices,
        WeightSpec(name="table", shape=(32, 64), role="table"),
        WeightSpec(name="norm", shape=(64,), role="norm"),
    ]


HIGH = make_plan(SCHEMES["int8"], make_weights())


@pytest.fixture
def plan() -> QuantPlan:
    return make_plan(SCHEMES["int4"], make_weights(), method="gptq")


@pytest.fixture
def sensitivity() -> Sensitivity:
    shares = [Share(names=(name,), kl=cost) for name, (_, cost) in COSTS.items()]
    shares.append(Share(names=("table",), kl=0.02))
    return Sensitivity(key="key", tokens=9, shares=tuple(shares), low_kl=0.42, high_kl=0.02)


def size(plan: QuantPlan) -> int:
    return -(-sum(row.stored_bits for row in plan.rows) // 8)


def raised(plan: QuantPlan) -> set[str]:
    return {row.name for row in plan.rows if row.storage.bits == 8}


def test_a_divergence_is_met_by_the_least_bits(plan, sensitivity):
    """`b` costs most and takes ten times the bits of `a`; `table` takes half of them; `d` costs nothing."""
    chosen = [
        raised(choose_bits(plan, HIGH, sensitivity, Budget(max_kl=limit)))
        for limit in (0.41, 0.25, 0.1, 0.03)
    ]
    assert chosen == [{"table"}, {"a", "table"}, {"a", "b"}, {"a", "table", "b", "c"}]


def test_a_size_is_kept_and_used(plan, sensitivity):
    for extra in (0, 1_000, 5_000, 17_000, 25_000):
        budget = size(plan) + extra
        mixed = choose_bits(plan, HIGH, sensitivity, Budget(size_bytes=budget))
        assert size(mixed) <= budget
        # Nothing that is left at 4 bits would still fit.
        left = plan.by_name.keys() - raised(mixed) - {"norm"}
        assert all(size(mixed) + ADDED[name] > budget for name in left)
        assert (raised(mixed) == set()) == (extra < ADDED["table"])


def test_no_other_choice_of_the_size_is_better(plan, sensitivity):
    """For these costs; a choice by gain for each bit may miss the best by one weight."""
    budget = size(plan) + 5_000
    mixed = choose_bits(plan, HIGH, sensitivity, Budget(size_bytes=budget))
    names = [*COSTS, "table"]
    best = predicted_kl(sensitivity, raised(mixed))
    for count in range(len(names) + 1):
        for some in combinations(names, count):
            if sum(ADDED[name] for name in some) <= 5_000:
                assert predicted_kl(sensitivity, some) >= best - 1e-12


def test_a_large_table_is_not_crowded_out(plan):
    """What gains most for a bit goes first where it leaves room for more, and else what is worth more."""
    shares = (Share(names=("a",), kl=0.30), Share(names=("table",), kl=0.15))
    costs = Sensitivity(key="key", tokens=9, shares=shares, low_kl=0.5, high_kl=0.05)
    room = Budget(size_bytes=size(plan) + ADDED["a"] + ADDED["table"] - 1)
    assert raised(choose_bits(plan, HIGH, costs, room)) == {"a"}
    shares = (Share(names=("table",), kl=0.15), Share(names=("b",), kl=0.30))
    costs = Sensitivity(key="key", tokens=9, shares=shares, low_kl=0.5, high_kl=0.05)
    room = Budget(size_bytes=size(plan) + ADDED["b"] + 10)
    assert raised(choose_bits(plan, HIGH, costs, room)) == {"b"}
    # By divergence, too: `table` first would need `b` as well.
    assert raised(choose_bits(plan, HIGH, costs, Budget(max_kl=0.21))) == {"b"}


def test_a_divergence_is_met_and_no_more(plan, sensitivity):
    mixed = choose_bits(plan, HIGH, sensitivity, Budget(max_kl=0.25))
    assert predicted_kl(sensitivity, raised(mixed)) <= 0.25 < predicted_kl(sensitivity, ["a"])


def test_the_prediction_lies_between_its_measured_ends(sensitivity):
    assert predicted_kl(sensitivity, ()) == pytest.approx(0.42)
    assert predicted_kl(sensitivity, [*COSTS, "table"]) == pytest.approx(0.02)
    # `a` has 0.08 of 0.21.
    assert predicted_kl(sensitivity, ["a"]) == pytest.approx(0.02 + 0.40 * 0.13 / 0.21)


def test_every_row_says_what_it_costs_and_its_rank(plan, sensitivity):
    mixed = choose_bits(plan, HIGH, sensitivity, Budget(size_bytes=size(plan) + 2_100))
    assert mixed.scheme == "int4-int8"
    assert str(mixed.by_name["a"].storage) == "int8 per channel"
    reason = mixed.by_name["a"].reason
    assert re.fullmatch(
        r"budget 0\.03\d+ MB: 4 bits alone cost 0\.08 nats, rank 1 of 5 by cost for each bit", reason
    )
    assert "rank 5 of 5" in mixed.by_name["d"].reason
    assert mixed.by_name["norm"] == plan.by_name["norm"]


def test_a_table_stays_in_blocks_and_a_group_stays_together(plan, sensitivity):
    shares = (Share(names=("a", "table"), kl=1.0), *sensitivity.shares[1:4])
    grouped = Sensitivity(key="key", tokens=9, shares=shares, low_kl=0.42, high_kl=0.02)
    mixed = choose_bits(plan, HIGH, grouped, Budget(size_bytes=size(plan) + 4_000))
    assert raised(mixed) == {"a", "table"}
    assert str(mixed.by_name["table"].storage) == "int8 block 32"
    assert "4 bits of 2 weights alone cost 1 nats" in mixed.by_name["table"].reason


def test_padding_is_still_said():
    weights = [
        WeightSpec(name="up", shape=(60, 64), role="linear", padded_axes=(0,)),
        WeightSpec(name="down", shape=(64, 60), role="linear", padded_axes=(1,)),
    ]
    plan = make_plan(SCHEMES["int4"], weights)
    shares = (Share(names=("up",), kl=1.0), Share(names=("down",), kl=0.1))
    measured = Sensitivity(key="key", tokens=9, shares=shares, low_kl=0.4, high_kl=0.1)
    mixed = choose_bits(plan, make_plan(SCHEMES["int8"], weights), measured, Budget(max_kl=0.2))
    assert raised(mixed) == {"up"}
    assert mixed.by_name["up"].stored_shape == (64, 64)
    assert mixed.by_name["up"].reason.endswith("; hidden axis padded with zeros to a multiple of 32")


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            Budget(size_bytes=20_000),
            "the smallest plan, int4 throughout, takes 0.03367 MB; name at least that",
        ),
        (Budget(size_bytes=10**6), "int8 throughout takes only 0.06029 MB; leave the budget out"),
        (Budget(max_kl=0.02), "int8 throughout is measured at 0.02 already; name more than that"),
        (Budget(max_kl=0.42), "int4 throughout is measured at 0.42; leave the budget out"),
    ],
)
def test_budgets_that_leave_nothing_to_choose(plan, sensitivity, budget, says):
    with pytest.raises(EdgeError, match=re.escape(says)):
        choose_bits(plan, HIGH, sensitivity, budget)
    if budget.size_bytes is not None:
        with pytest.raises(EdgeError, match=re.escape(says)):
            check_floor(plan, HIGH, budget)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2.6GB", 2_600_000_000), ("800 MB", 800_000_000), ("1GiB", 1 << 30), ("0.5 mib", 1 << 19)],
)
def test_sizes(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["2.6", "GB", "-1GB", "0GB", "2.6 GB of RAM", "1TB", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(EdgeError, match="is not understood; write it as"):
        parse_size(text)


def test_a_budget_is_one_of_two():
    with pytest.raises(ValueError, match="either a size or a divergence"):
        Budget()
    with pytest.raises(ValueError, match="either a size or a divergence"):
        Budget(size_bytes=1, max_kl=1)
    with pytest.raises(ValueError, match="nan nats is no budget"):
        Budget(max_kl=float("nan"))


def test_sensitivities_are_read_back(tmp_path, sensitivity):
    path = tmp_path / "sensitivity.json"
    write_sensitivity(sensitivity, path)
    assert read_sensitivity(path, key="key") == sensitivity
    with pytest.raises(EdgeError, match="measured on another checkpoint, method or calibration set"):
        read_sensitivity(path, key="other")
    data = json.loads(path.read_text())
    for damage in ("{}", "no json", json.dumps(data | {"low_kl": "0.4"})):
        path.write_text(damage)
        with pytest.raises(EdgeError, match="holds no sensitivities"):
            read_sensitivity(path, key="key")


def test_what_has_8_bits_already_is_no_decision_and_8_bits_are_the_target_s(sensitivity):
    """`mobile` stores an image tower in int8, and ONNX stores a decoder's int8 in blocks."""
    weights = [replace(spec, part="decoder") for spec in make_weights()]
    weights.append(WeightSpec(name="tower", shape=(64, 64), role="linear"))
    plan = make_plan(SCHEMES["mobile"], weights)
    high = make_plan(replace(SCHEMES["int8"], decoder=INT8_BLOCKS), weights)
    mixed = choose_bits(plan, high, sensitivity, Budget(max_kl=0.25))
    assert {name for name in raised(mixed) if mixed.by_name[name].storage == INT8_BLOCKS} == {"a", "table"}
    assert mixed.by_name["tower"] == plan.by_name["tower"]
