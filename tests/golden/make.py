"""Write the golden files of this folder with the tools themselves: `python tests/golden/make.py TOOL`.

Each tool was run in an environment of its own (versions in each folder's tool.txt). Beside a tool's own files each
folder has expected.safetensors: `base.LAYER`, the frozen weight, and `merged.LAYER`, what the tool itself makes of it.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def _disturb(named):
    """Values as after training: none at its start, none zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(named):
            noise = torch.randn(p.shape, generator=generator)
            is_length = any(word in name for word in ("magnitude", "dora_scale")) or name.endswith(".m")
            p.copy_(p * (1 + 0.2 * noise) if is_length else 0.4 * noise)


def _finish(folder, package, base, merged):
    tensors = {f"base.{name}": value for name, value in base.items()}
    tensors |= {f"merged.{name}": value for name, value in merged.items()}
    tensors = {name: value.detach().clone().contiguous().float() for name, value in tensors.items()}
    save_file(tensors, folder / "expected.safetensors")
    (folder / "tool.txt").write_text(f"{package} {version(package)}\n")


def _folder(name):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    return folder


class Net(torch.nn.Module):
    """Two linear layers and a square one, no two other sizes equal."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8), "k_proj": torch.nn.Linear(6, 4, bias=False)})
        self.head = torch.nn.Linear(5, 5)

    def forward(self, x):
        return x


def peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = Net()
    base = {name: m.weight.clone() for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    config = LoraConfig(
        r=2, lora_alpha=6, use_dora=True, target_modules=list(base),
        rank_pattern={"head": 3}, alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    model = get_peft_model(net, config)
    _disturb((n, p) for n, p in model.named_parameters() if "lora_" in n)
    folder = _folder("peft")
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    plain = model.merge_and_unload()
    _finish(folder, "peft", base, {name: plain.get_submodule(name).weight for name in base})


class Experts(torch.nn.Module):
    """Two stacks of three weights as transformers' mixtures hold them, no two sizes equal."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shapes = {"gate_up_proj": (3, 8, 5), "down_proj": (3, 5, 4)}
        for name, (count, num_out, num_in) in shapes.items():
            shape = (count, num_in, num_out) if is_transposed else (count, num_out, num_in)
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return x


def peft_experts():
    from peft import LoraConfig, get_peft_model

    for name, is_transposed in {"peft_experts": False, "peft_experts_transposed": True}.items():
        torch.manual_seed(0)
        layers = [{"experts": Experts(is_transposed), "q_proj": torch.nn.Linear(6, 8)} for _ in range(2)]
        net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))})
        base = {n: p.clone() for n, p in net.named_parameters() if "experts" in n}
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern={"0.experts.down_proj": 3},
            alpha_pattern={"0.experts.gate_up_proj": 5}, target_parameters=["experts.gate_up_proj", "down_proj"],
        )  # fmt: skip
        model = get_peft_model(net, config)
        _disturb((n, p) for n, p in model.named_parameters() if "lora_" in n)
        folder = _folder(name)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        plain = model.merge_and_unload()
        _finish(folder, "peft", base, {name: plain.get_parameter(name) for name in base})


def lycoris():
    import lycoris

    for name, options in {
        "lycoris": {"wd_on_output": True},
        "lycoris_input": {"wd_on_output": False},
        "lycoris_tucker": {"wd_on_output": True, "use_tucker": True},
    }.items():
        torch.manual_seed(0)
        net = Net()
        if "tucker" in name:
            net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 5, (3, 2))})
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        base = {n: m.weight.clone() for n, m in net.named_modules() if isinstance(m, kinds)}
        targets = {"target_module": ["Linear", "Conv2d", "Net", "ModuleDict"], "enable_conv": True}
        lycoris.LycorisNetwork.apply_preset(targets)
        network = lycoris.create_lycoris(
            net, 1.0, linear_dim=2, linear_alpha=3.0, conv_dim=2, conv_alpha=3.0, algo="lora", dora_wd=True, **options
        )
        network.apply_to()
        _disturb(network.named_parameters())
        folder = _folder(name)
        network.save_weights(folder / "lora.safetensors", torch.float32, {})
        names = {f"lycoris_{n}".replace(".", "_"): n for n in base}
        merged = {names[lora.lora_name]: lora.get_merged_weight()[0] for lora in network.loras}
        assert merged.keys() == base.keys()
        _finish(folder, "lycoris_lora", base, merged)


