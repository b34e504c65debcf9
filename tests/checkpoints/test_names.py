"""Names of adapters and of models: what one verb reads, every verb reads, whoever spelled the names."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapted import move
from safetensors.torch import load_file, save_file

import doralib
from doralib.adapters.names import Spelling, match_names
from doralib.checkpoints.merge import merge_checkpoint
from doralib.cli.inspect import inspect_adapter
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.files import read_json, write_json

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def dinov2(*, swiglu=False):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4,
        use_swiglu_ffn=swiglu,
    )  # fmt: skip
    return transformers.Dinov2ForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config), {"input_ids": torch.arange(10)[None]}


def mixtral():
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, vocab_size=64, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config), {"input_ids": torch.arange(10)[None]}


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def respell(folder: Path, out: Path, changes: list[tuple[str, str]]) -> Path:
    """The adapter with other names: as tools before transformers 5, or around another wrapper, wrote them."""
    out.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new in changes:
        tensors = {re.sub(old, new, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, out / "adapter_model.safetensors")
    settings = read_json(folder / "adapter_config.json")
    write_json(out / "adapter_config.json", settings)
    return out


OLD_VIT = [
    (r"\.layers\.(\d+)\.", r".encoder.layer.\1."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
OLD_DINO = [
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
]
OLD_LLAVA = [(r"model\.language_model\.", "language_model.model.")]
MODELS = {
    "vit": (vit, ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], OLD_VIT),
    "dinov2": (dinov2, ["q_proj", "v_proj", "o_proj", "fc1"], OLD_DINO),
    "swiglu": (lambda: dinov2(swiglu=True), ["q_proj", "gate_proj", "up_proj"], OLD_DINO),
    "one part": (lambda: dinov2(swiglu=True), ["up_proj"], OLD_DINO),
    "llava": (llava, r"model\.language_model\..*\.(q_proj|v_proj|up_proj)", OLD_LLAVA),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def written(tmp_path, name):
    """A model, its checkpoint as transformers stores it, PEFT's adapter of it, and what both answer."""
    torch.manual_seed(1)
    make, targets, old = MODELS[name]
    model, inputs = make()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True)
    tuned = peft.get_peft_model(model, config)
    for key, p in tuned.named_parameters():
        if p.requires_grad:
            p.data = p.data * 1.3 if "magnitude" in key else torch.randn_like(p) * 0.3
    tuned.save_pretrained(tmp_path / "peft")
    return tmp_path, inputs, outputs(tuned, inputs), old, type(model)


def fresh(folder, kind):
    return kind.from_pretrained(folder)


@each_model
def test_stored_names_are_not_live_names_and_every_verb_finds_them(written, name):
    folder, inputs, want, old, kind = written
    respell(folder / "peft", folder / "old", old)
    for adapter in (folder / "peft", folder / "old"):
        loaded = doralib.load_adapter(fresh(folder / "base", kind), adapter)
        close(outputs(loaded, inputs), want)
        merge_checkpoint(adapter, folder / "base", folder / f"merged_{adapter.name}")
        close(outputs(fresh(folder / f"merged_{adapter.name}", kind), inputs), want)
        inspect_adapter(adapter, base=str(folder / "base"))
    doralib.save_adapter(loaded, folder / "again")
    reloaded = peft.PeftModel.from_pretrained(fresh(folder / "base", kind), folder / "again")
    close(outputs(reloaded, inputs), want)


@each_model
def test_ours_merges_into_its_own_base(tmp_path, name):
    make, targets, _ = MODELS[name]
    model, inputs = make()
    model.save_pretrained(tmp_path / "base")
    targets = targets if isinstance(targets, str) else tuple(targets)
    move(doralib.adapt(model, DoraConfig(r=2, target_modules=targets)))
    doralib.save_adapter(model, tmp_path / "ours")
    merge_checkpoint(tmp_path / "ours", tmp_path / "base", tmp_path / "out")
    close(outputs(fresh(tmp_path / "out", type(model)), inputs), outputs(model, inputs))


