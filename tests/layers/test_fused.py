"""Fused projections: parts adapted as if they were layers of their own, the other rows untouched, PEFT's files."""

import copy

import peft
import pytest
import torch
from adapted import logits, move
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.pytorch_utils import Conv1D

import doralib
from doralib.adapters import registry
from doralib.adapters.save_load import load_into
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig, FusedParts
from doralib.errors import DoraError, UsageError
from doralib.functional import merge_weight, row_norm_sq
from doralib.layers.base.registry import open_base
from doralib.layers.factors.fused import FusedFactors, adapted_rows
from doralib.layers.linear import DoraLinear

I, R, S = 7, 2, 1.5
LAYOUTS = {
    "equal": ({"parts": ("q", "k", "v"), "adapt": ("q", "v")}, 12),
    "grouped": ({"parts": {"q": 3, "k": 1, "v": 1}, "adapt": ("q", "k")}, 10),
    "by head": ({"parts": ("q", "k", "v"), "adapt": ("v", "q"), "repeats": 2}, 18),
    "all": ({"parts": {"gate": 1, "up": 2}, "adapt": ("gate", "up")}, 9),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
methods = pytest.mark.parametrize("method", ["dora", "lora"])


def make(layout, dtype=torch.float64, base="linear", moved=True, bias=True, r=R, **changes):
    settings, O = LAYOUTS[layout]
    parts = FusedParts(**settings)
    if base == "linear":
        module = nn.Linear(I, O, bias=bias)
    elif base == "conv1d":
        module = Conv1D(O, I)
        nn.init.normal_(module.bias)
    else:

        class Hidden(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 1

        module = Hidden(I, O, bias=bias)
    with torch.no_grad():
        (module.weight.T if base == "conv1d" else module.weight)[0] = 0
    base = open_base(module.to(dtype))
    layer = DoraLinear(module, r, S, DoraConfig(r=r, **changes), base, FusedFactors(base, parts))
    return move(layer, 0.3) if moved else layer


def test_rows_of_the_layouts():
    def rows(layout):
        settings, O = LAYOUTS[layout]
        return [index.tolist() for index in adapted_rows(FusedParts(**settings), O)]

    assert rows("equal") == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert rows("grouped") == [[0, 1, 2, 3, 4, 5], [6, 7]]
    # GPT-NeoX: the rows of a head are its q, its k, its v
    assert rows("by head") == [[0, 1, 2, 9, 10, 11], [6, 7, 8, 15, 16, 17]]
    assert rows("all") == [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    with pytest.raises(DoraError, match=r"10 rows are not 2 times q 1, k 1, v 1 in equal units"):
        adapted_rows(FusedParts(parts=("q", "k", "v"), adapt=("q",), repeats=2), 10)


def is_fused(module):
    return isinstance(module, DoraLinear) and isinstance(module.factors, FusedFactors)


def separate(layer, detach):
    """A DoraLinear for each adapted part, with the same values and leaves of its own."""
    W, bias = layer.base.W_OI.detach(), layer.base.bias
    config = DoraConfig(r=R, method="lora" if layer.lora_magnitude_vector is None else "dora", detach_norm=detach)
    start, alone = 0, []
    for p, rows in enumerate(layer.values().rows):
        module = nn.Linear(I, len(rows), bias=bias is not None).to(W.dtype)
        with torch.no_grad():
            module.weight.copy_(W[rows])
            if bias is not None:
                module.bias.copy_(bias[rows])
        one = DoraLinear(module, R, S, config)
        with torch.no_grad():
            one.lora_A.copy_(layer.lora_A[p * R : (p + 1) * R])
            one.lora_B.copy_(layer.lora_fused_B[start : start + len(rows)])
            if one.lora_magnitude_vector is not None:
                one.lora_magnitude_vector.copy_(layer.lora_magnitude_vector[start : start + len(rows)])
        start += len(rows)
        alone.append(one)
    return alone


@layouts
@methods
@pytest.mark.parametrize("base", ["linear", "conv1d", "opaque"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_equals_separate_layers_in_output_and_every_gradient(layout, method, base, detach, seed):
    torch.manual_seed(seed)
    layer = make(layout, base="linear" if base == "opaque" else base, method=method, detach_norm=detach)
    alone = separate(layer, detach)
    if base == "opaque":
        values = copy.deepcopy(layer.state())
        hidden = make(layout, base="opaque", method=method, detach_norm=detach, moved=False)
        hidden.base_layer.load_state_dict(layer.base_layer.state_dict())
        layer = hidden
        with torch.no_grad():
            for key, tensor in layer.state().tensors().items():
                tensor.copy_(values.tensors()[key])
    x = torch.randn(3, 5, I, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    want = layer.base_layer(x)
    for rows, one in zip(layer.values().rows, alone, strict=True):
        want = want.index_copy(2, rows, one(x))
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    leaves = [p for p in (layer.lora_A, layer.lora_fused_B, layer.lora_magnitude_vector) if p is not None]
    ours = torch.autograd.grad(y, [x, *leaves], dy)
    theirs = torch.autograd.grad(want, [x, *(p for one in alone for p in one.parameters() if p.requires_grad)], dy)
    count = len(leaves)
    torch.testing.assert_close(ours[0], theirs[0])
    for i in range(count):
        torch.testing.assert_close(ours[1 + i], torch.cat(theirs[1 + i :: count]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)


@layouts
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [R, 30])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(layout, method, dtype, r):
    layer = make(layout, dtype, moved=False, method=method, r=r)
    for num_rows in (4, 3000):  # many rows are multiplied with a weight that is formed
        x = torch.randn(num_rows, I).to(dtype)
        assert torch.equal(layer(x), layer.base_layer(x))
        with torch.no_grad():
            assert torch.equal(layer(x), layer.base_layer(x))


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["adapter", "exact"])
@pytest.mark.parametrize("layout", ["equal", "grouped", "by head"])
def test_rows_of_the_other_parts_keep_the_base_numbers(layout, method, dtype, mode):
    layer = make(layout, dtype, method=method, lora_dropout=0.3, dropout_mode=mode)
    others = [row for row in range(layer.out_features) if row not in layer.rows]
    for num_rows in (4, 3000):
        x = torch.randn(num_rows, I).to(dtype)
        layer.train()
        assert torch.equal(layer(x)[:, others], layer.base_layer(x)[:, others])
        layer.eval()
        with torch.no_grad():
            assert torch.equal(layer(x)[:, others], layer.base_layer(x)[:, others])
    assert torch.equal(layer.merged().weight[others], layer.base_layer.weight[others])
    layer.train()(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_rows_that_an_adapter_does_not_change_merge_bit_for_bit():
    """Long rows, whose lengths two sums round differently; and a length that did change is applied."""
    W = torch.randn(40, 14336)
    m = row_norm_sq(W).sqrt()
    b = torch.zeros(40, 2)
    b[:10] = 0.1
    m[10] *= 1 + 1e-5
    merged = merge_weight(W, torch.randn(2, 14336), b, m, 1.0)
    assert torch.equal(merged[11:], W[11:])
    assert not torch.equal(merged[10], W[10])


@layouts
@methods
@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_equals_adapted(layout, method, base, dtype):
    layer = make(layout, dtype, base, method=method)
    x = torch.randn(5, I, dtype=dtype)
    torch.testing.assert_close(layer.merged()(x), layer(x))
    state = layer.state()
    whole = merge_weight(layer.base.W_OI, state.a_RI, state.b_OR, state.m_O, state.scale)
    torch.testing.assert_close(whole, layer.merged_weight())


@methods
def test_evaluation_sees_every_change(method):
    layer = make("by head", torch.float32, method=method)
    x = torch.randn(3, I)
    for _ in range(3):
        want = layer.base_layer(x)
        for rows, one in zip(layer.values().rows, separate(layer, detach=True), strict=True):
            want = want.index_copy(1, rows, one(x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer(x), want)
        for p in layer.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("detach", [True, False])
def test_a_compiler_sees_through_it(detach):
    layer = make("grouped", torch.float32, detach_norm=detach)
    x = torch.randn(3, I)
    dy = torch.randn_like(layer(x))
    leaves = [p for p in layer.parameters() if p.requires_grad]
    want = torch.autograd.grad(layer(x), leaves, dy)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), want, strict=True):
        torch.testing.assert_close(ours, theirs)


# whole models

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )


def neox():
    settings = SIZES | {"intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


def phi3():
    return Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False))


QV = ("q", "v")
MODELS = {
    "gpt2": (gpt2, ("c_attn", "c_fc"), {"c_attn": {"parts": ("q", "k", "v"), "adapt": QV}}),
    "neox": (
        neox,
        ("query_key_value",),
        {"query_key_value": {"parts": ("q", "k", "v"), "adapt": QV, "repeats": 4}},
    ),
    "phi3": (
        phi3,
        ("qkv_proj", "gate_up_proj"),
        {
            "qkv_proj": {"parts": {"q": 4, "k": 2, "v": 2}, "adapt": QV},
            "gate_up_proj": {"parts": ("gate", "up"), "adapt": ("up",)},
        },
    ),
}


def build(name):
    torch.manual_seed(1)
    return MODELS[name][0]().eval()


def config(name, **changes):
    _, targets, fused = MODELS[name]
    return DoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, "fused_modules": fused} | changes)


@pytest.mark.parametrize("name", MODELS)
@methods
@pytest.mark.parametrize("rslora", [False, True])
def test_models_save_load_merge_and_peft_computes_the_same(name, method, rslora, tmp_path):
    plain = build(name)
    plain.save_pretrained(tmp_path / "base")
    settings = config(name, method=method, use_rslora=rslora, rank_pattern={r".*\.1\..*": 2})
    model = doralib.adapt(copy.deepcopy(plain), settings)
    assert torch.equal(logits(model), logits(plain))
    fused = {n: m for n, m in model.named_modules() if is_fused(m)}
    assert len(fused) == 2 * len(settings.fused_modules)
    doralib.save_adapter(move(model), tmp_path / "adapter")
    assert (logits(model) - logits(plain)).abs().max() > 1e-3
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert all(is_fused(again.get_submodule(n)) for n in fused)
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = type(plain).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stored), logits(model), atol=1e-5, rtol=1e-4)
    for n, layer in fused.items():
        others = [row for row in range(layer.out_features) if row not in layer.rows]
        rows = [m.get_submodule(n).weight.T if name == "gpt2" else m.get_submodule(n).weight for m in (stored, plain)]
        assert torch.equal(rows[0][others], rows[1][others])
        assert not torch.equal(rows[0], rows[1])
    # without our own settings it is one layer of all the ranks, with the same numbers
    (tmp_path / "adapter" / "doralib_config.json").unlink()
    bare = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert not any(is_fused(m) for m in bare.modules())
    torch.testing.assert_close(logits(bare), logits(model), atol=1e-5, rtol=1e-4)
    with doralib.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(doralib.merge(copy.deepcopy(model))), logits(bare), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(doralib.remove(model)), logits(plain))