def _unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
    )


def diffusers():
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = _unet()
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    names = [f"{block}.attn1.to_q", f"{block}.attn2.to_k", f"{block}.attn2.to_out.0"]
    base = {f"unet.{name}": unet.get_submodule(name).weight.clone() for name in names}
    unet.add_adapter(LoraConfig(r=2, lora_alpha=7, use_dora=True, target_modules=names))
    _disturb((n, p) for n, p in unet.named_parameters() if "lora_" in n)
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    folder = _folder("diffusers")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=tensors, **_collate_lora_metadata({"unet": unet})
    )
    unet.fuse_lora()
    merged = {f"unet.{name}": unet.get_submodule(name).base_layer.weight for name in names}
    _finish(folder, "diffusers", base, merged)


def _torched(array):
    import numpy as np

    return torch.from_numpy(np.array(array))


def _mlx_folder(name, model, keys):
    """The folder with the files of mlx-lm's DoRA of these layers, once the model has it and it has moved."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 2, "scale": 5.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, parameters, use_dora=True)
    trained = {n: v for n, v in tree_flatten(model.parameters()) if n.endswith(("lora_a", "lora_b", ".m"))}
    moved = {name: _torched(value).clone() for name, value in trained.items()}
    _disturb(moved.items())
    model.load_weights([(name, mx.array(value.numpy())) for name, value in moved.items()], strict=False)
    folder = _folder(name)
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {n: v for n, v in tree_flatten(model.parameters()) if n in trained}
    )
    settings = {"fine_tune_type": "dora", "model": "tiny", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=4))
    return folder


def mlx():
    import mlx.core as mx
    import mlx.nn as nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(6, 8)
            self.o_proj = nn.Linear(5, 5, bias=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block(), Block()]

    mx.random.seed(0)
    model = Model()
    folder = _mlx_folder("mlx", model, ["q_proj", "o_proj"])
    layers = {f"layers.{i}.{name}": getattr(model.layers[i], name) for i in (0, 1) for name in ("q_proj", "o_proj")}
    _finish(
        folder,
        "mlx-lm",
        {name: _torched(layer.linear.weight) for name, layer in layers.items()},
        {name: _torched(layer.fuse().weight) for name, layer in layers.items()},
    )


def mlx_embedding():
    """A DoRA embedding beside a linear layer; rows of the weights are tokens."""
    import mlx.core as mx
    import mlx.nn as nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(6, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.layers = nn.Embedding(9, 6), [Block()]

    mx.random.seed(0)
    model = Model()
    folder = _mlx_folder("mlx_embedding", model, ["q_proj", "embed_tokens"])
    tokens = torch.tensor([[0, 3, 8], [3, 1, 0]])
    looked_up = _torched(model.embed_tokens(mx.array(tokens.numpy())))
    _finish(
        folder,
        "mlx-lm",
        {"embed_tokens": _torched(model.embed_tokens.embedding.weight), "tokens": tokens},
        {"embed_tokens": _torched(model.embed_tokens.fuse().weight), "tokens": looked_up},
    )


SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "model_type": "llama"}


def torchtune():
    from safetensors.torch import save_file as save
    from torchtune.models import convert_weights
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

    torch.manual_seed(0)
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3_1(
        lora_attn_modules=modules, apply_lora_to_mlp=True, vocab_size=8, num_layers=1, num_heads=4, num_kv_heads=2,
        embed_dim=16, intermediate_dim=20, max_seq_len=16, lora_rank=2, lora_alpha=6, use_dora=True,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    _disturb(get_adapter_params(model).items())
    trained = {name: p.detach().clone() for name, p in get_adapter_params(model).items()}
    heads = {"num_heads": 4, "num_kv_heads": 2, "dim": 16}
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in trained if ".lora_" in name})
    full = {name: value.detach().clone() for name, value in model.state_dict().items()}
    keep = {f"{name}.weight" for name in layers}
    base = convert_weights.tune_to_hf({name: v for name, v in full.items() if name in keep}, **heads)
    after = get_merged_lora_ckpt(full, rank=2, alpha=6)
    merged = convert_weights.tune_to_hf({name: v for name, v in after.items() if name in keep}, **heads)
    config = {"r": 2, "lora_alpha": 6, "target_modules": [*modules, "w1", "w2", "w3"], "peft_type": "LORA"}
    config = convert_weights.tune_to_peft_adapter_config(config)
    for name in ("torchtune", "torchtune_export"):
        folder = _folder(name)
        if name == "torchtune":
            torch.save(trained, folder / "adapter_model.pt")
        else:
            exported = convert_weights.tune_to_peft_adapter_weights(dict(trained), **heads)
            save({n: v.contiguous() for n, v in exported.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "base_config.json").write_text(json.dumps(SIZES))
        short = [{n.removesuffix(".weight"): v for n, v in each.items()} for each in (base, merged)]
        _finish(folder, "torchtune", *short)


class Attention(torch.nn.Module):
    """As transformers named its parts before version 5."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention = torch.nn.ModuleDict({n: torch.nn.Linear(width, width) for n in ("query", "key", "value")})
        self.output = torch.nn.ModuleDict({"dense": torch.nn.Linear(width, width)})

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        query, key, value = (split(self.attention[name](x)) for name in ("query", "key", "value"))
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        return self.output["dense"]((weights @ value).transpose(1, 2).reshape(x.shape))


