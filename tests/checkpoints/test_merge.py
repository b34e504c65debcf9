"""A merged checkpoint is the base, byte for byte, but for the adapted weights; and those are the formula, cast once."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from adapted import move
from safetensors import safe_open
from torch import Tensor

from doralib import functional
from doralib.checkpoints import merge
from doralib.checkpoints import safetensors as checkpoints
from doralib.checkpoints.match import match_adapter
from doralib.checkpoints.merge import RECORD, merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.files import read_json, read_tensors, write_json, write_tensors
from doralib.formats.peft import to_peft
from doralib.state import AdapterState, LayerAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_layout = pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
O, I, R, V = 7, 5, 2, 11
S = 1.5
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def layer(out: int = O, in_: int = I, rank: int = R, method: str = "dora") -> LayerAdapter:
    m_O = torch.rand(out) + 0.5 if method == "dora" else None
    return LayerAdapter(torch.randn(rank, in_), torch.randn(out, rank), m_O, S)


def save_adapter(folder: Path, state: AdapterState, **settings) -> Path:
    rank = max((adapter.rank for adapter in state.layers.values()), default=R)
    method = "dora" if any(adapter.m_O is not None for adapter in state.layers.values()) else "lora"
    config = DoraConfig(method=method, r=rank, lora_alpha=S * rank, **settings)
    tensors, peft_settings = to_peft(config, state)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", peft_settings)
    return folder


def base_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Out of alphabetical order, with other dtypes among them."""
    return {
        "model.norm.weight": torch.randn(I, dtype=dtype),
        "model.embed_tokens.weight": torch.randn(V, I).to(dtype),
        f"{Q}.weight": torch.randn(O, I).to(dtype),
        f"{Q}.bias": torch.randn(O).to(dtype),
        f"{UP}.weight": torch.randn(O + 1, I).to(dtype),
        "model.rotary.positions": torch.arange(6),
        "model.scale": torch.tensor(2.0, dtype=torch.float64),
        "lm_head.weight": torch.randn(V, I).to(dtype),
    }


