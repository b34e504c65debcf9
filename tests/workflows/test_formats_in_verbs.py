"""A file of any format goes into merge, inspect, generate, eval and load_adapter as ours does."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from adapted import move
from conftest import make_llama

import doralib
from doralib import DoraConfig
from doralib.adapters import registry
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.safetensors import Checkpoint
from doralib.config import DoraConfig as Config
from doralib.errors import DoraError, Note, UsageError
from doralib.files import read_json, read_tensors, write_json, write_tensors
from doralib.formats import FORMATS
from doralib.formats.base import Hints
from doralib.formats.files import read_any_format, write_raw_adapter
from doralib.formats.tensors import make_config
from doralib.state import AdapterState, LayerAdapter

TARGETS = ("q_proj", "k_proj", "up_proj")
ALPHA, R = 6, 3
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(**changes):
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | changes
    return move(doralib.adapt(make_llama(), DoraConfig(**settings)), 0.2, share=0.3, seed=0)


def nvlabs(model, folder, field="Wdecompose_target_modules", **changes):
    """What the paper's code saves, from its description alone (PEERS 5c): a pickle of tensors, magnitudes (out, 1)."""
    tensors = {}
    for name, layer in registry.state_of(model).layers.items():
        prefix = f"base_model.model.{name}."
        if not layer.magnitude_alone:
            tensors |= {f"{prefix}lora_A.weight": layer.a_RI, f"{prefix}lora_B.weight": layer.b_OR}
        tensors[f"{prefix}weight_m_wdecomp.weight"] = layer.m_O[:, None]
    folder.mkdir()
    torch.save({name: t.clone() for name, t in tensors.items()}, folder / "adapter_model.bin")
    config = registry.config_of(model)
    settings = {
        "peft_type": "DORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.05,
        "target_modules": list(config.target_modules),
        "dora_simple": True,
        field: list(config.magnitude_modules) or None,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
        "modules_to_save": None,
    }
    write_json(folder / "adapter_config.json", settings | changes)


def written(model, name, folder, base):
    """The model's adapter in a format, where a user would have it; what names the adapter."""
    if name == "nvlabs":
        nvlabs(model, folder)
        return folder
    known = Hints(shapes={n: s.shape for n, s in _modules(base).items()}, config=read_json(base / "config.json"))
    content = FORMATS[name].write(registry.config_of(model), registry.state_of(model), known)
    return write_raw_adapter(content, FORMATS[name], folder)


def _modules(base):
    slots = Checkpoint.open(base).slots.items()
    return {name.removesuffix(".weight"): slot for name, slot in slots if len(slot.shape) > 1}


LANGUAGE = ["peft", "nvlabs", "kohya", "ai-toolkit", "mlx", "torchtune", "fsdp-qlora"]


@pytest.mark.parametrize("name", [*LANGUAGE[:-1], pytest.param("fsdp-qlora", marks=pytest.mark.long)])
def test_every_verb_reads_it(name, tmp_path, tiny_llama_folder, run):
    model = adapted()
    want = model(IDS).logits
    file = written(model, name, tmp_path / "adapter", tiny_llama_folder)
    base = ("--base", tiny_llama_folder)
    status, out, err = run("merge", file, *base, "--out", tmp_path / "merged", "--verify")
    assert status == 0, err
    assert "answers as the adapted one" in out
    torch.testing.assert_close(load_model(str(tmp_path / "merged"))[0](IDS).logits, want, atol=1e-5, rtol=1e-4)
    got, _ = load_model(str(file), base=str(tiny_llama_folder))
    torch.testing.assert_close(got(IDS).logits, want, atol=1e-5, rtol=1e-4)
    status, out, err = run("inspect", file, *base)
    assert status == 0, err
    assert f"({name})" in out
    assert "dora, 6 layers" in out
    status, out, err = run("generate", file, *base, "--prompt", "a film", "--max-new-tokens", 2)
    assert status == 0, err


