"""Merging on disk for every layer kind and method, one adapter and several, against float64; and --verify of each."""

import copy
import math

import pytest
import torch
from adapted import move
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import doralib
from doralib import DoraConfig
from doralib.adapters import registry
from doralib.checkpoints.merge import RECORD, Ingredient, merge_checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.errors import DoraError, UsageError
from doralib.files import read_json
from doralib.formats import FORMATS
from doralib.formats.base import Hints
from doralib.formats.files import write_raw_adapter

ALPHA, R, GROUPS = 5, 3, 2
KINDS = {
    "linear": lambda: nn.Linear(6, 7),
    "conv1d of transformers": lambda: Conv1D(7, 6),
    "convolution": lambda: nn.Conv2d(4, 6, (3, 2), groups=GROUPS),
    "transposed": lambda: nn.ConvTranspose2d(4, 10, (2, 3), groups=GROUPS),
    "embedding": lambda: nn.Embedding(11, 5),
}
METHODS = {
    "dora": {},
    "lora": {"method": "lora"},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 7}},
    "magnitude alone": {"target_modules": ("other",), "magnitude_modules": ("layer",)},
    "vera": {"method": "vera", "r": 8},
    "dvora": {"method": "dvora", "r": 8},
}
SCALES = {"rslora": ALPHA / math.sqrt(R), "ranks": 7 / 2}
PAIRS = [
    (kind, method)
    for kind in KINDS
    for method in METHODS
    if method not in ("vera", "dvora") or kind in ("linear", "conv1d of transformers")
]
# what the base is stored in, and what is asked for
DTYPES = [("float32", None), ("bfloat16", None), ("float16", None), ("bfloat16", "float32")]
each_pair = pytest.mark.parametrize(("kind", "method"), PAIRS)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.other = KINDS[kind](), nn.Linear(3, 2)


def base(kind, dtype, folder):
    """A model with an adapted layer, of which one row is zero where rows are stored as rows; saved."""
    torch.manual_seed(1)
    model = Net(kind).to(getattr(torch, dtype))
    if kind in ("linear", "convolution"):
        with torch.no_grad():
            model.layer.weight[2] = 0
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    # only a known type of model tells that square weights of Conv1D are transposed; these are not square
    (folder / "config.json").write_text('{"model_type": "net"}')
    return model


def trained(model, method, seed, folder, **more):
    """An adapter that has moved from its start, saved; the adapted model."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ("layer",)} | METHODS[method] | more
    adapted = doralib.adapt(copy.deepcopy(model).float(), DoraConfig(**settings))
    move(adapted, 0.5, share=0.2, seed=seed)
    doralib.save_adapter(adapted, folder)
    return adapted


def view_as_rows(kind, weight):
    """The weight's output rows, written to be read; and how they go back."""
    if kind in ("conv1d of transformers", "embedding"):
        return weight.T, lambda V: V.T
    if kind == "transposed":
        num_in, per_group = weight.shape[0] // GROUPS, weight.shape[1]
        rows = [
            weight[group * num_in : (group + 1) * num_in, channel].flatten()
            for group in range(GROUPS)
            for channel in range(per_group)
        ]

        def back(V):
            stored = torch.empty_like(weight)
            for o, row in enumerate(V):
                group, channel = divmod(o, per_group)
                stored[group * num_in : (group + 1) * num_in, channel] = row.view(num_in, *weight.shape[2:])
            return stored

        return torch.stack(rows), back
    return weight.flatten(1), lambda V: V.view(weight.shape)


def formula(kind, method, adapted, weight):
    """The merged weight in float64, from the layer's own parameters."""
    W, back = view_as_rows(kind, weight.double())
    layer = adapted.layer
    m = layer.lora_magnitude_vector
    if method in ("vera", "dvora"):
        (O, I), bank = W.shape, layer.bank
        A, B = bank.A[:, :I].double(), bank.B[:O].double()
        V = W + torch.diag(layer.vera_lambda_b.double()) @ B @ torch.diag(layer.vera_lambda_d.double()) @ A
    elif method == "magnitude alone":
        V = W
    else:
        A, B = layer.state().a_RI.double().flatten(1), layer.state().b_OR.double().flatten(1)
        V = W + SCALES.get(method, ALPHA / R) * B @ A
    if m is not None:
        n = V.norm(dim=1)
        V = torch.where(n > 0, m.double() / torch.where(n > 0, n, 1), 0)[:, None] * V
    return back(V).detach()


def assert_rounded(got, want, dtype):
    assert got.dtype == dtype
    bound = torch.finfo(dtype).eps * want.abs() + 32 * torch.finfo(torch.float32).eps * want.abs().max()
    assert ((got.double() - want).abs() <= bound).all()