def save_base(folder: Path, tensors: dict[str, Tensor], *, sharded: bool = False, **config) -> Path:
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config})
    (folder / "tokenizer.json").write_text('{"é": 1}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    (folder / "extra").mkdir()
    (folder / "extra" / "code.py").write_text("pass")
    if not sharded:
        write_tensors(folder / "model.safetensors", tensors)
        return folder
    names, cut = list(tensors), 3
    shards = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
    for file, inside in shards.items():
        write_tensors(folder / file, {name: tensors[name] for name in inside}, {"shard": file})
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in read_tensors(file).items()
    }


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@each_layout
@each_dtype
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_merge_is_the_formula_and_nothing_else_changes(tmp_path, dtype, sharded, method):
    tensors = base_tensors(DTYPES[dtype])
    base = save_base(tmp_path / "base", tensors, sharded=sharded)
    state = AdapterState({Q: layer(method=method), UP: layer(O + 1, rank=R, method=method)})
    summary = merge_checkpoint(save_adapter(tmp_path / "adapter", state), base, tmp_path / "out")
    got = stored(tmp_path / "out")
    for name, tensor in tensors.items():
        adapter = state.layers.get(name.removesuffix(".weight"))
        if adapter is None:
            same(got[name], tensor)
            continue
        W = tensor.double()
        V_OI = W + S * adapter.b_OR.double() @ adapter.a_RI.double()
        if adapter.m_O is not None:
            V_OI = adapter.m_O.double()[:, None] * V_OI / V_OI.norm(dim=1, keepdim=True)
        bound = torch.finfo(DTYPES[dtype]).eps * V_OI.abs() + 16 * torch.finfo(torch.float32).eps * V_OI.abs().max()
        assert ((got[name].double() - V_OI).abs() <= bound).all(), name
        assert got[name].dtype == tensor.dtype
    for file in sorted(base.glob("*.safetensors")):
        ours, theirs = checkpoints.read_shard(tmp_path / "out" / file.name), checkpoints.read_shard(file)
        assert ours.header() == theirs.header()
        with safe_open(tmp_path / "out" / file.name, "pt") as f:
            assert f.metadata()["format"] == "pt"
    kept = [name for name in listing(base) if name != "pytorch_model.bin"]
    assert listing(tmp_path / "out") == sorted([*kept, RECORD])
    changed = {name for name, text in content(tmp_path / "out").items() if text != content(base).get(name)} - {RECORD}
    assert changed == {checkpoints.Checkpoint.open(base).slots[f"{name}.weight"].file.name for name in state.layers}
    assert (summary.layers, summary.replaced, summary.tensors) == (2, 0, len(tensors))
    assert summary.left_out == ("pytorch_model.bin",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"], "no temporary is left"


@each_layout
@pytest.mark.parametrize("to", DTYPES)
def test_another_dtype(tmp_path, sharded, to):
    tensors = base_tensors(torch.bfloat16)
    base = save_base(
        tmp_path / "base", tensors, sharded=sharded, dtype="bfloat16", text_config={"torch_dtype": "bfloat16", "n": 1}
    )
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    merge_checkpoint(adapter, base, tmp_path / "out", dtype=to)
    merge_checkpoint(adapter, base, tmp_path / "kept")
    got, kept = stored(tmp_path / "out"), stored(tmp_path / "kept")
    assert list(checkpoints.Checkpoint.open(tmp_path / "out").slots) == list(checkpoints.Checkpoint.open(base).slots)
    for name, tensor in tensors.items():
        if to == "bfloat16" and tensor.is_floating_point():
            same(got[name], kept[name].bfloat16())
        if tensor.is_floating_point() and name != f"{Q}.weight":
            same(got[name], tensor.to(DTYPES[to]))
    assert got[f"{Q}.weight"].dtype == DTYPES[to]
    # cast once: the float32 weight rounds to the bfloat16 one
    if to == "float32":
        same(got[f"{Q}.weight"].bfloat16(), kept[f"{Q}.weight"])
        assert not torch.equal(got[f"{Q}.weight"], kept[f"{Q}.weight"].float())
    same(got["model.rotary.positions"], tensors["model.rotary.positions"])
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["dtype"], config["text_config"]) == (to, {"torch_dtype": to, "n": 1})
    if sharded:
        index = read_json(tmp_path / "out" / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())


def test_a_number_too_large_for_float16_is_an_error(tmp_path):
    tensors = base_tensors(torch.float32) | {"model.norm.weight": torch.tensor([1.0, 1e6])}
    base = save_base(tmp_path / "base", tensors)
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    with pytest.raises(DoraError, match=r"model\.norm\.weight holds 1e\+06, too large for float16"):
        merge_checkpoint(adapter, base, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_row_blocks_give_the_whole_formula_and_stay_small(tmp_path, monkeypatch):
    out, in_, rank = 203, 96, 8
    name = "model.layers.0.mlp.down_proj"
    W = torch.randn(out, in_)
    big = torch.randn(1000, in_)
    base = save_base(tmp_path / "base", {f"{name}.weight": W, "model.embed_tokens.weight": big})
    adapter = layer(out, in_, rank)
    folder = save_adapter(tmp_path / "adapter", AdapterState({name: adapter}))
    blocks = []

    def recorded(slot, rows):
        block = checkpoints.read_rows(slot, rows)
        blocks.append(block.nbytes)
        return block

    monkeypatch.setattr(sys.modules["doralib.checkpoints.stream"], "read_rows", recorded)
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 32 * in_)
    merge_checkpoint(folder, base, tmp_path / "out")
    whole = functional.merge_weight(W, adapter.a_RI, adapter.b_OR, adapter.m_O, S)
    # a CPU may add the R products and w in another order for a block than for the whole: R + 1 sums and the length
    gain_O = adapter.m_O / (W + S * adapter.b_OR @ adapter.a_RI).norm(dim=1)
    terms_OI = gain_O[:, None] * (W.abs() + S * adapter.b_OR.abs() @ adapter.a_RI.abs())
    error_OI = (stored(tmp_path / "out")[f"{name}.weight"] - whole).abs()
    assert (error_OI <= 2 * rank * torch.finfo(torch.float32).eps * terms_OI).all()
    assert max(blocks) == 32 * in_ * 4
    assert sum(blocks) == W.nbytes + big.nbytes, "each is read once, some rows at a time, and looked at for NaN"