def test_one_layer_of_an_old_adapter_is_two_of_the_model(tmp_path):
    torch.manual_seed(1)
    model, inputs = dinov2(swiglu=True)
    model.save_pretrained(tmp_path / "base")
    size = model.dinov2.layers[0].mlp.gate_proj.out_features if hasattr(model.dinov2, "layers") else 0
    size = size or next(m.out_features for n, m in model.named_modules() if n.endswith("gate_proj"))
    place = next(n for n, _ in model.named_modules() if n.endswith("0.mlp"))
    a, b, m = torch.randn(2, 16) * 0.3, torch.randn(2 * size, 2) * 0.3, torch.rand(2 * size)
    key = f"base_model.model.{place}.weights_in"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.lora_magnitude_vector": m}
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 2, "target_modules": ["weights_in"]}
    write_json(tmp_path / "old" / "adapter_config.json", settings)
    merge_checkpoint(tmp_path / "old", tmp_path / "base", tmp_path / "out")
    want = outputs(fresh(tmp_path / "out", type(model)), inputs)
    assert not torch.allclose(want, outputs(model, inputs), atol=1e-4)
    close(outputs(doralib.load_adapter(fresh(tmp_path / "base", type(model)), tmp_path / "old"), inputs), want)


@pytest.mark.parametrize("name", ["llava"])
@pytest.mark.parametrize(
    "changes",
    [
        [(r"^base_model\.model\.", "base_model.model.base_model.model.")],
        [(r"model\.language_model\.", "model.")],
        [(r"^base_model\.model\.", "base_model.model.module._orig_mod.")],
        [(r"model\.language_model\.layers", "model.language_model._orig_mod.layers")],
        [(r"model\.language_model\.", "language_model.model."), (r"^base_model\.model\.", "base_model.model.model.")],
    ],
    ids=["doubled", "text alone", "compiled", "compiled inside", "wrapped"],
)
def test_wrappers_in_names(written, changes):
    folder, inputs, want, _, kind = written
    adapter = respell(folder / "peft", folder / "other", changes)
    close(outputs(doralib.load_adapter(fresh(folder / "base", kind), adapter), inputs), want)
    merge_checkpoint(adapter, folder / "base", folder / "merged")
    close(outputs(fresh(folder / "merged", kind), inputs), want)


EXPERTS = [(f"{part}", i) for i, part in enumerate(["w1", "w3", "w2"])]