@each_pair
@pytest.mark.parametrize(("stored", "asked"), DTYPES)
def test_every_kind_and_method_is_the_formula_cast_once(tmp_path, kind, method, stored, asked):
    model = base(kind, stored, tmp_path / "base")
    adapted = trained(model, method, 3, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype=asked)
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = formula(kind, method, adapted, model.layer.weight)
    assert_rounded(got["layer.weight"], want, getattr(torch, asked or stored))
    assert (want - model.layer.weight).norm() > 0.05 * want.norm(), "the adapter does something, or nothing was tested"


@pytest.mark.parametrize(
    ("kind", "method", "dtype"), [*((*pair, "float32") for pair in PAIRS), ("linear", "dora", "bfloat16")]
)
def test_several_adapters_are_the_sum_of_their_own_changes(tmp_path, kind, method, dtype):
    """Of any two methods and ranks, with any weights; the third adapts another layer alone."""
    model = base(kind, dtype, tmp_path / "base")
    W = model.layer.weight.double().detach()
    want, ingredients = W.clone(), []
    for i, (each, weight) in enumerate([(method, 0.5), ("dora", -0.7), ("lora", 2.0)]):
        rank = {"r": R + i, "lora_alpha": ALPHA / R * (R + i)} if i else {}
        adapted = trained(model, each, i, tmp_path / str(i), **rank)
        want += weight * (formula(kind, each, adapted, model.layer.weight) - W)
        ingredients.append(Ingredient(tmp_path / str(i), weight))
    elsewhere = trained(model, "dora", 9, tmp_path / "elsewhere", target_modules=("other",))
    summary = merge_checkpoint([*ingredients, Ingredient(tmp_path / "elsewhere")], tmp_path / "base", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert_rounded(got["layer.weight"], want, getattr(torch, dtype))
    other = doralib.merge(elsewhere).other.weight
    touched = METHODS[method].get("target_modules") == ("other",)
    if not touched:
        torch.testing.assert_close(got["other.weight"], other.detach().to(getattr(torch, dtype)))
    assert (summary.layers, len(summary.adapters)) == (2, 4)
    record = read_json(tmp_path / "out" / RECORD)
    assert [(each["path"], each["weight"]) for each in record["adapters"]][:2] == [
        (str(tmp_path / "0"), 0.5),
        (str(tmp_path / "1"), -0.7),
    ]
    assert "weight -0.7" in summary.text()


def test_whole_tensors_and_biases_are_linear_changes_of_the_same_original(tmp_path):
    model = base("linear", "float32", tmp_path / "base")
    whole = {"modules_to_save": ("other",), "bias": "lora_only"}
    first = trained(model, "dora", 0, tmp_path / "first", **whole)
    second = trained(model, "lora", 1, tmp_path / "second", **whole)
    third = trained(model, "dora", 2, tmp_path / "third", target_modules=("layer", "other"))
    weights = (0.25, 1.5, 0.5)
    paths = [tmp_path / name for name in ("first", "second", "third")]
    merge_checkpoint(
        [Ingredient(path, weight) for path, weight in zip(paths, weights, strict=True)],
        tmp_path / "base",
        tmp_path / "out",
    )
    got, plain = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    states = [doralib.merge(each).state_dict() for each in (first, second, third)]
    for name, tensor in plain.items():
        change = sum(w * (state[name] - tensor) for w, state in zip(weights, states, strict=True))
        assert change.norm() > 0.1, name
        torch.testing.assert_close(got[name], tensor + change)


def test_one_adapter_may_have_a_weight_too(tmp_path):
    model = base("linear", "float32", tmp_path / "base")
    adapted = trained(model, "dora", 0, tmp_path / "adapter")
    W, V = model.layer.weight, formula("linear", "dora", adapted, model.layer.weight)
    for weight in (0.0, -1.0, 0.3):
        merge_checkpoint(
            [Ingredient(tmp_path / "adapter", weight)], tmp_path / "base", tmp_path / "out", overwrite=True
        )
        got = load_file(tmp_path / "out" / "model.safetensors")["layer.weight"]
        torch.testing.assert_close(got.double(), W + weight * (V - W), atol=1e-6, rtol=1e-6)
    same = load_file(tmp_path / "out" / "model.safetensors")["other.weight"]
    assert torch.equal(same, model.other.weight)


def test_adapters_that_do_not_fit_are_told_together(tmp_path):
    model = base("linear", "float32", tmp_path / "base")
    trained(model, "dora", 0, tmp_path / "good")
    wide = Net("linear")
    wide.layer, wide.other = nn.Linear(6, 9), nn.Linear(3, 4)
    trained(wide, "dora", 0, tmp_path / "wide", modules_to_save=("other",))
    trained(model, "lora", 0, tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    ingredients = [Ingredient(tmp_path / name) for name in ("good", "wide", "cut")]
    with pytest.raises(DoraError) as caught:
        merge_checkpoint(ingredients, tmp_path / "base", tmp_path / "out")
    text = str(caught.value)
    assert "/good" not in text
    assert "wide: the adapter does not fit the base model (3 problems)" in text
    assert "layer.weight: the adapter needs (out, in) (9, 6), the checkpoint has (7, 6)" in text
    # a vocabulary that was resized is a whole tensor of another shape
    assert "other.weight: the adapter has (4, 3), the checkpoint has (2, 3)" in text
    assert "cut: " in text
    assert "truncated" in text
    assert not (tmp_path / "out").exists()
    absent = [Ingredient(tmp_path / "nowhere"), Ingredient(tmp_path / "good", float("nan"))]
    with pytest.raises(UsageError, match=r"(?s)nowhere.*nan is no weight.*no model folder"):
        merge_checkpoint(absent, tmp_path / "no base", tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter is given"):
        merge_checkpoint([], tmp_path / "base", tmp_path / "out")


# --verify

TARGETS = ("q_proj", "v_proj", "down_proj")
LANGUAGE = {
    "dora": {},
    "lora": {"method": "lora"},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"v_proj": 2}},
    "magnitude alone": {"magnitude_modules": ("o_proj",)},
    "vera": {"method": "vera", "r": 8},
    "dvora": {"method": "dvora", "r": 8},
    "embedding": {"target_modules": ("embed_tokens", "lm_head")},
    "whole": {"modules_to_save": ("lm_head", "norm")},
}
# others of these differ from dora in more
REPEATING = ("rslora", "ranks", "dvora")


def moved(folder, out, settings, seed=0):
    model, _ = doralib.checkpoints.load.load_model(str(folder))
    doralib.adapt(model, DoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings))
    move(model, seed=seed)
    doralib.save_adapter(model, out)
    return model


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((m, "bfloat16") for m in LANGUAGE if m not in REPEATING),
        *(pytest.param(m, "bfloat16", marks=pytest.mark.long) for m in REPEATING),
        ("dora", "float32"),
        ("dvora", "float16"),
    ],
)
def test_verify_passes_what_is_right_and_nothing_else(tmp_path, tiny_llama_folder, method, dtype):
    moved(tiny_llama_folder, tmp_path / "adapter", LANGUAGE[method])
    merge_checkpoint(tmp_path / "adapter", tiny_llama_folder, tmp_path / "out", dtype=dtype)
    check = verify_merge(tmp_path / "out", tmp_path / "adapter", tiny_llama_folder)
    assert check.passed, check.text()
    assert check.effect > 0.01
    if method == "dora":
        assert not verify_merge(tiny_llama_folder, tmp_path / "adapter", tiny_llama_folder).passed


