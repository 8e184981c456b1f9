"""From a conversation with an image to an answer, held against transformers' own greedy generation."""

import json

import numpy as np
import PIL.Image
import pytest

from medgemma_export.build import build
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.recipe import Recipe
from medgemma_quantization.scheme import SCHEMES
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.cli import app
from medgemma_runtime.command import INTERRUPTED, printable, run_app
from medgemma_runtime.errors import ArtifactError, TextError
from medgemma_runtime.generate import GenerateOptions, GenerateResult, Generator, sample_token
from medgemma_runtime.prompt import Image, Message, Text, split_thinking

MODEL = "sample:medgemma-tiny"
QUESTION = (Message(role="user", parts=(Image(), Text("what does this image show?"))),)
PLAIN = (Message(role="user", parts=(Text("what is this?"),)),)


def recipe(out, **changes):
    facts = {"model": MODEL, "scheme": SCHEMES["fp32"], "components": ()} | changes
    return Recipe(revision=None, target="onnx", out=out, **facts)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "artifact"
    build(recipe(out), progress=lambda *step: None)
    return open_artifact(out)


@pytest.fixture(scope="module")
def generator(artifact):
    with Generator(artifact, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network(artifact):
    torch = pytest.importorskip("torch")
    from transformers import Gemma3ForConditionalGeneration

    checkpoint = open_checkpoint(MODEL)
    network = Gemma3ForConditionalGeneration.from_pretrained(
        checkpoint.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # The released model computes in bfloat16, where the embedding scale is rounded; so does the artifact.
    embedding = network.model.language_model.embed_tokens
    scale = float(torch.tensor(embedding.embedding_dim**0.5, dtype=torch.bfloat16))
    embedding.embed_scale.fill_(scale)
    return network


# Greedy, the sample repeats one token; drawn hot, every step hangs on the exact logits.
HOT = GenerateOptions(max_tokens=24, temperature=2.0, top_k=200, top_p=1.0, seed=11)


def reference_ids(network, generator, image, options):
    """The same draw from transformers' logits, each step a whole forward without any cache."""
    import torch

    from medgemma_runtime.images import preprocess

    prompt = generator._tokenizer.encode(QUESTION, image_count=1)
    pixels = torch.from_numpy(preprocess(image, generator._image)[None])
    rng = np.random.default_rng(options.seed)
    ids = prompt.ids.tolist()
    for _ in range(options.max_tokens):
        types = (np.array(ids) == generator.spec.image_id).astype(np.int64)
        with torch.inference_mode():
            logits = network(
                input_ids=torch.tensor([ids]),
                pixel_values=pixels,
                token_type_ids=torch.from_numpy(types[None]),
            ).logits[0, -1]
        token = sample_token(logits.numpy()[: generator._tokenizer.token_count], options, rng)
        if token in generator.spec.stop_ids:
            break
        ids.append(token)
    return ids[len(prompt.ids) :]


def test_answers_equal_transformers_token_by_token(network, generator, image):
    result = generator.generate(QUESTION, [image], options=HOT)
    assert list(result.ids) == reference_ids(network, generator, image, HOT)
    assert len(set(result.ids)) > 5


def test_the_image_matters_and_its_features_are_kept(generator, image):
    runs = []
    vision = generator._session("vision")
    run = vision.run
    vision.run = lambda inputs: runs.append(1) or run(inputs)
    try:
        fresh = np.ascontiguousarray(image[::-1])
        first = generator.generate(QUESTION, [fresh], options=HOT)
        assert generator.generate(QUESTION, [fresh], options=HOT).ids == first.ids
        assert len(runs) == 1
        assert generator.generate(QUESTION, [image], options=HOT).ids != first.ids
        # Those of images that are asked about no more are not.
        assert len(generator._features) == 1
    finally:
        vision.run = run


def test_text_streams_and_can_be_cancelled(generator):
    options = GenerateOptions(max_tokens=30, temperature=1.0, seed=4)
    pieces: list[str] = []
    whole = generator.generate(PLAIN, options=options, on_text=lambda text: not pieces.append(text))
    assert "".join(pieces) == whole.text
    stopped = generator.generate(PLAIN, options=options, on_text=lambda text: False)
    assert stopped.ended == "cancel"
    assert whole.text.startswith(stopped.text)


def test_the_same_seed_gives_the_same_answer(generator):
    drawn = [
        generator.generate(PLAIN, options=GenerateOptions(max_tokens=20, temperature=1.0, seed=seed)).ids
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_context_is_enforced_before_any_work(artifact, monkeypatch):
    with Generator(artifact) as opened:
        monkeypatch.setattr(opened, "_session", None)
        long = (Message(role="user", parts=(Text("word " * (opened.spec.context + 1)),)),)
        with pytest.raises(TextError, match="tokens"):
            opened.generate(long)
        with pytest.raises(TextError, match="places for no image and 1 is given"):
            opened.generate(PLAIN, [np.zeros((2, 2, 3), np.uint8)])


def test_an_artifact_of_another_kind_is_refused(tmp_path):
    build(recipe(tmp_path / "siglip", model="sample:medsiglip-tiny"), progress=lambda *step: None)
    with pytest.raises(ArtifactError, match="answering needs embed, decoder and a prompt"):
        Generator(open_artifact(tmp_path / "siglip"))


def test_sampling_by_hand():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    assert sample_token(logits, GenerateOptions(), rng) == 0

    def drawn(**options):
        chosen = GenerateOptions(temperature=1.0, **options)
        return [sample_token(logits, chosen, rng) for _ in range(4000)]

    assert set(drawn(top_k=2, top_p=1.0)) == {0, 1}
    # 0.5 + 0.3 reaches 0.6; the third is never drawn.
    assert set(drawn(top_k=4, top_p=0.6)) == {0, 1}
    assert np.mean(np.array(drawn(top_k=4, top_p=1.0)) == 0) == pytest.approx(0.5, abs=0.03)
    assert set(drawn(top_k=4, top_p=0.4)) == {0}


class Candidates:
    """In place of numpy's generator: keeps what it is to draw from."""

    def choice(self, candidates, p):
        self.shares = dict(zip(candidates.tolist(), p, strict=True))
        return candidates[0]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (64, 0.95), (64, 0.3)])
def test_candidates_are_those_of_transformers(top_k, top_p):
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(3).integers(-32, 33, 400).astype(np.float32) / 8  # many are equal
    rng = Candidates()
    sample_token(logits, GenerateOptions(temperature=0.7, top_k=top_k, top_p=top_p), rng)
    kept = TopKLogitsWarper(top_k)(None, torch.from_numpy(logits).double()[None] / 0.7)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    shares = kept.softmax(-1)[0].numpy()
    # Which of equal tokens top-p cuts off, transformers leaves to a sort; here it is the last.
    assert list(rng.shares) == sorted(rng.shares, key=lambda token: (-logits[token], token))
    expected = np.sort(shares[shares > 0])[::-1]
    np.testing.assert_allclose(list(rng.shares.values()), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"top_k": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_options_that_mean_nothing(options):
    with pytest.raises(ValueError, match="must"):
        GenerateOptions(**options)


@pytest.fixture
def generate(artifact, image, tmp_path, monkeypatch, capsys):
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = run_app(app, ["generate", str(artifact.directory), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_text_goes_on_as_transformers_goes_on_with_it(network, generator):
    import torch

    text = "Describe this image findings user"
    ids = [2, *generator._tokenizer.encode_text(text).ids[1:].tolist()]
    start = len(ids)
    rng = np.random.default_rng(HOT.seed)
    for _ in range(HOT.max_tokens):
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        token = sample_token(logits[: generator._tokenizer.token_count], HOT, rng)
        if token in generator.spec.stop_ids:
            break
        ids.append(token)
    pieces: list[str] = []
    result = generator.complete(text, options=HOT, on_text=lambda piece: not pieces.append(piece))
    assert list(result.ids) == ids[start:]
    assert "".join(pieces) == result.text
    assert result.prompt_tokens == start


DRAWN = ("--max-tokens", "24", "--temperature", "2", "--top-k", "200", "--top-p", "1", "--seed", "11")
ASKED = ("--image", "image.png", "--prompt", "what does this image show?")


def test_the_command_line_answers_as_the_library_does(generate, generator, image, tmp_path):
    expected = generator.generate(QUESTION, [image], options=HOT)
    code, out, err = generate(*ASKED, *DRAWN, "--threads", "1", "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["text"] == split_thinking(expected.text).answer != ""
    assert content["ended"] == expected.ended
    assert content["tokens"] == {"prompt": expected.prompt_tokens, "answer": len(expected.ids)}
    assert set(content["milliseconds"]) == {"images", "prefill", "decode"}

    (tmp_path / "question.txt").write_text("\ufeffwhat does this image show?\n", encoding="utf-8")
    code, out, err = generate(*ASKED[:2], "--prompt-file", "question.txt", *DRAWN, "--threads", "1")
    assert code == 0
    assert out == printable(content["text"].replace("\t", "    ")) + "\n"
    assert ("cut off after 24 tokens" in err) == (expected.ended == "length")


def test_raw_goes_on_with_the_text_itself(generate, generator):
    code, out, _ = generate("--prompt", "Describe", "--raw", *DRAWN, "--threads", "1", "--json")
    expected = generator.complete("Describe", options=HOT)
    content = json.loads(out)
    assert code == 0
    assert content["text"] == expected.text.strip()
    assert content["tokens"] == {"prompt": 2, "answer": len(expected.ids)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --prompt or --prompt-file"),
        (("--prompt", "x", "--prompt-file", "y"), "either --prompt or --prompt-file"),
        (("--prompt", ""), "the question has no word in it"),
        (("--prompt", " \n", "--raw"), "the question has no word in it"),
        (("--prompt-file", "image.png"), "is not UTF-8 text"),
        (("--prompt", "x", "--top-p", "0"), "--top-p above 0"),
        (("--prompt", "x", "--temperature", "inf"), "a finite number"),
        (("--prompt", "x", "--image", "absent.png"), "is not a file"),
        (("--prompt", "<start_of_turn>"), "<start_of_turn>"),
        (("--prompt", "x", "--raw", "--image", "image.png"), "--raw goes on with a text alone"),
        (("--prompt", "x", "--raw", "--system", "y"), "--raw goes on with a text alone"),
    ],
)
def test_the_command_line_refuses_what_is_no_question(generate, words, message):
    code, out, err = generate(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


PIECES = ("<unused94>", "thought", "\n", "It is ", "red.", "<unused95>", "A \t", "red\x1b ", "image. ", "\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [((), "A     red\ufffd image.\n"), (("--thoughts",), "It is red.\n\nA     red\ufffd image.\n")],
)
def test_a_thought_is_printed_only_when_asked_for(generate, monkeypatch, words, expected):
    def said(self, *_, on_text, **__):
        assert all(on_text(piece) for piece in PIECES)
        return GenerateResult(
            text="".join(PIECES),
            ids=(1, 2),
            ended="stop",
            prompt_tokens=3,
            images_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    monkeypatch.setattr(Generator, "generate", said)
    assert generate("--prompt", "x", *words) == (0, expected, "")


def test_an_interruption_ends_the_line_and_the_program(generate, monkeypatch):
    def interrupted(self, *_, on_text, **__):
        on_text("A red")
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "generate", interrupted)
    assert generate("--prompt", "x") == (INTERRUPTED, "A red\n", "interrupted\n")


def test_the_help_has_examples_and_a_warning(generate):
    code, out, _ = generate("--help")
    assert code == 0
    assert "medgemma-run generate out/medgemma-int4 --image film.dcm" in out
    assert "Not for diagnosis" in out
