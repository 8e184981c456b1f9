"""Artifacts in transformers.js, unchanged, held against this project's own runtime.

What transformers.js asks of names and shapes is checked everywhere. The library itself runs where the
environment variable MEDGEMMA_EDGE_NODE names a directory in which `npm install @huggingface/transformers`
was done.
"""

import json
import os
import shutil
import subprocess

import numpy as np
import onnxruntime
import pytest

from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_quantization.scheme import SCHEMES
from medgemma_runtime.backends import open_session
from medgemma_runtime.prompt import Image, Message, Text, load_prompt_tokenizer

LENGTH = 90  # the sample's window is 32
STEPS = 8
IMAGE = slice(40, 56)
EQUAL = 1e-4

# transformers.js, src/utils/dtypes.js
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}

SCRIPT = """
import fs from 'node:fs';
import { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } from '@huggingface/transformers';
const request = JSON.parse(fs.readFileSync(process.argv[1]));
env.allowRemoteModels = false;
env.localModelPath = request.parent;
const model = await AutoModelForImageTextToText.from_pretrained(request.name);
const length = request.ids.length;
const inputs = {
  input_ids: new Tensor('int64', BigInt64Array.from(request.ids.map(BigInt)), [1, length]),
  attention_mask: new Tensor('int64', new BigInt64Array(length).fill(1n), [1, length]),
  pixel_values: new Tensor('float32', Float32Array.from(request.pixels), [1, 3, 224, 224]),
};
const { logits } = await model(inputs);
const tokens = await model.generate({ ...inputs, max_new_tokens: request.steps, do_sample: false });
const processor = await AutoProcessor.from_pretrained(request.name);
const content = [{ type: 'image' }, { type: 'text', text: 'what is this?' }];
const text = processor.apply_chat_template([{ role: 'user', content }], {
  add_generation_prompt: true,
  tokenize: false,
});
const image = new RawImage(new Uint8ClampedArray(300 * 200 * 3), 300, 200, 3);
const prepared = await processor(text, image, { add_special_tokens: false });
console.log(JSON.stringify({
  logits: Array.from(logits.data),
  tokens: tokens.tolist()[0].slice(length).map(Number),
  prompt: prepared.input_ids.tolist()[0].map(Number),
}));
"""


@pytest.fixture(scope="module", params=["fp32", "int4"])
def artifact(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("js") / "artifact"
    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="onnx",
        scheme=SCHEMES[request.param],
        components=(),
        out=out,
    )
    return build(recipe, progress=lambda *step: None)


@pytest.fixture(scope="module")
def stated(artifact):
    return json.loads((artifact.directory / "config.json").read_text())["transformers.js_config"]


def names_of(artifact, stated, stem):
    """The inputs that a program cannot do without, as transformers.js finds and opens it."""
    program = artifact.directory / "onnx" / f"{stem}{SUFFIXES[stated['dtype'][stem]]}.onnx"
    assert stated["use_external_data_format"][program.name] == 1
    assert program.with_name(f"{program.name}_data").is_file()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    return {value.name: value.shape for value in session.get_inputs()}


def test_programs_ask_for_what_transformers_js_gives(artifact, stated):
    assert names_of(artifact, stated, "vision_encoder").keys() == {"pixel_values"}
    assert names_of(artifact, stated, "embed_tokens").keys() == {"input_ids"}
    inputs = names_of(artifact, stated, "decoder_model_merged")
    caches = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
    assert inputs.keys() - caches.keys() == {"inputs_embeds", "attention_mask", "position_ids"}
    assert caches.keys() == {f"past_key_values.{n}.{kind}" for n in range(8) for kind in ("key", "value")}
    # An empty cache gets the batch where the axis has this name, numbers as they are, and 0 otherwise.
    for first, heads, length, width in caches.values():
        assert (first, heads, width) == ("batch_size", 2, 32)
        assert isinstance(length, str)


def test_the_checkpoint_s_own_settings_stay(artifact):
    settings = json.loads((artifact.directory / "config.json").read_text())
    assert settings["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert json.loads((artifact.directory / "processor_config.json").read_text()) == {
        "processor_class": "Gemma3Processor",
        "image_seq_length": 16,
    }
    template = json.loads((artifact.directory / "tokenizer_config.json").read_text())["chat_template"]
    assert (artifact.directory / "chat_template.jinja").read_text() == template


def run_transformers_js(directory, request):
    node = os.environ.get("MEDGEMMA_EDGE_NODE")
    if node is None or shutil.which("node") is None:
        pytest.skip("needs node, and @huggingface/transformers in the directory MEDGEMMA_EDGE_NODE")
    (directory / "request.json").write_text(json.dumps(request))
    command = ["node", "--input-type=module", "--eval", SCRIPT, str(directory / "request.json")]
    done = subprocess.run(command, cwd=node, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def our_logits(sessions, ids, values):
    """transformers.js counts positions from 1 and gives no `image_blocks`."""
    features = sessions["vision"].run({"pixel_values": values})["image_features"]
    embeds = sessions["embed"].run({"input_ids": ids[None], "image_features": features})["inputs_embeds"]
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(1, len(ids) + 1)[None],
        "image_blocks": np.full((1, len(ids)), -1),
        "local_start": np.zeros(1, np.int64),
    }
    for spec in sessions["decoder"].entry.inputs:
        if spec.name.startswith("past_key_values"):
            inputs[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    return sessions["decoder"].run(inputs)["logits"].reshape(-1)


def test_transformers_js_computes_the_same(artifact, tmp_path):
    image_id = artifact.manifest.prompt.image_id
    rng = np.random.default_rng(2)
    ids = rng.integers(10, 200, LENGTH)
    ids[0], ids[IMAGE] = 2, image_id
    values = rng.uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)
    answer = run_transformers_js(
        tmp_path,
        {
            "parent": f"{artifact.directory.parent}/",
            "name": artifact.directory.name,
            "ids": ids.tolist(),
            "pixels": values.ravel().tolist(),
            "steps": STEPS,
        },
    )
    sessions = {name: open_session(artifact, name, threads=1) for name in artifact.manifest.components}
    assert np.abs(np.array(answer["logits"]) - our_logits(sessions, ids, values)).max() < EQUAL
    for token in answer["tokens"]:
        assert token == our_logits(sessions, ids, values).argmax()
        ids = np.append(ids, token)
    assert len(answer["tokens"]) == STEPS
    question = (Message(role="user", parts=(Image(), Text("what is this?"))),)
    tokenizer = load_prompt_tokenizer(artifact.directory, artifact.manifest.prompt)
    assert answer["prompt"] == tokenizer.encode(question, image_count=1).ids.tolist()
    for session in sessions.values():
        session.close()
