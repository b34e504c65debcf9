"""Every field of PEFT's settings has a verdict, and what savers leave in keys and settings is taken off."""

import codecs
import dataclasses
import json
import typing

import peft
import pytest
import torch
from adapted import move
from conftest import make_llama
from peft import LoraConfig, VeraConfig, get_peft_model

import doralib
from doralib.errors import DoraError, Note
from doralib.files import read_json, read_tensors, write_json, write_tensors
from doralib.formats import tensorrt
from doralib.formats.base import Hints, RawAdapter
from doralib.formats.files import read_any_format
from doralib.formats.leftovers import remove_leftovers
from doralib.peft_settings import LORA, VERA

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def save(folder, **settings):
    """An adapter that PEFT wrote, and PEFT's own logits."""
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    model = move(get_peft_model(make_llama(), LoraConfig(**given | settings))).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def read(folder):
    return read_any_format(folder, Hints())[1]


def change_settings(folder, **changes):
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | changes)


def change_keys(folder, change):
    file = folder / "adapter_model.safetensors"
    write_tensors(file, {change(key): tensor for key, tensor in read_tensors(file).items()})


def logits(folder):
    with torch.no_grad():
        return doralib.load_adapter(make_llama(), folder).eval()(IDS).logits


@pytest.mark.parametrize(("verdicts", "config"), [(LORA, LoraConfig), (VERA, VeraConfig)])
def test_every_field_of_pefts_has_one_verdict(verdicts, config):
    """It fails when PEFT adds a field: look at what the field does to the numbers, and enter it."""
    fields = {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    refused = verdicts.refused.keys()
    assert fields.keys() <= verdicts.read | verdicts.harmless | refused
    assert not verdicts.read & verdicts.harmless | verdicts.read & refused | verdicts.harmless & refused
    for field, (idle, _) in verdicts.refused.items():
        assert fields.get(field, idle) == idle, field
    verdicts.check(fields | {"peft_type": "LORA"})


def test_every_start_of_pefts_has_a_verdict():
    kinds = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    starts = {start for kind in kinds for start in typing.get_args(kind)}
    assert {"eva", "corda", "loftq", "pissa"} <= starts
    taken = {start for start in starts if not refuses({"init_lora_weights": start})}
    assert taken == {"gaussian", "eva", "orthogonal", "mica"}


def refuses(settings):
    try:
        LORA.check(settings)
    except DoraError:
        return True
    return False


@pytest.mark.parametrize("field", [field for field in LORA.refused if field != tensorrt.MARK])
def test_what_would_change_the_numbers_is_refused_by_name(field, tmp_path):
    save(tmp_path)
    change_settings(tmp_path, **{field: True})
    with pytest.raises(DoraError, match=f"{field} is True: "):
        read(tmp_path)


def test_all_of_them_are_named_at_once(tmp_path):
    save(tmp_path)
    change_settings(tmp_path, lora_bias=True, kasa_config={"beta": 1}, init_lora_weights="loftq")
    with pytest.raises(DoraError, match=r"(?s)lora_bias is.*kasa_config is.*init_lora_weights is 'loftq'"):
        read(tmp_path)


def test_an_alora_as_peft_writes_it_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    get_peft_model(make_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(DoraError, match=r"alora_invocation_tokens is \[5, 6\]: an aLoRA acts only after these tokens"):
        doralib.load_adapter(make_llama(), tmp_path)


def test_refused_settings_inside_a_diffusers_file_count_too(tmp_path):
    key = "unet.mid_block.attentions.0.proj_in"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.lora_bias": True})}
    tensors = {f"{key}.lora.down.weight": torch.ones(2, 3), f"{key}.lora.up.weight": torch.ones(4, 2)}
    write_tensors(tmp_path / "pytorch_lora_weights.safetensors", tensors, metadata)
    with pytest.raises(DoraError, match="lora_bias is True"):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"inference_mode": False, "task_type": "CAUSAL_LM", "revision": "main", "peft_version": "9.9"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"fan_in_fan_out": True, "megatron_core": "other", "ensure_weight_tying": True},
    ],
)
def test_harmless_settings_change_no_number(changes, tmp_path):
    want = save(tmp_path, **{key: value for key, value in changes.items() if key.startswith("layers")})
    change_settings(tmp_path, **changes)
    assert read(tmp_path).notes == ()
    torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


