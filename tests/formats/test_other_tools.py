"""The other tools read what we write, and make the weights that we make; a tool that is not installed is skipped.

`make interop` installs them all, torchtune in an environment of its own: it wants a torchao that PEFT refuses.
"""

from pathlib import Path

import pytest
import torch

from doralib.files import read_tensors
from doralib.formats import FORMATS
from doralib.formats.base import Hints
from doralib.formats.files import read_any_format, write_raw_adapter
from doralib.formats.tensors import make_config
from doralib.functional import merge_weight
from doralib.state import AdapterState, LayerAdapter

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.interop


def moved(base, *, ranks=(2,), scales=(1.5,)):
    """An adapter of these weights, other than any golden file's."""
    layers = {}
    for i, (name, W) in enumerate(base.items()):
        (O, I, *kernel), R = W.shape, ranks[i % len(ranks)]
        a, b = 0.4 * torch.randn(R, I, *kernel), 0.4 * torch.randn(O, R, *[1] * len(kernel))
        m_O = W.flatten(1).norm(dim=1) * (1 + 0.1 * torch.randn(O))
        layers[name] = LayerAdapter(a, b, m_O, scales[i % len(scales)])
    return AdapterState(layers)


def written(name, state, folder, given=None):
    into = FORMATS[name]
    return write_raw_adapter(into.write(make_config(state.layers), state, given or Hints()), into, folder)


def check(got, state, base, **bounds):
    """What the tool made against the formula."""
    for name, layer in state.layers.items():
        want = merge_weight(base[name].flatten(1), *layer.factors, layer.m_O, layer.scale).view(base[name].shape)
        torch.testing.assert_close(got[name], want, **(bounds or {"rtol": 1e-5, "atol": 1e-6}))


def net():
    torch.manual_seed(3)
    parts = {"q_proj": torch.nn.Linear(6, 8), "head": torch.nn.Linear(5, 5), "conv": torch.nn.Conv2d(3, 4, (3, 2))}
    return torch.nn.ModuleDict({"block": torch.nn.ModuleDict(parts)})


def weights(model):
    return {
        n: m.weight.detach().clone()
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    try:
        model, base = net(), weights(net())
        state = moved(base, ranks=(2, 3), scales=(1.5, 0.25))
        written("peft", state, tmp_path)
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path)
    except ImportError as error:  # PEFT refuses the torchao that torchtune needs
        pytest.skip(str(error))
    plain = wrapped.merge_and_unload()
    check(weights(plain), state, base)


@pytest.mark.parametrize("name", ["mlx", "torchtune", "torchtune_export", "lycoris", "lycoris_tucker", "diffusers"])
def test_peft_reads_the_others_files_as_we_turn_them(name, tmp_path):
    """The other tool's own merged weights, by way of our file and PEFT's reader."""
    peft = pytest.importorskip("peft")
    expected = read_tensors(GOLDEN / name / "expected.safetensors")
    base = {key.removeprefix("base."): W for key, W in expected.items() if key.startswith("base.")}
    llama = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    given = Hints(shapes={layer: tuple(W.shape) for layer, W in base.items()}, config=llama)
    _, found = read_any_format(GOLDEN / name / FORMATS[_format(name)].tensors_file, given)
    write_raw_adapter(FORMATS["peft"].write(found.config, found.state, given), FORMATS["peft"], tmp_path)
    model = torch.nn.Module()
    for layer, W in base.items():
        _put(model, layer, W)
    try:
        plain = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    except ImportError as error:
        pytest.skip(str(error))
    for layer in base:
        torch.testing.assert_close(
            plain.get_submodule(layer).weight, expected[f"merged.{layer}"], rtol=1e-5, atol=1e-6, check_stride=False
        )


def _format(name):
    return {"lycoris": "kohya", "lycoris_tucker": "kohya", "torchtune_export": "torchtune-export"}.get(name, name)


def _put(model, name, W):
    *path, last = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, torch.nn.Module())
        model = getattr(model, part)
    O, I, *kernel = W.shape
    layer = torch.nn.Conv2d(I, O, kernel, bias=False) if kernel else torch.nn.Linear(I, O, bias=False)
    layer.weight.data = W.clone()
    model.add_module(last, layer)


