"""A valid MedSigLIP artifact of a few kilobytes, made with the base dependencies alone.

Its encoders are chosen so that answers can be worked out by hand. The image encoder averages each
quarter of a 16 x 16 image, channel by channel, to 12 numbers. The text encoder looks ids up in a
table and averages over the 64 positions; only the words red, green and blue have a row other than
zero, which points where an image of that colour points. The table is external data.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from medgemma_runtime import images
from medgemma_runtime.manifest import (
    BuildInfo,
    ComponentEntry,
    FileEntry,
    Manifest,
    ModelInfo,
    QuantizationSummary,
    Similarity,
    TensorSpec,
    TextSpec,
    write_manifest,
)

SIZE = 16
WIDTH = 12
LENGTH = 64
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
# The published tokenizer's special ids, its byte pieces, then this vocabulary.
PIECES = [
    *("<pad>", "</s>", "<unk>"),
    *(f"<0x{value:02X}>" for value in range(256)),
    *("▁", "▁red", "▁green", "▁blue", "▁a", "▁image", "▁nothing", "s", "/", "<", ">"),
]
TOKEN_IDS = {piece: token_id for token_id, piece in enumerate(PIECES)}
FILES = ("image.onnx", "text.onnx", "text.onnx.data", "tokenizer.json", "quant_plan.json")

_FLOAT, _INT64 = 1, 7


def write_tiny_artifact(directory: Path) -> Path:
    """Write the artifact into a new directory and return it."""
    directory.mkdir()
    (directory / "image.onnx").write_bytes(image_program())
    (directory / "text.onnx").write_bytes(text_program())
    (directory / "text.onnx.data").write_bytes(text_table().tobytes())
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (directory / "quant_plan.json").write_text('{"rows": []}\n', encoding="utf-8")
    write_manifest(tiny_manifest(directory), directory)
    return directory


def write_images(folder: Path, names: Iterable[str] = tuple(COLOURS)) -> Path:
    """Write a plain image `NAME.png` for each colour into a new folder and return it."""
    folder.mkdir()
    for name in names:
        Image.new("RGB", (20, 10), COLOURS[name]).save(folder / f"{name}.png")
    return folder


def tiny_manifest(directory: Path) -> Manifest:
    """The manifest of the files as they are now in `directory`."""
    files = tuple(file_entry(directory, name) for name in FILES)
    return Manifest(
        schema_version=1,
        target="onnx",
        precision="fp32",
        model=ModelInfo(
            id="test:tiny",
            revision=None,
            architecture="SiglipModel",
            weights_sha256="0" * 64,
            licence="Apache-2.0",
            intended_use="For tests only.",
        ),
        components={
            "image": ComponentEntry(
                program="image.onnx",
                inputs=(tensor("pixel_values", "float32", "batch", 3, SIZE, SIZE),),
                outputs=(tensor("pooler_output", "float32", "batch", WIDTH),),
            ),
            "text": ComponentEntry(
                program="text.onnx",
                inputs=(tensor("input_ids", "int64", "batch", LENGTH),),
                outputs=(tensor("pooler_output", "float32", "batch", WIDTH),),
            ),
        },
        image=images.medsiglip_processor(SIZE),
        text=text_spec(),
        prompt=None,
        similarity=Similarity(scale=10.0, bias=-5.0),
        quantization=QuantizationSummary(
            plan="quant_plan.json",
            plan_sha256=files[-1].sha256,
            scheme="fp32",
            method="none",
            activations="float",
            bits_per_weight=32.0,
            calibration=None,
        ),
        build=BuildInfo(versions={"onnx": "none"}, seconds=0.1, peak_rss_bytes=1),
        files=files,
    )


def file_entry(directory: Path, name: str) -> FileEntry:
    content = (directory / name).read_bytes()
    return FileEntry(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def text_spec() -> TextSpec:
    return TextSpec(
        tokenizer="tokenizer.json",
        length=LENGTH,
        pad_id=1,
        eos_id=1,
        canonicalize="siglip",
        source="tests",
    )


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape, description="")  # type: ignore[arg-type]


def tokenizer_json() -> str:
    """A converted tokenizer with the faults of those in circulation.

    It canonicalizes by itself and keeps `/ < >`, does not fall back to bytes, and adds the end token.
    """
    # A word costs less than its characters, a character less than a byte.
    scores = [0.0] * 259 + [-9.0 if len(piece) == 1 else -3.0 for piece in PIECES[259:]]
    tokenizer = Tokenizer(
        models.Unigram(list(zip(PIECES, scores, strict=True)), unk_id=2, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"""[!"#$%&'()*+,\-.:;=?@\[\\\]^_`{|}~]"""), ""),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)


