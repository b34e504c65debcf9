"""Packed rows: the same loss and gradients as the rows alone, and every row in one sequence, whole."""

import datasets
import pytest
import torch
from conftest import make_llama
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from doralib.data.batches import Collator
from doralib.data.isolation import choose_layout
from doralib.data.packing import fill_bins, is_packed, pack_rows
from doralib.data.prepare import IGNORED
from doralib.errors import UsageError
from doralib.recipe import DataSettings
from doralib.training.loss import LabelLoss

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
DROPOUTS = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0}
MODELS = {
    "llama": lambda: make_llama(vocab_size=64),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **DROPOUTS)),
    # rows are longer than its window
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)),
    # these heed no positions, and get a mask
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES)),
}


def make_rows(lengths, seed=0):
    """Rows whose first third is not learned, each with a label at its first token too, which must not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    labels = [[row[0], *[IGNORED] * (len(row) // 3), *row[len(row) // 3 + 1 :]] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": list(lengths)})


def make_model(kind, implementation):
    torch.manual_seed(0)
    model = MODELS[kind]().double().train()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # so that what a row sees of another matters
    return model


def find_loss(model, batches):
    """The mean over the labels of all batches and its gradients, as the trainer has them."""
    model.zero_grad()
    measure = LabelLoss(model)
    plain = [{name: value for name, value in batch.items() if name != "num_tokens"} for batch in batches]
    totals, counts = zip(*(measure(model, batch) for batch in plain), strict=True)
    loss = sum(totals) / sum(counts)
    loss.backward()
    measure.remove()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def each_alone(rows):
    """A batch for each row, without padding."""
    return [Collator(0, multiple=1)([row]) for row in rows]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_alone(kind, implementation):
    model, rows = make_model(kind, implementation), make_rows([9, 3, 14, 2, 7, 20, 5, 6])
    packed = pack_rows(rows, 22)
    assert len(packed) == 4
    collate = choose_layout(model, Collator(0))
    assert (collate.block_mask is not None) == (kind in ("opt", "falcon"))
    loss, gradients = find_loss(model, [collate(list(packed))])
    expected, theirs = find_loss(model, each_alone(rows))
    # norms, rotations and the loss itself are float32 in every model, whatever its dtype
    assert torch.isclose(loss, expected, rtol=1e-6)
    assert gradients.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-5, atol=1e-6 * largest), name


def test_the_test_would_see_a_leak():
    """Without positions of their own the rows see one another, and the loss is another."""
    model, rows = make_model("llama", "sdpa"), make_rows([9, 3, 14, 2, 7, 20, 5, 6])
    batch = choose_layout(model, Collator(0))(list(pack_rows(rows, 22)))
    del batch["position_ids"]
    assert not torch.isclose(find_loss(model, [batch])[0], find_loss(model, each_alone(rows))[0], rtol=1e-4)


def test_one_long_sequence_is_the_same():
    """What flash attention needs, tried with sdpa, which heeds positions in the same way."""
    model, rows = make_model("llama", "sdpa"), make_rows([9, 3, 14, 2, 7])
    batch = Collator(0, flat=True)(list(pack_rows(rows, 22)))
    assert batch["input_ids"].shape == (1, 35)
    assert torch.isclose(find_loss(model, [batch])[0], find_loss(model, each_alone(rows))[0], rtol=1e-6)


def test_a_recurrent_model_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UsageError, match=r"data.packing: MambaForCausalLM cannot keep packed rows apart: the logits"):
        choose_layout(model, Collator(0))


def test_a_window_is_not_given_up_for_a_mask():
    """A mask of ours would show a token more than the model's window, which no short trial could tell."""
    model = make_model("opt", "sdpa")
    model.config.sliding_window = 4
    with pytest.raises(UsageError, match="cannot keep packed rows apart"):
        choose_layout(model, Collator(0))


def test_every_row_is_there_once_and_whole():
    lengths = [(7 * i) % 30 + 2 for i in range(2500)]
    rows = make_rows(lengths)
    packed = pack_rows(rows, 64)
    assert sum(packed["length"][:]) == sum(lengths)
    assert max(packed["length"][:]) <= 64
    found = []
    for sequence in packed:
        assert sum(sequence["lengths"]) == sequence["length"] == len(sequence["input_ids"])
        start = 0
        for length in sequence["lengths"]:
            assert sequence["labels"][start] == IGNORED
            found.append(
                (sequence["input_ids"][start : start + length], sequence["labels"][start + 1 : start + length])
            )
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"][1:]) for row in rows)
    assert len(packed) * 64 < 1.02 * sum(lengths)


def test_bins_keep_the_order_of_the_file_inside():
    assert fill_bins([4, 5, 6, 10, 1], 10) == [[0, 2], [1, 4], [3]]
    assert fill_bins([3], 10) == [[0]]


def test_batches_count_tokens_and_not_padding():
    rows = pack_rows(make_rows([9, 3, 5]), 12)
    batch = Collator(7)(list(rows))
    assert int(batch["num_tokens"]) == 17
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["position_ids"][0].tolist() == [*range(9), *range(3), *range(4)]
    assert "attention_mask" not in batch


def test_packing_follows_the_style():
    settings = DataSettings(train="t", target="text")
    assert not is_packed(settings)
    assert is_packed(settings.model_copy(update={"style": "text"}))
    assert is_packed(settings.model_copy(update={"packing": True}))
    assert not is_packed(settings.model_copy(update={"style": "text", "packing": False}))
