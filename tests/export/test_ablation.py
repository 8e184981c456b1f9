"""Each ablation does what its name says, and the network is itself again afterwards."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.reference.ablation import ABLATIONS, _run, _states, ablate
from medgemma_export.reference.cli import reference_main
from medgemma_export.reference.decoders import encode_prompts, open_network
from tests import tiny_prompts

BY_NAME = {ablation.name: ablation for ablation in ABLATIONS}
TEXT = tiny_prompts.PROMPTS[2]


@pytest.fixture(scope="module")
def network():
    return open_network(open_checkpoint(tiny_prompts.MODEL))


@pytest.fixture(scope="module")
def encoded():
    return encode_prompts(open_checkpoint(tiny_prompts.MODEL), tiny_prompts.PROMPTS, tiny_prompts.images())[0]


def test_every_change_is_measured_where_it_applies() -> None:
    found = ablate(tiny_prompts.MODEL, prompts=tiny_prompts.PROMPTS, images=tiny_prompts.images())
    assert list(found) == [ablation.name for ablation in ABLATIONS]
    scale = found.pop("embedding scale unrounded")
    assert scale.kl_mean == 0.0  # sqrt(64) is a bfloat16
    # 1e-4 nats would pass for another order of sums.
    assert all(parity.kl_mean > 1e-3 for parity in found.values()), found
    assert found["RoPE factor 8 on local layers"].kl_mean > 0.1
    # Answers about images alone, and everything.
    assert found["image mask dropped"].tokens < found["no <bos>"].tokens == found["<bos> twice"].tokens


def test_texts_alone_have_no_image_mask_to_drop() -> None:
    found = ablate(tiny_prompts.MODEL, prompts=[TEXT])
    assert "image mask dropped" not in found
    assert len(found) == len(ABLATIONS) - 1


@pytest.mark.parametrize("name", BY_NAME)
def test_the_network_is_put_back(network, encoded, name) -> None:
    prompt = encoded[0]
    before = _states(network, prompt)
    _run(network, BY_NAME[name], prompt)
    np.testing.assert_array_equal(_states(network, prompt), before)


def test_the_scale_is_the_square_root_and_the_factor_divides_frequencies(network) -> None:
    embedding, rotary = network.get_input_embeddings(), network.get_decoder().rotary_emb
    kept = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
    embedding.embed_scale.fill_(3.0)
    try:
        with BY_NAME["embedding scale unrounded"].change(network):
            assert float(embedding.embed_scale) == 8.0
        assert float(embedding.embed_scale) == 3.0
    finally:
        embedding.embed_scale.fill_(8.0)
    with BY_NAME["RoPE factor 8 on local layers"].change(network):
        torch.testing.assert_close(rotary.sliding_attention_inv_freq, kept[0] / 8)
        torch.testing.assert_close(rotary.full_attention_inv_freq, kept[1])
    torch.testing.assert_close(rotary.sliding_attention_inv_freq, kept[0])


def test_without_bos_each_token_is_predicted_from_the_rest_of_what_was_before(network, encoded) -> None:
    prompt = encoded[2]
    with torch.inference_mode():
        ids = torch.from_numpy(prompt.ids[None, 1:-1])
        expected = network.model(input_ids=ids).last_hidden_state[0].numpy()
    actual = _run(network, BY_NAME["no <bos>"], replace(prompt, given_tokens=2))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert len(actual) == len(prompt.ids) - 2


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "note.txt").write_text(TEXT.text)
    words = ["medgemma-reference", "ablate", "--model", tiny_prompts.MODEL, "--notes", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setenv("COLUMNS", "120")
    assert reference_main() == 0
    printed = capsys.readouterr().out
    assert "sample:medgemma-tiny in float32, against itself unchanged" in printed
    assert "RoPE factor 8 on local layers" in printed and "KL p99" in printed