def test_modules_to_save_and_biases_take_the_place_of_the_base_s(tmp_path):
    tensors = base_tensors(torch.bfloat16)
    base = save_base(tmp_path / "base", tensors)
    extra = {"lm_head.weight": torch.randn(V, I), f"{Q}.bias": torch.randn(O)}
    state = AdapterState({Q: layer()}, extra)
    folder = save_adapter(tmp_path / "adapter", state, modules_to_save=("lm_head",), bias="lora_only")
    summary = merge_checkpoint(folder, base, tmp_path / "out")
    got = stored(tmp_path / "out")
    for name, value in extra.items():
        same(got[name], value.bfloat16())
    same(got["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert (summary.layers, summary.replaced) == (1, 2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.", ""),
        ("", "model."),
        ("model.", "transformer."),
        ("model.language_model.", "language_model.model."),
        ("model.", "model.language_model."),
    ],
)
def test_a_prefix_spelt_differently_is_found(tmp_path, ours, theirs):
    ends = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj")]
    tensors = {f"{theirs}{end}.weight": torch.randn(O, I) for end in ends}
    base = save_base(tmp_path / "base", tensors)
    state = AdapterState({f"{ours}{end}": layer() for end in ends})
    merge_checkpoint(save_adapter(tmp_path / "adapter", state), base, tmp_path / "out")
    got = stored(tmp_path / "out")
    for end in ends:
        a = state.layers[f"{ours}{end}"]
        want = functional.merge_weight(tensors[f"{theirs}{end}.weight"], a.a_RI, a.b_OR, a.m_O, S)
        same(got[f"{theirs}{end}.weight"], want)


def test_two_places_for_a_name_are_refused(tmp_path):
    towers = ("text_model.", "vision_model.")
    base = save_base(tmp_path / "base", {f"{tower}layers.0.q_proj.weight": torch.randn(O, I) for tower in towers})
    folder = save_adapter(tmp_path / "adapter", AdapterState({"layers.0.q_proj": layer()}))
    with pytest.raises(DoraError, match=r"could be under 'text_model\.layers\.' or 'vision_model\.layers\.'"):
        merge_checkpoint(folder, base, tmp_path / "out")


def test_an_adapter_of_another_model_is_told_all_at_once(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    others = [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)]
    state = AdapterState({Q: layer(O + 3), UP: layer(O + 1, I + 1), **{name: layer() for name in others}})
    before = content(tmp_path)
    folder = save_adapter(tmp_path / "adapter", state)
    with pytest.raises(DoraError) as caught:
        merge_checkpoint(folder, base, tmp_path / "out")
    text = str(caught.value)
    assert "(4 problems)" in text
    assert f"{Q}.weight: the adapter needs (out, in) (10, 5), the checkpoint has (7, 5)" in text
    assert f"{UP}.weight: the adapter needs (out, in) (8, 6), the checkpoint has (8, 5)" in text
    assert all(f"{name}.weight: the checkpoint has no such tensor" in text for name in others)
    assert "the nearest is model.layers.0.self_attn.q_proj.weight" in text
    assert {k: v for k, v in content(tmp_path).items() if not k.startswith("adapter/")} == before


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    bad = layer()
    bad.b_OR[3, 1] = float("nan")
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: bad, UP: layer(O + 1)}))
    with pytest.raises(DoraError, match=rf"1 problem\n.*{Q}\.lora_B\.weight: 1 of 14 numbers are NaN"):
        merge_checkpoint(folder, base, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_base_whose_vocabulary_is_one_number_is_refused(tmp_path, name):
    base = save_base(tmp_path / "base", base_tensors(torch.float32) | {name: torch.tensor(0.5)})
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}, extra={}))
    with pytest.raises(DoraError, match=f"the base model is damaged: {name} is one number, and no row for each token"):
        merge_checkpoint(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("metadata", [None, 7, [], {"format": None}, {"format": {"a": "pt"}}])
def test_metadata_that_is_no_text_is_refused(tmp_path, metadata):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    file = base / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps({**json.loads(whole[8 : 8 + length]), "__metadata__": metadata}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}, extra={}))
    if metadata is None:
        # as good as none
        merge_checkpoint(adapter, base, tmp_path / "out")
        return
    with pytest.raises(DoraError, match=r"model\.safetensors has a header that is not safetensors'"):
        merge_checkpoint(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("said", [7, False, [], "nf4"])
def test_a_quantization_that_is_no_object_is_refused(tmp_path, said):
    base = save_base(tmp_path / "base", base_tensors(torch.float32), quantization_config=said)
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}, extra={}))
    with pytest.raises(DoraError, match=r"config\.json is damaged: its quantization_config is no object"):
        merge_checkpoint(adapter, base, tmp_path / "out", dtype="bfloat16")