def test_only_the_layers_that_were_adapted_are_adapted_again(tmp_path):
    want = save(tmp_path / "theirs", layers_to_transform=[1])
    model = doralib.load_adapter(make_llama(), tmp_path / "theirs")
    doralib.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert not any("layers.0." in name for name, _ in back.named_parameters() if "lora_" in name)


def test_fields_of_a_newer_peft_are_named(tmp_path):
    save(tmp_path)
    change_settings(tmp_path, use_next_year=True, nothing=None)
    assert any("use_next_year" in note and "nothing" not in note for note in read(tmp_path).notes)


LIVE = {
    "default": lambda key: name_adapter(key, "default"),
    "another": lambda key: name_adapter(key, "my-math"),
    "magnitude_module": lambda key: key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "magnitude_named_alone": lambda key: key.replace("lora_magnitude_vector", "lora_magnitude_vector.default"),
    "ddp": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "fsdp": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
    "all": lambda key: f"module._orig_mod.{name_adapter(key, 'default')}",
}


def name_adapter(key, name):
    """A key as a live PeftModel's state_dict has it."""
    if key.endswith("lora_magnitude_vector"):
        return f"{key}.{name}.weight"
    return key.replace(".weight", f".{name}.weight") if ".lora_A." in key or ".lora_B." in key else f"{key}.{name}"


@pytest.mark.parametrize("kind", LIVE)
def test_leftovers_in_keys_are_taken_off_with_a_note(kind, tmp_path):
    want = save(tmp_path)
    change_keys(tmp_path, LIVE[kind])
    assert read(tmp_path).notes
    with pytest.warns(Note):
        torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


def test_a_live_models_own_keys_are_read(tmp_path):
    want = save(tmp_path)
    model = peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    live = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert any(".default." in key for key in live)
    write_tensors(tmp_path / "adapter_model.safetensors", live)
    torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


def test_embeddings_and_banks_of_a_live_model_too():
    keys = ["x.lora_embedding_A.default", "x.lora_embedding_B.default", "x.vera_lambda_d.default"]
    keys += ["base_model.vera_A.default", "y.modules_to_save.default.weight"]
    cleaned = remove_leftovers(RawAdapter({key: torch.ones(1) for key in keys}))
    assert set(cleaned.tensors) == {
        *("x.lora_embedding_A", "x.lora_embedding_B", "x.vera_lambda_d"),
        *("base_model.vera_A", "y.modules_to_save.weight"),
    }


def test_several_adapters_in_one_file_are_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = read_tensors(file)
    write_tensors(file, {name_adapter(key, name): t for key, t in tensors.items() for name in ("a", "b")})
    with pytest.raises(DoraError, match=r"several adapters \(a, b\)"):
        read(tmp_path)


@pytest.mark.parametrize("kind", [None, "lora", "PeftType.LORA"])
def test_a_peft_type_that_is_not_said_as_peft_does(kind, tmp_path):
    want = save(tmp_path)
    change_settings(tmp_path, peft_type=kind)
    assert any("peft_type is null" in note for note in read(tmp_path).notes) == (kind is None)
    torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


def test_a_use_dora_of_null_is_known_by_the_magnitudes(tmp_path):
    want = save(tmp_path)
    change_settings(tmp_path, use_dora=None)
    torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(encoding, tmp_path):
    want = save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    assert file.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16))
    assert any("byte order mark" in note for note in read(tmp_path).notes)
    torch.testing.assert_close(logits(tmp_path), want, rtol=1e-4, atol=1e-5)


def test_settings_that_are_no_object(tmp_path):
    save(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(DoraError, match=r"should hold an object, .* and a list stands there"):
        read(tmp_path)


def test_an_adapter_in_a_folder_of_its_name_is_pointed_to(tmp_path):
    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="math")
    model.save_pretrained(tmp_path)
    with pytest.raises(DoraError, match=r"holds no adapter: .*math.* does"):
        read(tmp_path)
    assert read(tmp_path / "math").state.layers