def test_every_verb_takes_the_alpha_that_a_file_forgets(tmp_path, tiny_llama_folder, run):
    model = adapted()
    file = written(model, "torchtune", tmp_path / "adapter", tiny_llama_folder)
    (file.parent / "adapter_config.json").unlink()
    base = ("--base", tiny_llama_folder)
    for verb, options in {
        "merge": ("--out", tmp_path / "out", "--verify"),
        "inspect": (),
        "generate": ("--prompt", "a film", "--max-new-tokens", 2),
    }.items():
        status, _, err = run(verb, file, *base, *options)
        assert status == 2
        assert "give --alpha" in err
        status, _, err = run(verb, file, *base, *options, "--alpha", ALPHA)
        assert status == 0, err
    torch.testing.assert_close(
        load_model(str(tmp_path / "out"))[0](IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4
    )


def test_eval_reads_an_mlx_folder(tmp_path, tiny_llama_folder, run):
    file = written(adapted(), "mlx", tmp_path / "mlx", tiny_llama_folder).parent
    (tmp_path / "rows.jsonl").write_text('{"text": "a film", "label": "good"}\n{"text": "a dull", "label": "bad"}\n')
    task = tmp_path / "task.yaml"
    task.write_text(
        json.dumps(
            {
                "kind": "classification",
                "data": "rows.jsonl",
                "prompt": "{text}",
                "labels": {"good": " good", "bad": " bad"},
                "answer": "label",
            }
        )
    )
    scores = {}
    for what in (file, tmp_path / "ours"):
        if what.name == "ours":
            doralib.save_adapter(adapted(), what)
        status, _, err = run("eval", what, "--base", tiny_llama_folder, "--tasks", task, "--out", tmp_path / "r.json")
        assert status == 0, err
        scores[what.name] = read_json(tmp_path / "r.json")["after"]["task"] | {"seconds": 0}
    assert scores["mlx"] == scores["ours"]


def test_only_headers_of_the_base_are_read_for_names(tmp_path, tiny_llama_folder, monkeypatch):
    """The merge still streams: names and shapes come without one weight, and each weight is read once."""
    file = written(adapted(), "kohya", tmp_path / "adapter", tiny_llama_folder)
    read, real = [], sys.modules["doralib.checkpoints.stream"].read_rows

    def recorded(slot, rows):
        read.append(slot.name)
        return real(slot, rows)

    monkeypatch.setattr(sys.modules["doralib.checkpoints.stream"], "read_rows", recorded)
    merge_checkpoint(file, tiny_llama_folder, tmp_path / "out")
    assert len(read) == len(set(read))
    assert set(read) >= {f"{name}.weight" for name in registry.state_of(adapted()).layers}


# NVlabs' modules of magnitude alone

QKV = ("q_proj", "k_proj", "v_proj")


def granular(**changes):
    return adapted(target_modules=QKV, magnitude_modules=("o_proj", "up_proj"), **changes)


@pytest.mark.parametrize("field", ["Wdecompose_target_modules", "wdecompose_target_modules"])
def test_modules_of_magnitude_alone(field, tmp_path, tiny_llama_folder):
    model = granular()
    nvlabs(model, tmp_path / "nv", field)
    merge_checkpoint(tmp_path / "nv", tiny_llama_folder, tmp_path / "out")
    want = model(IDS).logits
    got, _ = load_model(str(tmp_path / "out"))
    torch.testing.assert_close(got(IDS).logits, want, atol=1e-5, rtol=1e-4)
    loaded, _ = load_model(str(tmp_path / "nv"), base=str(tiny_llama_folder))
    torch.testing.assert_close(loaded(IDS).logits, want, atol=1e-5, rtol=1e-4)
    assert isinstance(loaded.model.layers[0].self_attn.o_proj, doralib.layers.magnitude.DoraMagnitude)
    config = registry.config_of(loaded)
    assert (config.magnitude_modules, config.r, config.dropout_mode) == (("o_proj", "up_proj"), R, "exact")
    trained = {name.rpartition(".")[2] for name, p in registry.trainable(loaded) if "o_proj" in name}
    assert trained == {"lora_magnitude_vector"}
    doralib.save_adapter(loaded, tmp_path / "ours")
    again = doralib.load_adapter(make_llama(), tmp_path / "ours")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert isinstance(again.model.layers[1].mlp.up_proj, doralib.layers.magnitude.DoraMagnitude)


def test_magnitudes_alone_without_settings_of_them_go_by_whole_names(tmp_path, tiny_llama_folder):
    model = granular()
    nvlabs(model, tmp_path / "nv", Wdecompose_target_modules=None)
    loaded, _ = load_model(str(tmp_path / "nv"), base=str(tiny_llama_folder))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    assert "model.layers.0.self_attn.o_proj" in registry.config_of(loaded).magnitude_modules


def test_magnitudes_alone_need_the_base_and_fit_it(tmp_path, tiny_llama_folder):
    nvlabs(granular(), tmp_path / "nv")
    with pytest.raises(DoraError, match=r"(?s)4 problems.*o_proj: is magnitude-only.*--base MODEL"):
        read_any_format(tmp_path / "nv", Hints())
    tensors = torch.load(tmp_path / "nv" / "adapter_model.bin", weights_only=True)
    prefix = "base_model.model.model.layers.0."
    tensors[f"{prefix}mlp.up_proj.weight_m_wdecomp.weight"] = torch.ones(47, 1)
    tensors[f"{prefix}mlp.upp_proj.weight_m_wdecomp.weight"] = torch.ones(48, 1)
    torch.save(tensors, tmp_path / "nv" / "adapter_model.bin")
    settings = read_json(tmp_path / "nv" / "adapter_config.json")
    write_json(tmp_path / "nv" / "adapter_config.json", {**settings, "Wdecompose_target_modules": ["o_proj", "gate"]})
    with pytest.raises(DoraError) as caught:
        merge_checkpoint(tmp_path / "nv", tiny_llama_folder, tmp_path / "out")
    text = str(caught.value)
    assert "3 problems" in text
    assert "gate: is magnitude-only in the settings, and the file has no" in text
    assert "up_proj: has 47 magnitudes, the base model's weight is (48, 32)" in text
    assert "upp_proj: no module of the base model has this name (the nearest is" in text


@pytest.mark.parametrize("to", ["kohya", "mlx", "torchtune", "fsdp-qlora", "ai-toolkit", "peft"])
def test_magnitudes_alone_go_through_every_format(to, tmp_path, tiny_llama_folder):
    model = granular()
    nvlabs(model, tmp_path / "nv")
    base = str(tiny_llama_folder)
    done = convert_adapter(ConversionRequest(tmp_path / "nv", to, tmp_path / "there", base=base))
    assert any("4 layers of magnitude alone" in note for note in done.notes) == (to != "peft")
    convert_adapter(ConversionRequest(tmp_path / "there", "peft", tmp_path / "back", base=base))
    got, _ = load_model(str(tmp_path / "back"), base=base)
    torch.testing.assert_close(got(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


# settings beside the layers


def test_convert_carries_our_own_settings(tmp_path):
    model = adapted(lora_dropout=0.1, detach_norm=False, magnitude_lr_ratio=2.0, dropout_mode="adapter")
    doralib.save_adapter(model, tmp_path / "ours")
    done = convert_adapter(ConversionRequest(tmp_path / "ours", "peft", tmp_path / "again"))
    assert read_any_format(tmp_path / "again", Hints())[1].config == registry.config_of(model)
    assert (
        "detach_norm False, magnitude_lr_ratio 2.0, dropout_mode adapter: kept in doralib_config.json" in done.notes[0]
    )
    # a format whose dropout is another keeps its meaning on the way to PEFT's files
    convert_adapter(ConversionRequest(tmp_path / "ours", "mlx", tmp_path / "mlx"))
    convert_adapter(ConversionRequest(tmp_path / "mlx", "peft", tmp_path / "from mlx"))
    config = read_any_format(tmp_path / "from mlx", Hints())[1].config
    assert (config.dropout_mode, config.lora_dropout, config.detach_norm) == ("adapter", 0.1, True)


@pytest.mark.parametrize(
    ("to", "notes"),
    [
        ("kohya", ["lora_dropout 0.1, detach_norm False: kohya / LyCORIS files", "do not say which model"]),
        ("fsdp-qlora", ["lora_dropout 0.1, detach_norm False: fsdp_qlora files", "do not say which model"]),
        ("mlx", ["detach_norm False, dropout_mode exact: MLX-LM files"]),
        ("peft", ["detach_norm False: kept in doralib_config.json"]),
    ],
)
def test_what_a_format_cannot_hold_is_said(to, notes, tmp_path):
    model = adapted(lora_dropout=0.1, detach_norm=False, dropout_mode="exact")
    model.name_or_path = "somebody/some-model"
    doralib.save_adapter(model, tmp_path / "ours")
    got = convert_adapter(ConversionRequest(tmp_path / "ours", to, tmp_path / "out")).notes
    assert len(got) == len(notes)
    assert all(want in note for want, note in zip(notes, got, strict=True)), got


def test_an_adapter_with_nothing_to_say_is_converted_without_notes(tmp_path):
    doralib.save_adapter(adapted(), tmp_path / "ours")
    assert convert_adapter(ConversionRequest(tmp_path / "ours", "kohya", tmp_path / "out")).notes == ()


def test_own_settings_of_another_adapter_are_left_aside_and_damaged_ones_refused(tmp_path):
    doralib.save_adapter(adapted(lora_dropout=0.1, detach_norm=False), tmp_path / "ours")
    own = tmp_path / "ours" / "doralib_config.json"
    settings = read_json(own)
    write_json(own, settings | {"r": 2, "lora_alpha": 9.0})
    found = read_any_format(tmp_path / "ours", Hints())[1]
    assert found.config.detach_norm
    assert "differs in r, lora_alpha" in found.notes[0]
    # trained on in PEFT with another dropout: PEFT's file is newer than ours
    write_json(own, settings | {"lora_dropout": 0.9})
    assert read_any_format(tmp_path / "ours", Hints())[1].config.lora_dropout == 0.1
    write_json(own, settings | {"detach_nrom": 1})
    with pytest.raises(DoraError, match=r"doralib_config\.json(?s:.*)detach_nrom"):
        read_any_format(tmp_path / "ours", Hints())


# an adapter and the base it is put on


@pytest.mark.long
def test_a_base_of_another_name_is_noted(tmp_path, tiny_llama_folder, run):
    shutil.copytree(tiny_llama_folder, tmp_path / "other-model")
    model, _ = load_model(str(tiny_llama_folder))
    doralib.save_adapter(move(doralib.adapt(model, Config(r=2, target_modules=TARGETS))), tmp_path / "adapter")
    same = merge_checkpoint(tmp_path / "adapter", tiny_llama_folder, tmp_path / "same")
    assert same.notes == ()
    status, out, _ = run("merge", tmp_path / "adapter", "--base", tmp_path / "other-model", "--out", tmp_path / "out")
    assert status == 0
    out = " ".join(out.split())
    assert f"was trained on {tiny_llama_folder}" in out.replace("\n", "")
    assert "is put on" in out
    with pytest.warns(Note, match="was trained on"):
        load_model(str(tmp_path / "adapter"), base=str(tmp_path / "other-model"))
    arguments = ("--base", tmp_path / "other-model", "--prompt", "a", "--max-new-tokens", 1)
    done = subprocess.run(
        [sys.executable, "-m", "doralib", "generate", str(tmp_path / "adapter"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"note: {tmp_path / 'adapter'} was trained on" in done.stderr
    assert "UserWarning" not in done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(tmp_path / "adapter"), base=str(tiny_llama_folder))
    make_llama(hidden_size=40).save_pretrained(tmp_path / "wide")
    with pytest.raises(DoraError, match="it was trained on another model"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "wide", tmp_path / "never")


@pytest.mark.parametrize(
    ("named", "base", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "/models/SmolLM2-135M", True),
        ("HuggingFaceTB/SmolLM2-135M", "/cache/models--HuggingFaceTB--SmolLM2-135M/snapshots/1234abcd", True),
        ("/models/SmolLM2.gguf", "/tmp/.out.gguf-x/SmolLM2", True),
        ("meta-llama/Llama-2-7b-hf", "/models/Llama-3-8B", False),
        (None, "/models/x", True),
    ],
)
def test_names_of_models(named, base, same):
    from doralib.checkpoints.adapter import find_other_base

    assert (find_other_base(named, base) == ()) == same


def test_bad_input_at_the_terminal(run, tmp_path, tiny_llama_folder):
    doralib.save_adapter(adapted(), tmp_path / "one")
    kohya = written(adapted(), "kohya", tmp_path / "kohya.safetensors", tiny_llama_folder)
    out = ("--out", tmp_path / "out")
    cases = [
        (("merge", tmp_path / "one", *out), 2, "does not say which model it adapts"),
        (("merge", kohya, *out), 2, "kohya.safetensors does not say which model"),
        (("generate", kohya, "--prompt", "x"), 2, "--base MODEL"),
        (("inspect", kohya), 2, "--base MODEL"),
        (("inspect", tiny_llama_folder), 2, "holds no adapter"),
        (("merge", tmp_path / "one", tmp_path / "nope", "--base", tmp_path / "gone", *out), 2, "nope"),
        (("merge", tmp_path / "one", tmp_path / "nope", "--base", tmp_path / "gone", *out), 2, "gone"),
        (("merge", tmp_path / "one", kohya, "--base", tiny_llama_folder, *out, "--weight", 1), 2, "2 times --weight"),
        (("merge", "--base", tiny_llama_folder, *out), 2, "Missing argument 'ADAPTER...'"),
        (("merge", tiny_llama_folder, "--base", tiny_llama_folder, *out), 2, "holds no adapter"),
    ]
    for arguments, status, message in cases:
        got, _, err = run(*arguments)
        assert (got, message in err) == (status, True), (arguments, err)
        assert not (tmp_path / "out").exists()
    # settings that lie beside a file are those of the file with their own name
    shutil.copy(kohya, tmp_path / "one" / "kohya.safetensors")
    model = adapted()
    model.name_or_path = "x/one"
    doralib.save_adapter(model, tmp_path / "one")
    status, _, err = run("merge", tmp_path / "one" / "kohya.safetensors", *out)
    assert (status, "does not say which model" in err) == (2, True)
    for name, base in (("a", "x/one"), ("b", "x/two")):
        model = adapted()
        model.name_or_path = base
        doralib.save_adapter(model, tmp_path / name)
    status, _, err = run("merge", tmp_path / "a", tmp_path / "b", *out)
    assert status == 2
    assert "name different models" in err
    assert f"{tmp_path / 'b'}: x/two" in err


# diffusion


def pipeline(folder):
    """Two parts of a pipeline, by their own modules' names."""
    weights = {"unet": ("down_blocks.0.to_q", (8, 6)), "text_encoder": ("text_model.q_proj", (6, 6))}
    for part, (name, shape) in weights.items():
        file = "diffusion_pytorch_model" if part == "unet" else "model"
        write_tensors(folder / part / f"{file}.safetensors", {f"{name}.weight": torch.randn(shape)})
        write_json(folder / part / "config.json", {"model_type": part})
    write_json(folder / "model_index.json", {})
    return {f"{part}.{name}": shape for part, (name, shape) in weights.items()}


@pytest.mark.parametrize("name", ["kohya", "diffusers", "ai-toolkit"])
def test_one_part_of_a_pipeline(name, tmp_path):
    shapes = pipeline(tmp_path / "pipe")
    layers = {n: LayerAdapter(torch.randn(2, I), torch.randn(O, 2), torch.rand(O), 0.5) for n, (O, I) in shapes.items()}
    content = FORMATS[name].write(make_config(layers), AdapterState(layers), Hints(shapes=shapes))
    file = write_raw_adapter(content, FORMATS[name], tmp_path / "lora.safetensors")
    summary = merge_checkpoint(file, tmp_path / "pipe" / "unet", tmp_path / "out")
    assert "1 layers of other parts were not asked for" in " ".join(summary.notes)
    (stored,) = (tmp_path / "out").glob("*.safetensors")
    W = read_tensors(tmp_path / "pipe" / "unet" / stored.name)["down_blocks.0.to_q.weight"]
    layer = layers["unet.down_blocks.0.to_q"]
    V = W + 0.5 * layer.b_OR @ layer.a_RI
    want = layer.m_O[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(read_tensors(stored)["down_blocks.0.to_q.weight"], want)
    with pytest.raises(UsageError, match=r"a pipeline of several models; give one of them: --base .*unet or"):
        merge_checkpoint(file, tmp_path / "pipe", tmp_path / "never")


def other_alphas(model, folder, base):
    """The adapter in each format that says an alpha or a scale, and in fsdp_qlora's, where alpha is the rank."""
    for name in LANGUAGE:
        if name != "ai-toolkit":
            (folder / name).mkdir(parents=True)
            yield name, written(model, name, folder / name / "adapter", base)


def test_no_verb_takes_an_alpha_that_the_file_contradicts(tmp_path, tiny_llama_folder, run):
    known = _knows(tiny_llama_folder)
    for name, file in other_alphas(adapted(), tmp_path, tiny_llama_folder):
        own = R if name == "fsdp-qlora" else ALPHA
        read_any_format(file, replace(known, alpha=own))  # the same is no contradiction
        with pytest.raises(UsageError, match=f"--alpha 31: the adapter states its own alpha, {own}; leave --alpha out"):
            read_any_format(file, replace(known, alpha=31))
    file, base = tmp_path / "peft" / "adapter", ("--base", tiny_llama_folder)
    for verb, options in {
        "merge": ("--out", tmp_path / "out", *base),
        "inspect": (),
        "generate": ("--prompt", "a film", *base),
        "convert": ("--to", "mlx", "--out", tmp_path / "out"),
    }.items():
        status, _, err = run(verb, file, *options, "--alpha", 31)
        assert status == 2
        assert "the adapter states its own alpha, 6;" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan")])
def test_an_alpha_that_is_none_is_refused(alpha, tmp_path):
    doralib.save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(UsageError, match=f"--alpha {alpha:g}: lora_alpha is a number above 0"):
        read_any_format(tmp_path / "a", Hints(alpha=alpha))


def test_an_alpha_for_some_layers_leaves_the_others_theirs(tmp_path, tiny_llama_folder):
    file = written(adapted(), "kohya", tmp_path / "kohya", tiny_llama_folder)
    tensors = read_tensors(file)
    forgotten = next(key for key in sorted(tensors) if key.endswith(".alpha"))
    write_tensors(file, {key: t for key, t in tensors.items() if key != forgotten})
    _, found = read_any_format(file, replace(_knows(tiny_llama_folder), alpha=31))
    assert sorted(layer.scale * R for layer in found.state.layers.values()) == pytest.approx([ALPHA] * 5 + [31])
    assert found.notes == (
        "1 layers have no alpha: taken as 31, as given",
        "5 of 6 layers state an alpha of their own (6) and keep it",
    )


@pytest.mark.parametrize("kind", ["vera", "lengths alone"])
def test_an_alpha_for_what_has_none_is_refused(kind, tmp_path):
    if kind == "vera":
        config = DoraConfig(method="vera", r=R, target_modules=("q_proj",))
        doralib.save_adapter(doralib.adapt(make_llama(), config), tmp_path / "a")
    else:
        doralib.save_adapter(adapted(), tmp_path / "a")
        file = tmp_path / "a" / "adapter_model.safetensors"
        tensors = read_tensors(file)
        write_tensors(file, {key: t if "magnitude" in key else 0 * t for key, t in tensors.items()})
    with pytest.raises(UsageError, match="no layer of this adapter is scaled by an alpha"):
        read_any_format(tmp_path / "a", Hints(alpha=ALPHA))


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True}, {"alpha_pattern": {"up_proj": 9}, "rank_pattern": {"k_proj": 2}}]
)
def test_an_alpha_that_the_settings_say_is_no_contradiction(changes, tmp_path):
    doralib.save_adapter(adapted(**changes), tmp_path / "a")
    want = read_any_format(tmp_path / "a", Hints())[1]
    got = read_any_format(tmp_path / "a", Hints(alpha=ALPHA))[1]
    assert got.config == want.config
    with pytest.raises(UsageError, match="states its own alpha"):
        read_any_format(tmp_path / "a", Hints(alpha=31))


def _knows(base):
    shapes = {name: slot.shape for name, slot in _modules(base).items()}
    return Hints(shapes=shapes, config=read_json(base / "config.json"))


def test_of_several_parts_the_one_that_is_named_is_written(tmp_path):
    unet, text = "unet.down_blocks.0.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    g = torch.Generator().manual_seed(0)
    layers = {
        name: LayerAdapter(torch.randn(2, 3, generator=g), torch.randn(4, 2, generator=g), torch.rand(4), 1.5)
        for name in (unet, text)
    }
    content = FORMATS["diffusers"].write(Config(), AdapterState(layers), Hints())
    write_raw_adapter(content, FORMATS["diffusers"], tmp_path / "both")
    request = ConversionRequest(
        tmp_path / "both", "kohya", tmp_path / "one.safetensors", given=Hints(component="text_encoder")
    )
    done = convert_adapter(request)
    assert done.layers == 1
    assert any("1 layers of other parts were not asked for" in note for note in done.notes)
    heads = {key.split(".")[0] for key in read_tensors(tmp_path / "one.safetensors")}
    assert heads == {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}
    with pytest.raises(UsageError, match="the adapter is of text_encoder, unet"):
        convert_adapter(replace(request, given=Hints(component="transformer"), overwrite=True))


def test_a_part_of_what_has_no_parts_is_refused(tmp_path, tiny_llama_folder, run):
    doralib.save_adapter(adapted(), tmp_path / "a")
    said = "--component unet: no layer of this adapter is named by a part; leave --component out"
    for verb, options in {
        "merge": ("--base", tiny_llama_folder, "--out", tmp_path / "out"),
        "inspect": (),
        "convert": ("--to", "mlx", "--out", tmp_path / "out"),
    }.items():
        status, _, err = run(verb, tmp_path / "a", *options, "--component", "unet")
        assert (status, err.strip()) == (2, f"doralib: {said}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=said):
        doralib.load_adapter(make_llama(), tmp_path / "a", given=Hints(component="unet"))


def test_a_part_of_a_pipeline_takes_an_adapter_that_names_no_parts(tmp_path):
    pipeline(tmp_path / "pipe")
    layer = LayerAdapter(torch.randn(2, 6), torch.randn(8, 2), torch.rand(8), 0.5)
    state = AdapterState({"down_blocks.0.to_q": layer})
    write_raw_adapter(FORMATS["peft"].write(make_config(state.layers), state, Hints()), FORMATS["peft"], tmp_path / "a")
    assert merge_checkpoint(tmp_path / "a", tmp_path / "pipe" / "unet", tmp_path / "out").layers == 1
    # a pipeline's format puts the part that is asked for in front
    request = ConversionRequest(tmp_path / "a", "diffusers", tmp_path / "b", given=Hints(component="unet"))
    convert_adapter(request)
    assert list(read_any_format(tmp_path / "b", Hints())[1].state.layers) == ["unet.down_blocks.0.to_q"]


@pytest.mark.parametrize("asked", LANGUAGE)
def test_a_file_of_another_format_than_was_said_is_told_apart_first(asked, tmp_path, tiny_llama_folder):
    for name in LANGUAGE:
        if name == asked:
            continue
        file = written(adapted(), name, tmp_path / name, tiny_llama_folder)
        said = f"does not look like {asked} but like {name}; leave --from out, or give --from {name}\n"
        with pytest.raises(UsageError, match=said) as caught:
            read_any_format(file, Hints(), asked)
        assert "underscores" not in str(caught.value).splitlines()[0]
        assert len(str(caught.value).splitlines()) == 2  # not every tensor that it lacks


def test_a_file_of_no_format_is_told_so(tmp_path, run):
    write_tensors(tmp_path / "a.safetensors", {"something": torch.ones(2, 3)})
    status, _, err = run(
        "convert", tmp_path / "a.safetensors", "--from", "kohya", "--to", "peft", "--out", tmp_path / "o"
    )
    assert status == 2
    assert "does not look like kohya, nor like any other known adapter (1):\n  something (2, 3)" in err


def test_from_still_reads_what_does_not_look_like_it(tmp_path, tiny_llama_folder):
    """TensorRT-LLM's own files look like PEFT's; so do their errors until the base model is given."""
    doralib.save_adapter(adapted(), tmp_path / "a")
    request = ConversionRequest(tmp_path / "a", "mlx", tmp_path / "b", source="tensorrt")
    with pytest.raises(UsageError, match=r"(?s)but like peft.*read as tensorrt: .* give --base MODEL"):
        convert_adapter(request)
    assert convert_adapter(replace(request, base=str(tiny_llama_folder))).source == "tensorrt"


@pytest.mark.parametrize("method", ["lora", "dvora"])
def test_what_has_no_divided_magnitudes_is_not_read_as_tensorrt(method, tmp_path, tiny_llama_folder):
    doralib.save_adapter(adapted(method=method), tmp_path / "a")
    request = ConversionRequest(tmp_path / "a", "peft", tmp_path / "b", source="tensorrt", base=str(tiny_llama_folder))
    with pytest.raises(UsageError, match=f"(?s)but like peft.*read as tensorrt: this adapter is {method}"):
        convert_adapter(request)


def test_a_wrong_base_is_said_before_any_note(tmp_path, run):
    doralib.save_adapter(adapted(), tmp_path / "a")
    settings = read_json(tmp_path / "a" / "adapter_config.json") | {"base_model_name_or_path": "another/model"}
    write_json(tmp_path / "a" / "adapter_config.json", settings)
    status, _, err = run("generate", tmp_path / "a", "--base", "./absent", "--prompt", "a film")
    assert status == 2
    assert err.strip().splitlines() == [
        "doralib: model: there is no model folder ./absent; give a folder, a .gguf file or a hub name"
    ]