def test_a_quantization_of_nothing_is_none(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32), quantization_config=None)
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}, extra={}))
    merge_checkpoint(adapter, base, tmp_path / "out", dtype="bfloat16")
    assert stored(tmp_path / "out")[f"{Q}.weight"].dtype == torch.bfloat16


def test_a_header_of_infinite_sizes_is_refused(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    file = base / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["lm_head.weight"]["shape"] = [float("inf"), I]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    adapter = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}, extra={}))
    with pytest.raises(DoraError, match=r"model\.safetensors has a header that is not safetensors'"):
        merge_checkpoint(adapter, base, tmp_path / "out")


def test_conv1d_by_shape_and_by_model_type(tmp_path):
    names = {"transformer.h.0.attn.c_attn": (O, I), "transformer.h.0.attn.c_proj": (I, I)}
    tensors = {f"{name}.weight": torch.randn(in_, out) for name, (out, in_) in names.items()}
    base = save_base(tmp_path / "base", tensors, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    state = AdapterState({name: layer(*sizes) for name, sizes in names.items()})
    merge_checkpoint(save_adapter(tmp_path / "adapter", state), base, tmp_path / "out")
    got = stored(tmp_path / "out")
    for name, a in state.layers.items():
        same(got[f"{name}.weight"], functional.merge_weight(tensors[f"{name}.weight"].T, a.a_RI, a.b_OR, a.m_O, S).T)


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({}, ["x.c_proj"], "may be stored.* no config.json says"),
        ({"model_type": "odd"}, ["x.c_attn", "x.c_proj"], "as x.c_attn.weight is.* model_type odd is not known"),
        ({"model_type": "llama"}, ["x.c_proj"], None),
    ],
)
def test_a_square_weight_is_never_guessed(config, names, message):
    sizes = {"x.c_attn": (O, I), "x.c_proj": (I, I)}
    slots = {f"{n}.weight": checkpoints.Slot(f"{n}.weight", "F32", sizes[n][::-1], Path(), 0, 0) for n in names}
    state = AdapterState({name: layer(*sizes[name]) for name in names})
    if message is None:
        assert not match_adapter(state, slots, config).transposed
        return
    with pytest.raises(DoraError, match=message):
        match_adapter(state, slots, config)