def test_lycoris(tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed here")
    model, base = net(), weights(net())
    state = moved(base, ranks=(2, 3), scales=(1.5, 0.25))
    file = written("kohya", state, tmp_path / "lora.safetensors")
    network, _ = lycoris.create_lycoris_from_weights(1.0, file, model)
    network.merge_to(1.0)
    check(weights(model), state, base)


def test_mlx(tmp_path):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed here")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed here")
    import mlx.nn as nn
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(6, 8), nn.Linear(5, 5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block(), Block()]
            self.lm_head = nn.Linear(6, 9)

    mx.random.seed(0)
    model = Model()
    chosen = ("layers.0.q_proj", "layers.1.o_proj", "lm_head")

    def torched(array):
        return torch.from_numpy(np.array(array))

    def linear(name):
        return model.lm_head if name == "lm_head" else getattr(model.layers[int(name[7])], name.split(".")[-1])

    base = {name: torched(linear(name).weight) for name in chosen}
    untouched = torched(model.layers[1].q_proj.weight)
    state = moved(base, scales=(1.5, 0.25))
    written("mlx", state, tmp_path)
    load_adapters(model, str(tmp_path))
    check({name: torched(linear(name).fuse().weight) for name in chosen}, state, base)
    # MLX adapts by the name inside a block: a layer that the file leaves out stays the base's own
    torch.testing.assert_close(torched(model.layers[1].q_proj.fuse().weight), untouched, rtol=1e-6, atol=1e-6)


def test_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed here")
    block = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")

    from transformers import CLIPTextConfig, CLIPTextModel

    class Pipeline(diffusers.DiffusionPipeline, diffusers.loaders.StableDiffusionLoraLoaderMixin):
        def __init__(self, unet, text_encoder):
            super().__init__()
            self.register_modules(unet=unet, text_encoder=text_encoder)

    unet = diffusers.UNet2DConditionModel(8, down_block_types=down, up_block_types=up, attention_head_dim=4, **block)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12}
    text = CLIPTextModel(
        CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1)
    )
    parts = {"unet": unet, "text_encoder": text}
    inner = "down_blocks.1.attentions.0.transformer_blocks.0"
    names = [f"unet.{inner}.attn1.to_q", f"unet.{inner}.attn2.to_out.0", "unet.down_blocks.0.resnets.0.conv1"]
    names += [f"text_encoder.{n}" for n, _ in text.named_modules() if n.endswith(("self_attn.q_proj", "mlp.fc1"))]
    layer = {name: parts[name.partition(".")[0]].get_submodule(name.partition(".")[2]) for name in names}
    base = {name: module.weight.detach().clone() for name, module in layer.items()}
    state = moved(base, ranks=(2, 3), scales=(3.5, 0.25))
    file = written("diffusers", state, tmp_path)
    pipeline = Pipeline(unet, text)
    try:
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    except ImportError as error:
        pytest.skip(str(error))
    pipeline.fuse_lora()
    check({name: module.weight.detach() for name, module in layer.items()}, state, base)


@pytest.mark.torchtune
def test_torchtune(tmp_path):
    pytest.importorskip("torchtune", reason="torchtune is not installed here")
    from torchtune.models import convert_weights
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.peft import get_merged_lora_ckpt

    sizes = {"num_heads": 4, "num_kv_heads": 2}
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3_1(
        lora_attn_modules=modules, apply_lora_to_mlp=True, vocab_size=8, num_layers=1, **sizes,
        embed_dim=16, intermediate_dim=20, max_seq_len=16, lora_rank=2, lora_alpha=3, use_dora=True,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p)
    adapted = (".lora_", "magnitude")
    live = {name: value for name, value in model.state_dict().items() if not any(word in name for word in adapted)}
    in_hf = {name.removesuffix(".weight"): W for name, W in convert_weights.tune_to_hf(live, **sizes, dim=16).items()}
    base = {name: W for name, W in in_hf.items() if "proj" in name}
    state = moved(base)
    llama = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    file = written("torchtune", state, tmp_path, Hints(config=llama))
    missing, unexpected = model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert not unexpected
    assert not [name for name in missing if any(word in name for word in adapted)]
    after = get_merged_lora_ckpt(dict(model.state_dict()), rank=2, alpha=3)
    got = {name.removesuffix(".weight"): W for name, W in convert_weights.tune_to_hf(after, **sizes, dim=16).items()}
    check(got, state, base)
