"""Stacks of experts: each expert a DoRA of its own, on four tiny mixtures; PEFT's files; every refusal."""

import copy
import io
from pathlib import Path

import peft
import pytest
import torch
from adapted import ids, logits, move
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import doralib
from doralib.adapters import registry
from doralib.adapters.experts import find_transposed_experts
from doralib.adapters.load import load_into, read_for_model
from doralib.adapters.scan import Scan
from doralib.checkpoints.merge import Ingredient, merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.functional import merge_weight
from doralib.kernels.experts import adapted_weights
from doralib.layers.experts import AdaptedExperts, DoraExperts, Stack
from doralib.layers.linear import DoraLinear

GOLDEN = Path(__file__).parents[1] / "golden"
E, O, I, R, S = 3, 6, 5, 2, 1.5
methods = pytest.mark.parametrize("method", ["dora", "lora"])
PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


class Experts(nn.Module):
    """A mixture that multiplies with its own parameter, every expert on every row."""

    def __init__(self, is_transposed, count=E):
        super().__init__()
        self.is_transposed = is_transposed
        self.up_proj = nn.Parameter(torch.randn(count, *((I, O) if is_transposed else (O, I))))
        self.bias = nn.Parameter(torch.randn(count, O))
        with torch.no_grad():
            (self.up_proj.mT if is_transposed else self.up_proj)[1, 2] = 0

    def forward(self, x, scale=1.0):
        W = self.up_proj if self.is_transposed else self.up_proj.mT
        return scale * (x @ W + self.bias[:, None])


def make(is_transposed, dtype=torch.float64, moved=True, **changes):
    net = nn.ModuleDict({"experts": Experts(is_transposed)}).to(dtype)
    settings = {"r": R, "lora_alpha": S * R, "target_modules": (), "target_parameters": ("up_proj",)}
    doralib.adapt(net, DoraConfig(**settings | changes))
    return move(net, 0.3) if moved else net


def formula(W, A, B, m, detach):
    rows = []
    for e in range(len(W)):
        V = W[e] + S * B[e] @ A[e]
        if m is not None:
            n = V.norm(dim=1)
            n = n.detach() if detach else n
            V = torch.where(n > 0, m[e] / torch.where(n > 0, n, 1), 0)[:, None] * V
        rows.append(V)
    return torch.stack(rows)


@pytest.mark.parametrize("is_transposed", [False, True])
@methods
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_output_and_gradients_equal_the_formula(is_transposed, method, detach, seed, monkeypatch):
    monkeypatch.setattr("doralib.functional.BLOCK_ELEMENTS", 2 * O * I)  # two experts at a time, then one
    torch.manual_seed(seed)
    holder = make(is_transposed, method=method, detach_norm=detach)["experts"]
    adapter, W = holder.up_proj, Stack(holder.base_layer, "up_proj").W_EOI
    leaves = [p for p in adapter.parameters() if p.requires_grad]
    A, B, m = adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)
    y, want = holder(x), x @ formula(W, A, B, m, detach).mT + holder.base_layer.bias[:, None]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(holder(x, scale=2.0), 2 * want)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(each, [x, *leaves], dy) for each in (y, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("is_transposed", [False, True])
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(is_transposed, method, dtype):
    net = make(is_transposed, dtype, moved=False, method=method)
    holder = net["experts"]
    x = torch.randn(4, I).to(dtype)
    assert torch.equal(holder(x), holder.base_layer(x))
    weights = holder._weights()["up_proj"]
    assert torch.equal(weights, holder.base_layer.up_proj)
    assert weights.dtype == dtype
    assert weights.is_contiguous()
    assert all(p.dtype == torch.float32 for _, p in registry.trainable(net))


@pytest.mark.parametrize("is_transposed", [False, True])
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_equals_adapted(is_transposed, method, dtype):
    net = make(is_transposed, dtype, method=method)
    x = torch.randn(4, I, dtype=dtype)
    y, before = net["experts"](x), net["experts"].base_layer.up_proj.clone()
    with doralib.disabled(net):
        assert torch.equal(net["experts"](x), net["experts"].base_layer(x))
    twin = doralib.merge(copy.deepcopy(net))
    assert type(twin["experts"]) is Experts
    torch.testing.assert_close(twin["experts"](x), y)
    doralib.remove(net)
    assert type(net["experts"]) is Experts
    assert torch.equal(net["experts"].up_proj, before)
    assert all(p.requires_grad for p in net.parameters())


def test_autocast_makes_the_same_weights():
    holder = make(False, torch.float32)["experts"]
    leaves = [p for p in holder.parameters() if p.requires_grad]
    want = torch.autograd.grad(holder._weights()["up_proj"].square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        weights = holder._weights()["up_proj"]
        assert holder(torch.randn(4, I)).dtype == torch.float32  # a bfloat16 product and a float32 bias
        assert torch.equal(weights, holder._weights()["up_proj"].float())
    assert torch.equal(weights, holder._weights()["up_proj"])
    got = torch.autograd.grad(weights.square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_of_the_stack_s_size_is_kept_or_made_but_the_result():
    W = torch.randn(4, 32, 24)
    A, B = torch.randn(4, R, 24, requires_grad=True), torch.randn(4, 32, R, requires_grad=True)
    m = W.norm(dim=2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_weights(W, A, B, m, S, detach_norm=True)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (W, A, B, m)]


# whole models

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=3)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=20, shared_expert_intermediate_size=24)
    ),
    # hidden and inner sizes equal, as in the real one: down_proj is square, and stored (experts, in, out)
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES | {"intermediate_size": 32}, num_local_experts=3, head_dim=8)
    ),
}
models = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 3:
                p.normal_(std=0.2)
    model.set_experts_implementation("eager")
    return model