def test_tied_weights(tmp_path):
    tensors = base_tensors(torch.float32)
    del tensors["lm_head.weight"]
    base = save_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    head, embedding = {"lm_head.weight": torch.randn(V, I)}, {"model.embed_tokens.weight": torch.randn(V, I)}
    cases = {
        "head": (AdapterState({Q: layer(), "lm_head": layer(V)}), r"lm_head\.weight: is tied to the input embedding"),
        "saved": (AdapterState({Q: layer()}, head), r"lm_head\.weight: is tied to the input embedding"),
        "embedding": (AdapterState({Q: layer()}, embedding), r"the output head is tied to this embedding"),
    }
    for name, (state, message) in cases.items():
        folder = save_adapter(
            tmp_path / name, state, modules_to_save=("lm_head", "embed_tokens") if state.extra else ()
        )
        with pytest.raises(DoraError, match=message):
            merge_checkpoint(folder, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_weights_are_refused(tmp_path):
    tensors = base_tensors(torch.float32)
    tensors[f"{Q}.weight"] = torch.zeros(O, I, dtype=torch.int8)
    base = save_base(tmp_path / "base", tensors)
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    with pytest.raises(DoraError, match=r"stored as I8, quantized; merge into the model in full precision"):
        merge_checkpoint(folder, base, tmp_path / "out")


def test_a_storage_of_other_tensors_is_named_once(tmp_path):
    tensors = base_tensors(torch.float32)
    for name in (Q, UP):
        tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").to(torch.int32)
    base = save_base(tmp_path / "base", tensors, quantization_config={"quant_method": "gptq"})
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer(), UP: layer(O + 1)}))
    with pytest.raises(DoraError, match=r"nor 1 other: the base is quantized \(gptq\); merge .* with --base") as raised:
        merge_checkpoint(folder, base, tmp_path / "out")
    assert str(raised.value).count("no such tensor") == 1


def test_a_tied_head_of_a_quantized_base_is_told_of_untying(tmp_path):
    tensors = base_tensors(torch.float32)
    del tensors["lm_head.weight"]
    about = {"quantization_config": {"quant_method": "bitsandbytes"}, "tie_word_embeddings": True}
    base = save_base(tmp_path / "base", tensors, **about)
    folder = save_adapter(tmp_path / "adapter", AdapterState({"lm_head": layer(V)}))
    with pytest.raises(DoraError, match="merge with --untie"):
        merge_checkpoint(folder, base, tmp_path / "out")


def test_where_out_may_be(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "run", AdapterState({Q: layer()}))
    before = content(tmp_path)
    for out, message in [
        (base, "would overwrite the base"),
        (tmp_path, "would overwrite the base"),
        (base / "merged", "inside the base"),
        (folder, "would overwrite the adapter"),
    ]:
        with pytest.raises(UsageError, match=message):
            merge_checkpoint(folder, base, out, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"notes exists already; .*--overwrite"):
        merge_checkpoint(folder, base, tmp_path / "notes")
    with pytest.raises(UsageError, match=r"notes is not a model that doralib merge wrote, .*holds: thesis\.txt"):
        merge_checkpoint(folder, base, tmp_path / "notes", overwrite=True)
    assert {k: v for k, v in content(tmp_path).items() if k != "notes/thesis.txt"} == before
    merge_checkpoint(folder, base, folder / "merged")
    with pytest.raises(UsageError, match="exists already"):
        merge_checkpoint(folder, base, folder / "merged")
    (folder / "merged" / "leftover").write_text("")
    whole = content(folder / "merged")
    with pytest.raises(UsageError, match=r"doralib_merge\.json does not list: leftover; move it away"):
        merge_checkpoint(folder, base, folder / "merged", overwrite=True)
    assert content(folder / "merged") == whole
    (folder / "merged" / "leftover").unlink()
    merge_checkpoint(folder, base, folder / "merged", overwrite=True)
    # a folder that only looks like a model is somebody's
    like = save_base(tmp_path / "like", base_tensors(torch.float32))
    with pytest.raises(UsageError, match="like is not a model that doralib merge wrote"):
        merge_checkpoint(folder, base, like, overwrite=True)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("what", ["adapter", "base"])
def test_numbers_that_are_none_are_never_written(tmp_path, what, dtype):
    tensors, change = base_tensors(torch.float32), layer()
    if what == "base":
        tensors[f"{Q}.weight"][1, 0] = torch.nan
    else:
        # finite numbers, whose products are not
        for factor in change.factors:
            factor.mul_(1e30)
    base = save_base(tmp_path / "base", tensors)
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: change}))
    with pytest.raises(DoraError, match=rf"{Q}\.weight: merged, it holds NaN or infinite numbers"):
        merge_checkpoint(folder, base, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "run", AdapterState({Q: layer()}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), tmp_path / "here"):
        with pytest.raises(UsageError, match="is the current folder and cannot be replaced as a whole"):
            merge_checkpoint(folder, base, out, overwrite=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("here"))
    with pytest.raises(UsageError, match="where something is mounted"):
        merge_checkpoint(folder, base, tmp_path / "here", overwrite=True)