def expert_adapter(folder: Path, method: str, experts=range(3), parts=("w1", "w2", "w3")) -> Path:
    """As PEFT under transformers 4 wrote it for Mixtral, where each expert had three linear layers."""
    H, F, r = SMALL["hidden_size"], SMALL["intermediate_size"], 2
    sizes, tensors = {"w1": (F, H), "w3": (F, H), "w2": (H, F)}, {}
    for layer in range(2):
        for e in experts:
            for part in parts:
                O, I = sizes[part]
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{part}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(r, I) * 0.3
                tensors[f"{key}.lora_B.weight"] = torch.randn(O, r) * 0.3
                if method == "dora":
                    tensors[f"{key}.lora_magnitude_vector"] = torch.rand(O) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = peft.LoraConfig(
        r=r, lora_alpha=3, target_modules=list(parts), use_dora=method == "dora", task_type="CAUSAL_LM"
    ).to_dict()
    settings = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    write_json(folder / "adapter_config.json", settings)
    return folder


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize(("experts", "parts"), [(range(3), ("w1", "w2", "w3")), ([0, 2], ("w1", "w2"))])
def test_a_linear_layer_for_each_expert_goes_onto_the_stack(tmp_path, method, experts, parts):
    model, inputs = mixtral()
    model.save_pretrained(tmp_path / "base")
    adapter = expert_adapter(tmp_path / "adapter", method, experts, parts)
    merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out")
    want = outputs(fresh(tmp_path / "out", type(model)), inputs)
    loaded = doralib.load_adapter(fresh(tmp_path / "base", type(model)), adapter)
    assert not torch.allclose(outputs(model, inputs), want, atol=1e-4)
    close(outputs(loaded, inputs), want)
    # a checkpoint that stores the stacks themselves
    stacks = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "stacked").mkdir()
    save_file(stacks, tmp_path / "stacked" / "model.safetensors")
    write_json(tmp_path / "stacked" / "config.json", read_json(tmp_path / "base" / "config.json"))
    merge_checkpoint(adapter, tmp_path / "stacked", tmp_path / "out2")
    model.load_state_dict(load_file(tmp_path / "out2" / "model.safetensors"))
    close(outputs(model, inputs), want)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_same_expert_adapter_so(tmp_path):
    model, inputs = mixtral()
    model.save_pretrained(tmp_path / "base")
    adapter = expert_adapter(tmp_path / "adapter", "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(fresh(tmp_path / "base", type(model)), adapter)
    ours = doralib.load_adapter(fresh(tmp_path / "base", type(model)), adapter)
    close(outputs(ours, inputs), outputs(theirs, inputs))


def test_the_path_and_the_shapes_decide():
    towers = ("language_model.model.", "vision_tower.encoder.")
    known = [f"{tower}layers.0.q_proj.weight" for tower in towers]
    match = match_names(["model.layers.0.q_proj.weight"], known, lambda *_: True, lambda: None)
    assert match.found == {"model.layers.0.q_proj.weight": known[0]}
    match = match_names(["layers.0.q_proj.weight"], known, lambda _, target: "vision" in target, lambda: None)
    assert match.found == {"layers.0.q_proj.weight": known[1]}
    match = match_names(["layers.0.q_proj.weight"], known, lambda *_: True, lambda: None)
    assert not match.found
    assert "could be under" in match.problems[0]


def test_a_module_of_its_own_is_not_taken_for_another():
    known = ["bert.encoder.layer.0.attention.output.dense.weight", "language_model.model.embed_tokens.weight"]
    wanted = ["bert.pooler.dense.weight", "model.language_model.embed_tokens.weight"]
    match = match_names(wanted, known, lambda *_: True, lambda: None)
    assert match.found == {wanted[1]: known[1]}
    assert match.missing == [wanted[0]]


def test_transformers_is_asked_only_where_names_do_not_match():
    def refuse():
        raise AssertionError

    assert match_names(["a.0.b.weight"], ["x.a.0.b.weight"], lambda *_: True, refuse).found
    spelling = Spelling(lambda name: name.replace("old", "new"), {"m.new.0.b.weight": "m.stored.0.b.weight"})
    for name in ("m.old.0.b.weight", "m.new.0.b.weight", "m.stored.0.b.weight"):
        match = match_names([name], ["m.stored.0.b.weight"], lambda *_: True, lambda: spelling)
        assert match.found == {name: "m.stored.0.b.weight"}


def test_merging_needs_no_transformers_where_names_match(tmp_path):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    doralib.save_adapter(doralib.adapt(model, DoraConfig(r=2)), tmp_path / "ours")
    code = (
        "import sys; from pathlib import Path; from doralib.checkpoints.merge import merge_checkpoint\n"
        f"f = Path({str(tmp_path)!r}); merge_checkpoint(f / 'ours', f / 'base', f / 'out')\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_model_does_not_have_is_still_told(tmp_path):
    model, _ = vit()
    model.save_pretrained(tmp_path / "base")
    doralib.save_adapter(doralib.adapt(model, DoraConfig(r=2)), tmp_path / "ours")
    other = respell(tmp_path / "ours", tmp_path / "other", [("q_proj", "xq")])
    with pytest.raises(DoraError, match=r"\.xq"):
        merge_checkpoint(other, tmp_path / "base", tmp_path / "out")
    with pytest.raises(DoraError, match=r"\.xq"):
        doralib.load_adapter(vit()[0], other)
