"""VL-BART: its encoder against the formula in float64, its trained parameters against the paper's, its vocabulary."""

import math

import pytest
import torch
from conftest import make_tokenizer
from transformers import BartConfig

from doralib.checkpoints.visual_file import read_visual, write_visual
from doralib.checkpoints.vl_bart import EXTRA_TOKENS, VLBart, extend_vocabulary
from doralib.recipe import VisualSettings

TINY = {
    "vocab_size": 400,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def make_model(**visual):
    torch.manual_seed(1)
    model = VLBart(BartConfig(**TINY, visual={"features": 7, "tokens": 4, "images": 2, **visual})).eval()
    tokenizer = make_tokenizer()
    extend_vocabulary(model, tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, tokenizer


def encode_by_formula(weights, ids, mask, features, places, boxes, heads=2):
    """The encoder's states, from named float64 weights and tensors alone; one row at a time."""
    w = lambda name: weights[name].double()

    def linear(x, name):
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        spread = (centered**2).mean(-1, keepdim=True)
        return centered / torch.sqrt(spread + 1e-5) * w(f"{name}.weight") + w(f"{name}.bias")

    def attend(x, counts, name):
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        size = x.shape[1] // heads
        parts = []
        for h in range(heads):
            here = slice(h * size, (h + 1) * size)
            scores = q[:, here] @ k[:, here].T / math.sqrt(size)
            scores[:, ~counts] = -math.inf
            parts.append(torch.softmax(scores, -1) @ v[:, here])
        return linear(torch.cat(parts, -1), f"{name}.out_proj")

    boxes = boxes.double()
    table, positions = w("model.shared.weight"), w("model.encoder.embed_positions.weight")
    rows = []
    for b in range(len(ids)):
        # BART's positions begin with its third row
        words = table[ids[b]] + positions[2 : 2 + ids.shape[1]]
        words = norm(words, "model.encoder.layernorm_embedding")
        area = (boxes[b, :, 1] - boxes[b, :, 0]) * (boxes[b, :, 3] - boxes[b, :, 2])
        place = torch.cat([boxes[b], area[:, None]], -1)
        seen = norm(linear(features[b].double(), "visual_embedding.feature.0"), "visual_embedding.feature.1")
        seen = seen + norm(linear(place, "visual_embedding.position.0"), "visual_embedding.position.1")
        seen = seen + w("visual_embedding.image_order.weight")[places[b, :, 0].clamp_min(0)]
        seen = seen + torch.stack([table[-1 - max(number, 0)] for number in places[b, :, 1].tolist()])
        x, counts = torch.cat([words, seen]), torch.cat([mask[b], places[b, :, 0] + 1]).bool()
        for i in range(2):
            layer = f"model.encoder.layers.{i}"
            x = norm(x + attend(x, counts, f"{layer}.self_attn"), f"{layer}.self_attn_layer_norm")
            inner = linear(x, f"{layer}.fc1")
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x = norm(x + linear(inner, f"{layer}.fc2"), f"{layer}.final_layer_norm")
        rows.append(x)
    return torch.stack(rows)


def make_batch(seed=0):
    torch.manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 400, (2, 5)),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "features": torch.randn(2, 6, 7),
        "places": torch.tensor([[[i // 3, i % 3] for i in range(6)], [*([0, i] for i in range(3)), *[[-1, -1]] * 3]]),
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_encoder_is_the_formula(seed):
    (model, _), batch = make_model(), make_batch(seed)
    boxes = torch.rand(2, 6, 4) if seed % 2 else torch.zeros(2, 6, 4)
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    wanted = encode_by_formula(weights, *batch.values(), boxes)
    given = {**batch, "boxes": boxes} if seed % 2 else batch
    counts = torch.cat([batch["attention_mask"], batch["places"][..., 0] + 1], 1).bool()
    with torch.no_grad():
        states, mask = model.encode(**given)
        assert mask.bool().equal(counts)
        torch.testing.assert_close(states.last_hidden_state[counts].double(), wanted[counts], rtol=0, atol=2e-5)
        exact, _ = model.double().encode(**{**given, "features": batch["features"].double(), "boxes": boxes.double()})
    torch.testing.assert_close(exact.last_hidden_state[counts], wanted[counts], rtol=0, atol=1e-12)


def test_what_is_padded_changes_nothing():
    (model, _), batch = make_model(), make_batch()
    short = {name: value[1:, :3] for name, value in batch.items()}
    with torch.no_grad():
        whole, alone = model.encode(**batch)[0][0][1], model.encode(**short)[0][0][0]
    torch.testing.assert_close(whole[[0, 1, 2, 5, 6, 7]], alone)


def test_a_row_has_its_own_weight_in_the_loss():
    (model, _), batch = make_model(), make_batch()
    labels = torch.tensor([[1, 9, 2, -100], [1, 30, 31, 2]])
    with torch.no_grad():
        logits = model(**batch, labels=labels).logits
        loss = -torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        weights = torch.tensor([[0.3, 0.3, 0.3, 0.0], [0.1, 0.1, 0.1, 0.1]])
        weighed = model(**batch, labels=labels, weights=weights).loss
        mean = model(**batch, labels=labels).loss
    torch.testing.assert_close(weighed.double(), (loss * weights).sum())
    torch.testing.assert_close(mean.double(), loss[labels >= 0].mean())


def test_without_features_it_is_bart():
    model, _ = make_model()
    ids = torch.randint(3, 400, (2, 5))
    with torch.no_grad():
        plain = super(VLBart, model).forward(input_ids=ids, decoder_input_ids=ids).logits
        assert model(input_ids=ids, decoder_input_ids=ids).logits.equal(plain)


def test_beams_see_what_one_pass_sees():
    (model, _), batch = make_model(), make_batch()
    with torch.no_grad():
        states, mask = model.encode(**batch)
        given = {"encoder_outputs": states, "attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 0}
        greedy = model.generate(**given, num_beams=1, do_sample=False)
        beams = model.generate(**given, num_beams=3, do_sample=False)
        logits = model(**batch, decoder_input_ids=greedy[:, :-1]).logits
    assert beams.shape[0] == 2
    assert greedy[:, 1].equal(logits[:, 0].argmax(-1))


def test_rows_of_the_vocabulary_end_are_always_the_same():
    (first, tokenizer), (second, _) = make_model(), make_model(features=9)
    assert len(EXTRA_TOKENS) == 200
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "<vis_extra_id_0>"
    for model in (first, second):
        torch.manual_seed(len(str(model)))
        fresh = VLBart(model.config.__class__(**TINY, visual=model.config.visual))
        extend_vocabulary(fresh, make_tokenizer())
        rows = fresh.get_input_embeddings().weight[-200:]
        assert rows[0, :3].tolist() == pytest.approx([0.0352810, 0.0080031, 0.0195748], abs=1e-6)
        assert rows.std().item() == pytest.approx(0.02, rel=0.1)
        assert fresh.lm_head.weight is fresh.get_input_embeddings().weight
        assert fresh.final_logits_bias.shape[-1] == len(fresh.lm_head.weight) == 600
        before = len(rows)
        extend_vocabulary(fresh, tokenizer)
        assert len(fresh.get_input_embeddings().weight[-200:]) == before


def test_settings_beside_an_adapter(tmp_path):
    settings = VisualSettings(features=512, tokens=64)
    write_visual(tmp_path, settings)
    assert read_visual(tmp_path) == settings
    assert read_visual(tmp_path / "absent") is None