class Scale(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lambda1 = torch.nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * self.lambda1


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width, eps=1e-6), torch.nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.layer_scale1, self.layer_scale2 = Scale(width), Scale(width)
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(width, 2 * width), "fc2": torch.nn.Linear(2 * width, width)}
        )

    def forward(self, x):
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        inner = torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.layer_scale2(self.mlp["fc2"](inner))


class Dinov2(torch.nn.Module):
    """A vision transformer with DINOv2's names and formulas; its positions follow the size of the pictures."""

    def __init__(self, width=16, heads=2, patch=2, side=4, layers=2):
        super().__init__()
        embeddings = {"patch_embeddings": torch.nn.ModuleDict({"projection": torch.nn.Conv2d(3, width, patch, patch)})}
        self.embeddings = torch.nn.ModuleDict(embeddings)
        for name, count in (("cls_token", 1), ("position_embeddings", 1 + side * side)):
            self.embeddings.register_parameter(name, torch.nn.Parameter(torch.randn(1, count, width)))
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(Block(width, heads) for _ in range(layers))})
        self.layernorm = torch.nn.LayerNorm(width, eps=1e-6)
        self.patch, self.side = patch, side

    def forward(self, pixels):
        patches = self.embeddings["patch_embeddings"]["projection"](pixels).flatten(2).transpose(1, 2)
        whole = torch.cat((self.embeddings.cls_token.expand(pixels.shape[0], -1, -1), patches), dim=1)
        first, others = self.embeddings.position_embeddings[:, :1], self.embeddings.position_embeddings[:, 1:]
        grid = others.reshape(1, self.side, self.side, whole.shape[2]).permute(0, 3, 1, 2)
        size = (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        fitted = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        x = whole + torch.cat((first, fitted.permute(0, 2, 3, 1).reshape(1, -1, whole.shape[2])), dim=1)
        for block in self.encoder["layer"]:
            x = block(x)
        return self.layernorm(x)


def onnx():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"backbone": Dinov2()}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.forward = model["backbone"].forward
    pixels = {f"pixels.{side}": torch.randn(2, 3, side, side) for side in (8, 12)}
    axes = {"pixels": {0: "batch", 2: "height", 3: "width"}}
    folder = _folder("onnx")
    given = {"input_names": ["pixels"], "dynamic_axes": axes, "dynamo": False}
    torch.onnx.export(model, (pixels["pixels.8"],), folder / "model.onnx", **given)
    with torch.no_grad():
        states = {name.replace("pixels", "states"): model(value) for name, value in pixels.items()}
    _finish(folder, "torch", pixels, states)


if __name__ == "__main__":
    for tool in sys.argv[1:]:
        globals()[tool]()