def test_a_whole_adapter_does_not_load_into_parts():
    whole = config("gpt2", fused_modules={}, r=6)
    given = registry.state_of(move(doralib.adapt(build("gpt2"), whole)))
    model = doralib.adapt(build("gpt2"), config("gpt2", rank_pattern={"c_fc": 6}))
    with pytest.raises(DoraError, match="changes more than the parts q, v"):
        load_into(model, given)


def test_fused_modules_are_checked():
    with pytest.raises(UsageError, match=r"(?s)there is no part 'w'.*"):
        FusedParts(parts=("q", "k"), adapt=("w",))
    for wrong, message in (
        ({"parts": ("q",), "adapt": ("q",)}, "two parts at least"),
        ({"parts": ("q", "q", "k"), "adapt": ("q",)}, "a name twice"),
        ({"parts": ("q", "k"), "adapt": ("q", "q")}, "a part twice"),
        ({"parts": {"q": 0, "k": 1}, "adapt": ("q",)}, "greater than or equal to 1"),
        ({"parts": ("q", "k"), "adapt": ()}, "adapt"),
    ):
        with pytest.raises(UsageError, match=message):
            DoraConfig(fused_modules={"c_attn": wrong})
    with pytest.raises(UsageError, match="not with 'vera'"):
        config("gpt2", method="vera")
    odd = {"c_attn": {"parts": ("a", "b", "c", "d", "e"), "adapt": ("a",)}}
    typo = {"c_atn": MODELS["gpt2"][2]["c_attn"]}
    with pytest.raises(UsageError, match=r"(?s)96 rows are not a 1, b 1.*'c_atn' names no layer") as problem:
        doralib.adapt(model := build("gpt2"), config("gpt2", fused_modules=odd | typo))
    assert problem.value.args[0].count("96 rows") == 2
    assert all(p.requires_grad for p in model.parameters())