def test_links_out_of_a_base_are_not_taken_along(tmp_path):
    store = save_base(tmp_path / "store", base_tensors(torch.float32))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("private")
    folder = save_adapter(tmp_path / "run", AdapterState({Q: layer()}))
    (store / "vocab.txt").write_text("words")
    base = tmp_path / "linked"
    base.mkdir()
    # as in the hub's cache: all of it lies in one other folder
    for file in store.iterdir():
        (base / file.name).symlink_to(file)
    (base / "note.txt").symlink_to(tmp_path / "secret" / "key.txt")
    (base / "more").symlink_to(tmp_path / "secret")
    done = merge_checkpoint(folder, base, tmp_path / "out")
    assert {"note.txt"} <= set(done.left_out)
    assert not any("private" in text for text in map(str, content(tmp_path / "out").values()))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoraError, "disk is full: writing .*out needs"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("broken"), RuntimeError, "broken"),
    ],
    ids=["full disk", "Ctrl-C", "fault"],
)
@pytest.mark.parametrize(("place", "call"), [(merge, "write_at"), (os, "copy_file_range")], ids=["write", "copy"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_merge_that_fails_leaves_nothing_and_loses_nothing(
    tmp_path, monkeypatch, error, raised, message, place, call, exists
):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer(), UP: layer(O + 1)}))
    if exists:
        merge_checkpoint(folder, base, tmp_path / "out")
    before = content(tmp_path)
    real, calls = getattr(place, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(place, call, failing)
    with pytest.raises(raised, match=message):
        merge_checkpoint(folder, base, tmp_path / "out", overwrite=True)
    assert content(tmp_path) == before


def test_where_the_kernel_cannot_copy(tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    merge_checkpoint(folder, base, tmp_path / "one")
    monkeypatch.setattr(os, "copy_file_range", cannot)
    merge_checkpoint(folder, base, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_progress_ends_at_the_whole(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    seen = []
    threads = torch.get_num_threads()
    summary = merge_checkpoint(folder, base, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (summary.bytes, summary.bytes)
    assert torch.get_num_threads() == threads


def test_bad_requests(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(torch.float32))
    folder = save_adapter(tmp_path / "adapter", AdapterState({Q: layer()}))
    with pytest.raises(UsageError, match=r"'bfloat61' is no dtype .*did you mean 'bfloat16'"):
        merge_checkpoint(folder, base, tmp_path / "out", dtype="bfloat61")
    with pytest.raises(UsageError, match="no model folder"):
        merge_checkpoint(folder, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UsageError, match=r"base holds no adapter"):
        merge_checkpoint(base, base, tmp_path / "out")
    cut = base / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(DoraError, match="5 are missing"):
        merge_checkpoint(folder, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def logits(folder_or_model, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def tiny(kind: str):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@each_layout
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ("q_proj", "v_proj", "down_proj", "lm_head")), ("gpt2", ("c_attn", "c_proj", "c_fc"))],
)
def test_plain_transformers_gives_the_adapted_model_s_logits(tmp_path, kind, targets, sharded):
    from doralib.adapters.adapt import adapt
    from doralib.adapters.save import save_adapter

    model = tiny(kind)
    ids = torch.randint(0, 50, (2, 9))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB" if sharded else "1GB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or not sharded
    plain = logits(model, ids)
    adapt(model, DoraConfig(r=4, lora_alpha=8, target_modules=targets))
    move(model)
    adapted = logits(model, ids)
    assert (adapted - plain).abs().max() > 0.01, "the adapter must matter for the comparison to say anything"
    save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(
        logits(tmp_path / "out", ids), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max().item()
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks transformers 5.23
def test_an_adapter_written_by_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    ids = torch.randint(0, 50, (2, 9))
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    want = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", ids), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