def config(**changes):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ("q_proj",), "target_parameters": PARAMETERS}
    return DoraConfig(**settings | changes)


@models
@methods
def test_a_step_and_generation(name, method):
    model = build(name)
    before = logits(model)
    doralib.adapt(model, config(method=method))
    assert torch.equal(logits(model), before)
    trained = dict(registry.trainable(model))
    assert sum(".experts." in n for n in trained) == 2 * 2 * (3 if method == "dora" else 2)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(3):
        loss = model(ids(), labels=ids()).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    merged = doralib.merge(copy.deepcopy(model))
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids(), **settings), merged.generate(ids(), **settings))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_every_way_of_computing_experts(name, implementation):
    model = move(doralib.adapt(build(name), config()))
    want = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    model = move(doralib.adapt(build("olmoe"), config())).train()
    trained = [p for _, p in registry.trainable(model)]
    want = torch.autograd.grad(model(ids(), labels=ids()).loss, trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = torch.autograd.grad(model(ids(), labels=ids()).loss, trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@models
@methods
def test_save_load_merge(name, method, tmp_path):
    plain = build(name)
    plain.save_pretrained(tmp_path / "base")
    settings = config(method=method, rank_pattern={r".*\.1\.mlp\.experts\.down_proj": 2})
    model = move(doralib.adapt(copy.deepcopy(plain), settings))
    want = logits(model)
    assert (want - logits(plain)).abs().max() > 1e-3
    doralib.save_adapter(model, tmp_path / "adapter")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert sum(isinstance(m, DoraExperts) for m in again.modules()) == 4
    assert torch.equal(logits(again), want)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = type(plain).from_pretrained(tmp_path / "out")
    stored.set_experts_implementation("eager")
    torch.testing.assert_close(logits(stored), want, atol=1e-5, rtol=1e-4)
    files = [load_file(tmp_path / each / "model.safetensors") for each in ("base", "out")]
    assert files[0].keys() == files[1].keys()
    load_into(move(model), registry.state_of(again))
    assert torch.equal(logits(model), want)


def save_base(plain, folder, *, apart):
    """As transformers does, which splits stacks; or a file of the model's own names."""
    if apart:
        plain.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file({n: p.contiguous() for n, p in plain.state_dict().items()}, folder / "model.safetensors")
        plain.config.save_pretrained(folder)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_several_adapters_merge_into_experts(name, apart, tmp_path):
    """W + Σ w (V - W), in float64, of two adapters of other ranks and methods; one of them changes some stacks only."""
    plain = build(name)
    save_base(plain, tmp_path / "base", apart=apart)
    given = {"one": (0.7, config(r=2)), "two": (-0.4, config(method="lora", target_parameters=("experts.down_proj",)))}
    want = {n: p.double() for n, p in plain.state_dict().items()}
    ingredients = []
    for each, (weight, settings) in given.items():
        model = move(doralib.adapt(copy.deepcopy(plain), settings))
        doralib.save_adapter(model, tmp_path / each)
        ingredients.append(Ingredient(tmp_path / each, weight))
        for n, p in doralib.merge(model.double()).state_dict().items():
            want[n] = want[n] + weight * (p - plain.state_dict()[n].double())
    merge_checkpoint(ingredients, tmp_path / "base", tmp_path / "out")
    merged = type(plain).from_pretrained(tmp_path / "out") if apart else None
    merged = merged.state_dict() if merged else load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == want.keys()
    for n, p in want.items():
        torch.testing.assert_close(merged[n].double(), p, atol=1e-5, rtol=1e-5)


@methods
def test_merging_into_stacks_stored_as_stacks(method, tmp_path):
    """A file of the model's own names, without transformers' splitting of them."""
    plain = build("olmoe")
    save_base(plain, tmp_path / "base", apart=False)
    model = move(doralib.adapt(copy.deepcopy(plain), config(method=method)))
    doralib.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    merged, want = load_file(tmp_path / "out" / "model.safetensors"), doralib.merge(model).state_dict()
    assert merged.keys() == want.keys()
    for n, p in want.items():
        torch.testing.assert_close(merged[n], p)


def test_the_axis_of_square_stacks():
    square, wide = ((3, 4, 4), (3, 4, 4)), ((3, 4, 8), (3, 8, 4))
    assert find_transposed_experts({"a": wide, "b": square}, set()) == ({"a", "b"}, [])
    assert find_transposed_experts({"a": ((3, 8, 4), (3, 8, 4)), "b": square}, set()) == (set(), [])
    assert find_transposed_experts({"b": square}, {"gpt_oss"}) == ({"b"}, [])
    assert find_transposed_experts({"b": square}, {"mixtral"}) == (set(), [])
    found, unknown = find_transposed_experts({"b": square}, set())
    assert not found
    assert "is square" in unknown[0]


# PEFT


@pytest.mark.parametrize("name", ["peft_experts", "peft_experts_transposed"])
def test_pefts_files_give_pefts_weights(name):
    (_, state), expected = read_for_model(GOLDEN / name), load_file(GOLDEN / name / "expected.safetensors")
    stacks = {n: layer for n, layer in state.layers.items() if layer.kind == "experts"}
    assert set(stacks) == {n.removeprefix("base.") for n in expected if n.startswith("base.")}
    assert {layer.rank for layer in stacks.values()} == {2, 3}
    for n, layer in stacks.items():
        base, want = (expected[f"{each}.{n}"] for each in ("base", "merged"))
        turned = name.endswith("transposed")
        merged = merge_weight(base.mT if turned else base, *layer.factors, None, layer.scale)
        torch.testing.assert_close(merged.mT if turned else merged, want)


@models
def test_peft_reads_and_computes_the_same_and_we_read_pefts(name, tmp_path):
    plain = build(name)
    settings = config(method="lora", use_rslora=True)
    model = move(doralib.adapt(copy.deepcopy(plain), settings))
    doralib.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert {type(m) for n, m in again.named_modules() if n.endswith("experts")} == {AdaptedExperts}
    torch.testing.assert_close(logits(again), logits(model))


def test_experts_alone_go_to_peft_too(tmp_path):
    plain = build("olmoe")
    settings = config(method="lora", target_modules=(), target_parameters=("experts.down_proj",))
    model = move(doralib.adapt(copy.deepcopy(plain), settings))
    assert not any(isinstance(m, DoraLinear) for m in model.modules())
    doralib.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    (tmp_path / "doralib_config.json").unlink()
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_peft_refuses_dora_of_experts_loudly(tmp_path):
    model = move(doralib.adapt(build("olmoe"), config()))
    doralib.save_adapter(model, tmp_path)
    shapes = {
        k.rpartition("experts.")[2]: tuple(v.shape) for k, v in load_file(tmp_path / TENSORS).items() if FIRST in k
    }
    assert shapes == {
        "base_layer.lora_A.weight": (9, 32),
        "base_layer.lora_B.weight": (48, 9),
        "base_layer.lora_magnitude_vector": (3, 48),
        "base_layer.lora_magnitude_vector.weight": (3, 48),
        "lora_A.weight": (9, 24),
        "lora_B.weight": (32, 9),
        "lora_magnitude_vector": (3, 32),
        "lora_magnitude_vector.weight": (3, 32),
    }
    with pytest.raises(ValueError, match="does not work with use_dora=True"):
        peft.PeftModel.from_pretrained(build("olmoe"), tmp_path)


TENSORS, FIRST = "adapter_model.safetensors", "layers.0.mlp.experts"


# refusals


def test_other_formats_refuse_experts(tmp_path):
    from doralib.checkpoints.convert import ConversionRequest, convert_adapter

    doralib.save_adapter(move(doralib.adapt(build("olmoe"), config())), tmp_path / "adapter")
    for to in ("mlx", "ai-toolkit", "fsdp-qlora", "kohya", "diffusers"):
        with pytest.raises(UsageError, match="experts"):
            convert_adapter(ConversionRequest(adapter=tmp_path / "adapter", to=to, out=tmp_path / to))
    build("olmoe").save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=r"TensorRT-LLM has no DoRA of .*experts"):
        convert_adapter(
            ConversionRequest(
                adapter=tmp_path / "adapter", to="tensorrt", out=tmp_path / "l", base=str(tmp_path / "base")
            )
        )


@pytest.mark.parametrize("apart", [False, True])
def test_the_nearest_lora_of_every_expert(apart, tmp_path):
    """At full rank the LoRA is the change itself, whether the checkpoint keeps the experts together or apart."""
    from doralib.checkpoints.convert import ConversionRequest, convert_adapter

    plain = build("olmoe")
    save_base(plain, tmp_path / "base", apart=apart)
    model = move(doralib.adapt(copy.deepcopy(plain), config()))
    doralib.save_adapter(model, tmp_path / "adapter")
    request = ConversionRequest(
        adapter=tmp_path / "adapter", to="lora", rank=64, out=tmp_path / "l", base=str(tmp_path / "base")
    )
    assert all(each.relative < 1e-5 for each in convert_adapter(request).errors)
    lora = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "l")
    assert registry.config_of(lora).method == "lora"
    assert {n for n, layer in registry.state_of(lora).layers.items() if layer.kind == "experts"}
    ours, theirs = (dict(doralib.merge(each).named_parameters()) for each in (model, lora))
    for name, p in ours.items():
        torch.testing.assert_close(theirs[name], p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_inspect_says_how_far_the_experts_moved(apart, tmp_path):
    from doralib.checkpoints.safetensors import Checkpoint
    from doralib.experiments.analyze.movement import movements

    plain = build("olmoe")
    save_base(plain, tmp_path / "base", apart=apart)
    model = move(doralib.adapt(copy.deepcopy(plain), config()))
    moved = movements(registry.state_of(model), Checkpoint.open(tmp_path / "base"))
    after, before = dict(doralib.merge(model).named_parameters()), dict(plain.named_parameters())
    stacks = [name for name in moved if "experts" in name]
    assert len(stacks) == 4
    for name in stacks:
        w, v = before[name].double().flatten(0, 1), after[name].double().flatten(0, 1)
        length = ((v.norm(dim=1) - w.norm(dim=1)).abs() / w.norm(dim=1)).mean().item()
        direction = (1 - torch.cosine_similarity(w, v)).mean().item()
        assert moved[name] == pytest.approx((length, direction), rel=1e-3)


def test_settings_are_checked():
    for changes, message in (
        ({"method": "vera"}, "not with 'vera'"),
        ({"lora_dropout": 0.1}, "target_parameters have none"),
        ({"init_lora_weights": "pissa"}, "does not go with fused_modules or target_parameters"),
    ):
        with pytest.raises(UsageError, match=message):
            config(**changes)
    with pytest.raises(UsageError, match="target_modules is empty"):
        config(target_modules=(), target_parameters=())


def test_what_cannot_be_adapted_is_refused_all_at_once():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 3, 4))

    net = nn.ModuleDict({"experts": Experts(False), "others": Silent(), "twin": Experts(False)})
    net["twin"].up_proj = net["experts"].up_proj
    settings = DoraConfig(target_modules=(), target_parameters=("up_porj", "bias", "gate_up_proj", "experts.up_proj"))
    with pytest.raises(UsageError) as problem:
        doralib.adapt(net, settings)
    text = str(problem.value)
    for line in (
        "no parameter is named 'up_porj'; this model has: up_proj",
        "experts.bias (3, 6) is no stack of weights",
        "set `is_transposed` on it",
        "experts.up_proj is tied to twin.up_proj",
    ):
        assert line in text
    assert all(p.requires_grad for p in net.parameters())
    net["others"].is_transposed = False
    doralib.adapt(net, DoraConfig(target_modules=(), target_parameters=("gate_up_proj",)))
    with pytest.raises(UsageError, match="adapted already"):
        doralib.adapt(net, DoraConfig(target_modules=(), target_parameters=("gate_up_proj",)))