def test_tied_projections_are_refused():
    model = build("gpt2")
    model.transformer.h[1].attn.c_attn.weight = model.transformer.h[0].attn.c_attn.weight
    with pytest.raises(UsageError, match=r"h\.0\.attn\.c_attn is tied to transformer\.h\.1\.attn\.c_attn"):
        doralib.adapt(model, config("gpt2"))


def test_convert_takes_them_as_one_layer(tmp_path):
    from doralib.checkpoints.convert import ConversionRequest, convert_adapter
    from doralib.formats.base import Hints
    from doralib.formats.files import read_any_format

    model = move(doralib.adapt(build("phi3"), config("phi3", target_modules=("qkv_proj",), fused_modules=QKV)))
    doralib.save_adapter(model, tmp_path / "adapter")
    convert_adapter(ConversionRequest(adapter=tmp_path / "adapter", to="mlx", out=tmp_path / "mlx"))
    got = read_any_format(tmp_path / "mlx", Hints())[1].state.layers
    for name, layer in registry.state_of(model).layers.items():
        assert got[name].rank == 6
        torch.testing.assert_close(
            got[name].scale * got[name].b_OR @ got[name].a_RI, layer.scale * layer.b_OR @ layer.a_RI
        )
        torch.testing.assert_close(got[name].m_O, layer.m_O)


QKV = {"qkv_proj": MODELS["phi3"][2]["qkv_proj"]}
