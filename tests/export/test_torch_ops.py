"""TorchOps running the model is the model: held against transformers."""

from dataclasses import replace

import numpy as np
import pytest

from medgemma_export.emulation import onnx_integer_linear
from medgemma_export.torch_ops import compute, weight_only
from medgemma_quantization.plan import make_plan
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import quantize_weights


def run(model, checkpoint, reference, directory, *, scheme="fp32", read=None, integer_linear=weight_only):
    plan = make_plan(SCHEMES[scheme], model.weights())
    weights = quantize_weights(plan, read or model.reader(checkpoint), directory)
    return {
        component.name: compute(
            component, weights, reference.inputs[component.name], integer_linear=integer_linear
        )["pooler_output"]
        for component in model.components
    }


def test_float_model_equals_transformers(model, checkpoint, reference, tmp_path):
    pooled = run(model, checkpoint, reference, tmp_path)
    for name, actual in pooled.items():
        assert np.abs(actual - reference.pooled[name]).max() < 1e-5, name
    unit = {name: array / np.linalg.norm(array) for name, array in pooled.items()}
    cosine = unit["image"] @ unit["text"].T
    logits = cosine * model.similarity.scale + model.similarity.bias
    assert np.abs(logits - reference.logits).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.head.attention.v_proj.bias",
        "vision_model.post_layernorm.weight",
        "vision_model.encoder.layers.0.mlp.fc2.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.head.bias",
    ],
)
def test_one_wrong_weight_is_seen(model, checkpoint, reference, tmp_path, name):
    read = model.reader(checkpoint)
    pooled = run(
        model,
        checkpoint,
        reference,
        tmp_path,
        read=lambda wanted: read(wanted) * np.float32(1.01) if wanted == name else read(wanted),
    )
    assert max(np.abs(pooled[part] - reference.pooled[part]).max() for part in pooled) > 1e-5


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_padding_the_hidden_axis_changes_nothing(model, checkpoint, reference, tmp_path, scheme):
    """The same integers without padding: int4 pads 216 to 224, and gelu(0) = 0 makes it exact."""
    pooled = run(model, checkpoint, reference, tmp_path / "padded", scheme=scheme)
    plan = make_plan(SCHEMES[scheme], model.weights())
    weights = quantize_weights(plan, model.reader(checkpoint), tmp_path / "padded")

    def unpadded(name):
        row = plan.by_name[name]
        if row.storage.bits == 32:
            return model.reader(checkpoint)(name)
        return weights.quantized(name).dequantize()[: row.shape[0], : row.shape[1]].copy()

    float_plan = make_plan(SCHEMES["fp32"], model.weights())
    exact = quantize_weights(float_plan, unpadded, tmp_path / "unpadded")
    for component in model.components:
        actual = compute(component, exact, reference.inputs[component.name])["pooler_output"]
        assert np.abs(actual - pooled[component.name]).max() < 1e-5


def test_activation_rounding_is_emulated_and_matters(model, checkpoint, reference, tmp_path):
    exact = run(model, checkpoint, reference, tmp_path, scheme="int8")
    rounded = run(model, checkpoint, reference, tmp_path, scheme="int8", integer_linear=onnx_integer_linear)
    assert np.abs(exact["image"] - rounded["image"]).max() > 1e-3


def test_an_unknown_weight_fails_loudly(model, checkpoint, reference, tmp_path):
    image = model.components[0]
    plan = make_plan(SCHEMES["fp32"], model.components[1].weights())
    weights = quantize_weights(plan, model.reader(checkpoint), tmp_path)
    with pytest.raises(KeyError):
        compute(replace(image), weights, reference.inputs["image"])