def text_table() -> np.ndarray:
    """[tokens, 12] float32."""
    table = np.zeros((len(PIECES), WIDTH), dtype=np.float32)
    for name, colour in COLOURS.items():
        table[TOKEN_IDS[f"▁{name}"]] = np.repeat(np.array(colour) / 127.5 - 1, 4)
    return table


def image_program() -> bytes:
    pool = _node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8])
    flatten = _node("Flatten", ["pooled"], ["pooler_output"])
    return model(
        [pool, flatten],
        inputs=[_value("pixel_values", _FLOAT, ["batch", 3, SIZE, SIZE])],
        outputs=[_value("pooler_output", _FLOAT, ["batch", WIDTH])],
    )


def text_program(*, location: str = "text.onnx.data", operator: str = "Gather") -> bytes:
    gather = _node(operator, ["table", "input_ids"], ["rows"])
    mean = _node("ReduceMean", ["rows", "axis"], ["pooler_output"], keepdims=0)
    return model(
        [gather, mean],
        inputs=[_value("input_ids", _INT64, ["batch", LENGTH])],
        outputs=[_value("pooler_output", _FLOAT, ["batch", WIDTH])],
        initializers=(
            _external("table", _FLOAT, text_table().shape, location),
            _constant("axis", np.array([1])),
        ),
    )


# ONNX is protobuf; these are the few messages of onnx.proto that a tiny model needs, written by
# field number, because the onnx package is no base dependency.


def model(
    nodes: list[bytes], *, inputs: list[bytes], outputs: list[bytes], initializers: tuple[bytes, ...] = ()
) -> bytes:
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"tiny"),
            *(_field(5, tensor) for tensor in initializers),
            *(_field(11, value) for value in inputs),
            *(_field(12, value) for value in outputs),
        ]
    )
    opset = _field(2, 18)
    return _field(1, 9) + _field(7, graph) + _field(8, opset)


def _node(operator: str, inputs: list[str], outputs: list[str], **attributes: int | list[int]) -> bytes:
    return b"".join(
        [
            *(_field(1, name.encode()) for name in inputs),
            *(_field(2, name.encode()) for name in outputs),
            _field(4, operator.encode()),
            *(_field(5, _attribute(name, value)) for name, value in attributes.items()),
        ]
    )


def _attribute(name: str, value: int | list[int]) -> bytes:
    if isinstance(value, int):
        return _field(1, name.encode()) + _field(3, value) + _field(20, 2)
    return _field(1, name.encode()) + b"".join(_field(8, item) for item in value) + _field(20, 7)


def _value(name: str, element: int, shape: list[int | str]) -> bytes:
    dims = b"".join(
        _field(1, _field(1, dim) if isinstance(dim, int) else _field(2, dim.encode())) for dim in shape
    )
    tensor_type = _field(1, element) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor_type))


def _constant(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, _INT64) + _field(8, name.encode()) + _field(9, array.tobytes())


def _external(name: str, element: int, shape: tuple[int, ...], location: str) -> bytes:
    dims = b"".join(_field(1, size) for size in shape)
    entry = _field(1, b"location") + _field(2, location.encode())
    return dims + _field(2, element) + _field(8, name.encode()) + _field(13, entry) + _field(14, 1)


def _field(number: int, content: int | bytes) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
