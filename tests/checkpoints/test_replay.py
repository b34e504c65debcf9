"""`merge --verify exact`: a merge replays to the same bits, and a single wrong one anywhere is found and named."""

import random

import pytest
import torch
from adapted import move
from conftest import make_llama

import doralib
from doralib.checkpoints import merge
from doralib.checkpoints.merge import Ingredient, merge_checkpoint
from doralib.checkpoints.replay import verify_bits
from doralib.checkpoints.safetensors import Checkpoint
from doralib.files import read_json, write_json


def save_adapter(folder, **settings):
    given = {"r": 3, "target_modules": ("q_proj", "down_proj")} | settings
    doralib.save_adapter(move(doralib.adapt(make_llama(), doralib.DoraConfig(**given))), folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In shards, of which the first and the last hold no adapted layer."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def flip(file, place, bit=0):
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("weights", [(1.0,), (0.5, -0.25)])
def test_every_merge_replays(dtype, weights, base, tmp_path):
    settings = ({"target_modules": ("q_proj", "down_proj", "embed_tokens")}, {"method": "lora", "bias": "none"})
    mixed = [
        Ingredient(save_adapter(tmp_path / f"{i}", **settings[i]), weight=weight) for i, weight in enumerate(weights)
    ]
    merge_checkpoint(mixed, base, tmp_path / "out", dtype=dtype)
    found = verify_bits(tmp_path / "out", mixed, base, dtype)
    assert found.passed, found.text()
    assert found.tensors == len(Checkpoint.open(base).slots)
    assert f"{found.tensors} tensors" in found.text()
    other = "bfloat16" if dtype else "float32"
    assert not verify_bits(tmp_path / "out", mixed, base, other).passed


def test_one_wrong_bit_is_found_wherever_it_is(base, tmp_path):
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    merge_checkpoint(adapter, base, out)
    touched = {"q_proj", "down_proj"}
    random.seed(0)
    untouched_shards = 0
    for shard in Checkpoint.open(out).shards:
        untouched_shards += not any(name in slot.name for slot in shard.slots for name in touched)
        for slot in random.sample(shard.slots, min(3, len(shard.slots))):
            place, bit = slot.start + random.randrange(slot.nbytes), random.randrange(8)
            flip(shard.path, place, bit)
            found = verify_bits(out, adapter, base)
            assert found.faults == (f"{slot.name}: 1 of {slot.nbytes:,} bytes differ",)
            flip(shard.path, place, bit)
    assert untouched_shards, "a shard that no adapter touches was among them"
    assert verify_bits(out, adapter, base).passed


def test_wrong_bits_of_several_tensors_are_told_apart(base, tmp_path):
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    merge_checkpoint(adapter, base, out)
    slots = sorted(Checkpoint.open(out).slots.values(), key=lambda slot: slot.name)[::4]
    for slot in slots:
        flip(slot.file, slot.start)
        flip(slot.file, slot.start + slot.nbytes - 1)
    found = verify_bits(out, adapter, base)
    assert {line.partition(":")[0] for line in found.faults} == {slot.name for slot in slots}
    assert all(": 2 of " in line for line in found.faults)


def test_headers_sizes_and_files_count(base, tmp_path):
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    merge_checkpoint(adapter, base, out)
    first, second, *_ = sorted(out.glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole.replace(b'"BF16"', b'"F16" ', 1))
    assert verify_bits(out, adapter, base).faults == (f"{first.name}: has another header",)
    first.write_bytes(whole[:-3])
    assert f"{first.name}: has {len(whole) - 3:,} bytes, not {len(whole):,}" in verify_bits(out, adapter, base).faults
    first.write_bytes(whole)
    second.rename(out / "more.safetensors")
    assert verify_bits(out, adapter, base).faults == (
        f"{second.name}: is missing",
        "more.safetensors: no file of this merge",
    )


def test_the_index_counts(base, tmp_path):
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    merge_checkpoint(adapter, base, out)
    index = out / "model.safetensors.index.json"
    content = read_json(index)
    first, *_ = content["weight_map"]
    content["weight_map"][first] = sorted(set(content["weight_map"].values()) - {content["weight_map"][first]})[0]
    write_json(index, content)
    assert verify_bits(out, adapter, base).faults == (f"{index.name}: does not say where the tensors are",)
    index.unlink()
    assert verify_bits(out, adapter, base).faults == ("the index of the shards is missing",)


def test_a_merge_of_another_adapter_does_not_pass(base, tmp_path):
    merge_checkpoint(save_adapter(tmp_path / "one"), base, tmp_path / "out")
    found = verify_bits(tmp_path / "out", save_adapter(tmp_path / "other", r=4), base)
    assert len(found.faults) == 4
    assert "NOT what base and adapters make: 4 differences" in found.text()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_quantized_layers_replay_too(dtype, even_llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(even_llama_folder, quantization_config=settings).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(even_llama_folder)
    doralib.adapt(model, doralib.DoraConfig(r=3, target_modules=("q_proj", "down_proj")))
    doralib.save_adapter(move(model), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype=dtype)
    assert verify_bits(tmp_path / "out", tmp_path / "adapter", tmp_path / "base", dtype).passed
    slots = Checkpoint.open(tmp_path / "out").slots
    name = "model.layers.1.self_attn.q_proj.weight"
    flip(slots[name].file, slots[name].start)
    (fault,) = verify_bits(tmp_path / "out", tmp_path / "adapter", tmp_path / "base", dtype).faults
    assert fault.startswith(f"{name}: 1 of ")


def test_the_command_says_it_by_its_exit_status(base, tmp_path, run, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter")
    given = ("merge", adapter, "--base", base, "--verify", "exact")
    status, out, _ = run(*given, "--out", tmp_path / "right")
    assert status == 0
    assert "replayed bit for bit" in out
    assert "logits" not in out
    own = merge.write_at

    def write_wrong(file, at, block):
        own(file, at, block)
        if not written:
            written.append(flip(file, at))

    written = []
    monkeypatch.setattr(merge, "write_at", write_wrong)
    status, out, err = run(*given, "--out", tmp_path / "wrong")
    assert status == 1
    assert "1 difference in" in out
    assert "not bit for bit" in err


@pytest.mark.long
def test_verify_alone_means_logits_wherever_it_stands(tiny_llama_folder, tmp_path, run):
    adapter = save_adapter(tmp_path / "adapter")
    for i, given in enumerate([("--verify", adapter), (adapter, "--verify"), (adapter, "--verify=logits")]):
        status, out, _ = run("merge", "--base", tiny_llama_folder, "--out", tmp_path / f"{i}", *given)
        assert status == 0, out
        assert "answers as the adapted one" in out
    both = ("--verify", "exact", "--verify", "--out", tmp_path / "both")
    status, out, _ = run("merge", adapter, "--base", tiny_llama_folder, *both)
    assert status == 0
    assert "replayed bit for bit" in out
    assert "answers as the adapted one" in out
    status, _, err = run("merge", adapter, "--base", tiny_llama_folder, "--verify=bits", "--out", tmp_path / "none")
    assert status == 2
    assert "--verify bits: give logits or exact" in err
    assert not (tmp_path / "none").exists()