def test_experts_of_a_model_with_a_tied_head(tmp_path):
    """The tie is between other weights: experts are adapted and merged, the embedding is refused as ever."""
    torch.manual_seed(1)
    plain = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"tie_word_embeddings": True}, num_experts=3)).eval()
    plain.set_experts_implementation("eager")
    with pytest.raises(UsageError, match="tied to lm_head"):
        doralib.adapt(plain, config(target_modules=("embed_tokens",)))
    plain.save_pretrained(tmp_path / "base")
    model = move(doralib.adapt(plain, config()))
    doralib.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    stored.set_experts_implementation("eager")
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    torch.testing.assert_close(logits(stored), logits(model), atol=1e-5, rtol=1e-4)


def test_modules_saved_whole_and_experts_do_not_mix():
    with pytest.raises(
        UsageError, match=r"layers\.0\.mlp is trained whole, and model\.layers\.0\.mlp\.experts\.gate_up_proj in it"
    ):
        doralib.adapt(build("olmoe"), config(modules_to_save=("mlp",)))


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    doralib.save_adapter(make(False, torch.float32), tmp_path)
    with pytest.raises(DoraError, match=r"\(3, 6, 5\) in the adapter, \(4, 6, 5\) in the model"):
        doralib.load_adapter(nn.ModuleDict({"experts": Experts(False, count=4)}), tmp_path)
    with pytest.raises(DoraError, match=r"this one has no:\n  experts.up_proj"):
        doralib.load_adapter(nn.ModuleDict({"other": Experts(False)}), tmp_path)
    model = make(True, torch.float32, moved=False)
    doralib.load_adapter(model, tmp_path)
    assert torch.equal(model["experts"].up_proj.lora_A, read_for_model(tmp_path)[1].layers["experts.up_proj"].a_RI)


def test_targets_and_inspect(tmp_path):
    from rich.console import Console

    from doralib.cli.inspect import inspect_adapter
    from doralib.cli.targets import list_targets

    def text(renderable):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(renderable)
        return console.export_text()

    plain = build("qwen2_moe")
    assert set(Scan(plain).stacks) == {f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in PARAMETERS}
    plain.save_pretrained(tmp_path / "base")
    from conftest import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "base")
    (table,) = list_targets(str(tmp_path / "base"))
    listed = text(table)
    assert "experts.gate_up_proj" in listed
    assert "3 x (40, 32)" in listed
    doralib.save_adapter(move(doralib.adapt(plain, config())), tmp_path / "adapter")
    shown = text(inspect_adapter(tmp_path / "adapter", str(tmp_path / "base")))
    assert "(3, 40, 32)" in shown
    assert "nan" not in shown