def test_verify_of_conv1d(tmp_path):
    config = GPT2Config(vocab_size=400, n_embd=24, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    moved(tmp_path / "base", tmp_path / "adapter", {"target_modules": ("c_attn", "c_proj")})
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert verify_merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "base").passed


def test_verify_of_several_adapters_in_several_formats(tmp_path, tiny_llama_folder):
    """dora as PEFT's folder, dora as MLX's, vera, and one with whole tensors; and a wrong weight does not pass."""
    settings = {"a": {}, "b": {"r": 2}, "c": LANGUAGE["dvora"], "d": LANGUAGE["whole"]}
    for seed, (name, each) in enumerate(settings.items()):
        model = moved(tiny_llama_folder, tmp_path / name, each, seed)
        if name == "b":
            content = FORMATS["mlx"].write(registry.config_of(model), registry.state_of(model), Hints())
            write_raw_adapter(content, FORMATS["mlx"], tmp_path / "mlx")
    parts = [
        Ingredient(tmp_path / name, weight) for name, weight in {"a": 0.5, "mlx": 0.7, "c": -0.25, "d": 1.0}.items()
    ]
    summary = merge_checkpoint(parts, tiny_llama_folder, tmp_path / "out", dtype="bfloat16")
    assert [each.format for each in summary.adapters] == ["peft", "mlx", "peft", "peft"]
    check = verify_merge(tmp_path / "out", parts, tiny_llama_folder)
    assert check.passed, check.text()
    wrong = [*parts[1:], Ingredient(tmp_path / "a", 0.6)]
    assert not verify_merge(tmp_path / "out", wrong, tiny_llama_folder).passed
