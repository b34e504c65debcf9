"""Every adapter format: files that the tools themselves wrote, round trips, and what is refused."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.files import read_json, read_tensors, write_tensors
from doralib.formats import FORMATS, detect_format, tensorrt
from doralib.formats.base import Hints, RawAdapter
from doralib.formats.files import read_any_format, read_raw_adapter, write_raw_adapter
from doralib.formats.peft import from_peft
from doralib.formats.tensors import make_config, widen_bytes
from doralib.functional import dense_row_norm, merge_weight
from doralib.state import AdapterState, LayerAdapter

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {
    "peft": "adapter_model.safetensors",
    "lycoris": "lora.safetensors",
    "lycoris_tucker": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "mlx": "adapters.safetensors",
    "torchtune": "adapter_model.pt",
    "torchtune_export": "adapter_model.safetensors",
}
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def expected(name):
    tensors = read_tensors(GOLDEN / name / "expected.safetensors")
    base = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
    return base, {layer: tensors[f"merged.{layer}"] for layer in base}


def known(name):
    base, _ = expected(name)
    config = GOLDEN / name / "base_config.json"
    shapes = {layer: tuple(W.shape) for layer, W in base.items()}
    return Hints(shapes=shapes, config=read_json(config) if config.exists() else {})


def merged(layer, W):
    return merge_weight(W.flatten(1), *layer.factors, layer.m_O, layer.scale).view(W.shape)


def assert_same_weights(got, want, base):
    """The two adapters make the same weights, to float32 rounding."""
    assert got.layers.keys() == want.layers.keys()
    for name, layer in got.layers.items():
        torch.testing.assert_close(
            merged(layer, base[name]), merged(want.layers[name], base[name]), rtol=2e-6, atol=2e-6
        )


def adapter(names, *, ranks=(2,), scales=(1.5,), dora=True, kernel=(), dtype=torch.float32):
    """Layers of unequal sizes, with base weights; every number is what training could leave."""
    layers, base = {}, {}
    for i, (name, O, I) in enumerate(names):
        R = ranks[i % len(ranks)]
        base[name] = torch.randn(O, I, *kernel)
        layers[name] = LayerAdapter(
            torch.randn(R, I, *kernel).to(dtype),
            torch.randn(O, R, *[1] * len(kernel)).to(dtype),
            torch.rand(O).to(dtype) + 0.5 if dora else None,
            scales[i % len(scales)],
        )
    return make_config(layers), AdapterState(layers), base


LANGUAGE = [("model.layers.0.self_attn.q_proj", 16, 12), ("model.layers.1.mlp.up_proj", 10, 10)]
UNET = [("unet.down_blocks.0.attentions.0.to_q", 8, 6), ("unet.mid_block.attentions.0.proj_in", 5, 5)]
TEXT = [("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 6, 4)]
FLUX = [
    ("transformer.transformer_blocks.0.attn.to_q", 8, 6),
    ("transformer.single_transformer_blocks.1.proj_out", 5, 5),
]
# format, layers, ranks, scales: as different as each can hold
ROUND_TRIPS = [
    ("peft", LANGUAGE, (2, 3), (1.5, 0.25)),
    ("kohya", LANGUAGE, (2, 3), (1.5, 0.25)),
    ("kohya", UNET + TEXT, (2, 3), (1.5, 0.25)),
    ("ai-toolkit", UNET, (2, 3), (1.5, 0.25)),
    ("ai-toolkit", FLUX, (2, 3), (1.5, 0.25)),
    ("diffusers", UNET + TEXT, (2, 3), (1.5, 0.25)),
    ("diffusers", FLUX, (2, 3), (1.5, 0.25)),
    ("mlx", LANGUAGE, (2,), (1.5, 0.25)),
    ("torchtune", LANGUAGE, (2,), (1.5, 0.25)),
    ("fsdp-qlora", LANGUAGE, (2, 3), (1.5, 0.25)),
]


@pytest.mark.parametrize("name", FILES)
def test_a_tools_own_file_makes_the_tools_own_weights(name):
    base, want = expected(name)
    _, found = read_any_format(GOLDEN / name / FILES[name], known(name))
    assert found.state.layers.keys() == base.keys()
    for layer, W in base.items():
        got = merged(found.state.layers[layer], W)
        torch.testing.assert_close(got, want[layer], rtol=2e-6, atol=1e-6)
        adapter = found.state.layers[layer]
        assert found.config.rank_of(layer) == adapter.rank
        assert found.config.scale_of(layer) == pytest.approx(adapter.scale, rel=1e-6)
        assert (got - W).norm() > 0.1 * W.norm(), "the file changes its base, or nothing was tested"


@pytest.mark.parametrize(("name", "layers", "ranks", "scales"), ROUND_TRIPS)
@pytest.mark.parametrize("dora", [True, False])
def test_round_trip(name, layers, ranks, scales, dora, tmp_path):
    if not dora and name in ("fsdp-qlora", "ai-toolkit"):
        pytest.skip("files of these say nothing that would tell a LoRA from another tool's")
    config, state, base = adapter(layers, ranks=ranks, scales=scales, dora=dora)
    given = Hints(shapes={layer: tuple(W.shape) for layer, W in base.items()}, config=LLAMA)
    into = FORMATS[name]
    write_raw_adapter(into.write(config, state, given), into, tmp_path / "out")
    read_from, found = read_any_format(tmp_path / "out", given)
    assert read_from is into
    assert found.config.method == ("dora" if dora else "lora")
    assert_same_weights(found.state, state, base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["peft", "kohya", "mlx", "torchtune", "fsdp-qlora"])
def test_floats_of_a_byte_are_read_exactly(name, dtype, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = every[every.float().isfinite()]
    assert torch.equal(widen_bytes({"x": numbers})["x"].double(), numbers.double())
    config, state, base = adapter(LANGUAGE, ranks=(2,), scales=(1.5, 0.25), dtype=torch.float16)
    given = Hints(shapes={layer: tuple(W.shape) for layer, W in base.items()}, config=LLAMA)
    raw = FORMATS["peft"].write(config, state, given)
    narrow = {key: tensor.to(dtype) for key, tensor in raw.tensors.items()}
    write_raw_adapter(replace(raw, tensors=narrow), FORMATS["peft"], tmp_path / "bytes")
    found = read_any_format(tmp_path / "bytes", given)[1]
    through = lambda tensor: tensor.to(dtype).float()
    want = {
        layer: LayerAdapter(through(one.a_RI), through(one.b_OR), through(one.m_O), one.scale)
        for layer, one in state.layers.items()
    }
    assert_same_weights(found.state, AdapterState(want), base)
    write_raw_adapter(FORMATS[name].write(found.config, found.state, given), FORMATS[name], tmp_path / "out")
    assert_same_weights(read_any_format(tmp_path / "out", given)[1].state, AdapterState(want), base)


@pytest.mark.parametrize("name", ["peft", "kohya", "diffusers"])
def test_convolutions_round_trip(name, tmp_path):
    config, state, base = adapter(UNET, ranks=(2, 3), scales=(1.5, 0.25), kernel=(3, 2))
    given = Hints(shapes={layer: tuple(W.shape) for layer, W in base.items()})
    write_raw_adapter(FORMATS[name].write(config, state, given), FORMATS[name], tmp_path)
    assert_same_weights(read_any_format(tmp_path, given)[1].state, state, base)


@pytest.mark.parametrize("name", ["mlx", "torchtune", "fsdp-qlora", "ai-toolkit"])
def test_what_a_format_cannot_hold_is_refused(name):
    config, state, _ = adapter(UNET, kernel=(3, 3))
    with pytest.raises(UsageError, match=r"proj_in \(convolution\)"):
        FORMATS[name].write(config, state, Hints(config=LLAMA))
    config, state, _ = adapter(LANGUAGE)
    with pytest.raises(UsageError, match=r"lm_head\.bias"):
        FORMATS[name].write(config, AdapterState(state.layers, {"lm_head.bias": torch.zeros(3)}), Hints(config=LLAMA))


@pytest.mark.parametrize(("name", "layers", "ranks", "scales"), ROUND_TRIPS)
def test_nothing_is_dropped(name, layers, ranks, scales):
    """A key too many, a magnitude too few, a magnitude of another length: each is named."""
    config, state, base = adapter(layers, ranks=ranks, scales=scales)
    given = Hints(shapes={layer: tuple(W.shape) for layer, W in base.items()}, config=LLAMA)
    content = FORMATS[name].write(config, state, given)
    ends = (".m", "magnitude", "lora_magnitude_vector", "dora_scale")
    magnitude = next(key for key in content.tensors if key.endswith(ends))

    def read(tensors):
        return FORMATS[name].read(RawAdapter(tensors, content.settings, content.metadata), given)

    with pytest.raises(DoraError, match="surprise"):
        read({**content.tensors, "surprise.weight": torch.zeros(2)})
    with pytest.raises(DoraError, match=r"lacks (m|.*magnitude|dora_scale)"):
        read({key: value for key, value in content.tensors.items() if key != magnitude})
    with pytest.raises(DoraError, match=r"m \(29,\)|fits neither|\(29,\) has not the rows"):
        read({**content.tensors, magnitude: torch.ones(29)})


def test_detection_is_unambiguous_and_tells_what_it_saw():
    for name in FILES:
        file = GOLDEN / name / FILES[name]
        found, _ = read_any_format(file, known(name))
        assert found.name.startswith({"lycoris": "kohya"}.get(name.split("_")[0], name.split("_")[0]))
    with pytest.raises(DoraError, match=r"no known adapter(?s:.*)model.embed (?s:.*)known: peft"):
        detect_format(RawAdapter({"model.embed": torch.zeros(1)}))
    with pytest.raises(DoraError, match=r"no tensors"):
        detect_format(RawAdapter({}))


# kohya and LyCORIS


def kohya(scale, O=8, I=6, name="lora_unet_mid_proj"):
    return RawAdapter(
        {
            f"{name}.lora_down.weight": torch.randn(2, I),
            f"{name}.lora_up.weight": torch.randn(O, 2),
            f"{name}.alpha": torch.tensor(3.0),
            f"{name}.dora_scale": scale,
        }
    )


def read_kohya(content, shapes):
    return FORMATS["kohya"].read(content, Hints(shapes=shapes))


def test_lengths_along_the_inputs_are_refused_with_the_reason():
    given = known("lycoris_input")
    with pytest.raises(DoraError, match=r"3 problems(?s:.*)one length per input.*wd_on_output=False"):
        read_any_format(GOLDEN / "lycoris_input" / "lora.safetensors", given)


@pytest.mark.parametrize("shape", [(8, 1), (8,), (8, 1, 1, 1)])
def test_lengths_along_the_outputs(shape):
    found = read_kohya(kohya(torch.arange(8.0).reshape(shape)), {"mid.proj": (8, 6)})
    assert found.state.layers["mid.proj"].m_O.tolist() == list(range(8))
    assert found.state.layers["mid.proj"].scale == 1.5


@pytest.mark.parametrize(
    ("shape", "O", "why"),
    [
        ((1, 6), 8, "per input"),
        ((6,), 8, "per input"),
        ((6,), 6, "Ambiguous"),
        ((1, 6), 6, "per input"),
        ((7,), 8, "neither"),
    ],
)
def test_other_lengths(shape, O, why):
    with pytest.raises(DoraError, match=why):
        read_kohya(kohya(torch.rand(shape), O=O), {"mid.proj": (O, 6)})


def test_names_with_underscores_need_a_base_and_one_meaning():
    content = kohya(torch.rand(8, 1))
    with pytest.raises(UsageError, match="--base"):
        read_kohya(content, {})
    with pytest.raises(DoraError, match=r"ambiguous, it could be mid\.proj or mid_proj"):
        read_kohya(content, {"mid.proj": (8, 6), "mid_proj": (8, 6)})
    with pytest.raises(DoraError, match=r"no module .* nearest is mid\.prog"):
        read_kohya(content, {"mid.prog": (8, 6)})
    with pytest.raises(DoraError, match=r"\(8, 6\) in the adapter, \(8, 5\) in the base"):
        read_kohya(content, {"mid.proj": (8, 5)})


def test_the_prefix_says_which_part_of_a_pipeline():
    shapes = {f"{part}.down_blocks.proj": (8, 6) for part in ("unet", "transformer")}
    shapes |= {f"{part}.text_model.proj": (8, 6) for part in ("text_encoder", "text_encoder_2")}
    for key, want in {
        "lora_unet_down_blocks_proj": "unet.down_blocks.proj",
        "lora_te_text_model_proj": "text_encoder.text_model.proj",
        "lora_te1_text_model_proj": "text_encoder.text_model.proj",
        "lora_te2_text_model_proj": "text_encoder_2.text_model.proj",
    }.items():
        here = {name: shape for name, shape in shapes.items() if "transformer." not in name}
        assert list(read_kohya(kohya(torch.rand(8, 1), name=key), here).state.layers) == [want]


def test_the_first_text_encoders_prefix_says_whether_it_is_the_only_one():
    encoder, second = "text_encoder.text_model.q_proj", "text_encoder_2.text_model.q_proj"
    for names, want in {(encoder,): "lora_te_", (encoder, second): "lora_te1_"}.items():
        config, state, _ = adapter([(name, 4, 3) for name in names])
        assert next(iter(FORMATS["kohya"].write(config, state, Hints()).tensors)).startswith(want)
    config, state, _ = adapter([(encoder, 4, 3)])
    given = Hints(shapes={second: (4, 3)})
    assert next(iter(FORMATS["kohya"].write(config, state, given).tensors)).startswith("lora_te1_")


def test_other_kinds_are_named():
    content = RawAdapter({"lora_unet_a.hada_w1_a": torch.zeros(2, 2), "lora_unet_a.dora_scale": torch.zeros(2, 1)})
    with pytest.raises(DoraError, match=r"hada_w1_a: LoHa"):
        read_kohya(content, {"a": (2, 2)})


def test_without_alpha_it_is_the_rank_and_said():
    content = kohya(torch.rand(8, 1))
    tensors = {key: value for key, value in content.tensors.items() if not key.endswith("alpha")}
    found = read_kohya(RawAdapter(tensors), {"mid.proj": (8, 6)})
    assert found.state.layers["mid.proj"].scale == 1
    assert "no alpha: taken as the rank" in found.notes[0]


# NVlabs


def nvlabs(state, prefix="base_model.model.", name=""):
    tensors = {}
    for layer, a in state.layers.items():
        tensors[f"{prefix}{layer}.lora_A{name}.weight"] = a.a_RI
        tensors[f"{prefix}{layer}.lora_B{name}.weight"] = a.b_OR
        tensors[f"{prefix}{layer}.weight_m_wdecomp{name}.weight"] = a.m_O[:, None]
    return tensors


def nvlabs_settings(**more):
    return {"peft_type": "DORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "dora_simple": True, **more}


@pytest.mark.parametrize("name", ["", ".default"])
def test_the_official_codes_file(name, tmp_path):
    _, state, base = adapter(LANGUAGE)
    torch.save(nvlabs(state, name=name), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(nvlabs_settings(dora_simple=False)))
    found_in, found = read_any_format(tmp_path, Hints())
    assert found_in.name == "nvlabs"
    assert (found.config.dropout_mode, found.config.detach_norm) == ("exact", False)
    assert_same_weights(found.state, state, base)


@pytest.mark.parametrize("field", ["Wdecompose_target_modules", "wdecompose_target_modules"])
def test_the_official_codes_magnitude_only_and_missing_magnitudes(field):
    _, state, _ = adapter(LANGUAGE)
    tensors = nvlabs(state) | {
        "base_model.model.model.layers.0.mlp.down_proj.weight_m_wdecomp.weight": torch.ones(3, 1)
    }
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.weight_m_wdecomp.weight"]
    with pytest.raises(DoraError, match=r"2 problems(?s:.*)q_proj: lacks weight_m(?s:.*)down_proj: is magnitude-only"):
        FORMATS["nvlabs"].read(RawAdapter(tensors, nvlabs_settings(**{field: ["down_proj"]})), Hints())


class _Program:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    torch.save({"x.weight_m_wdecomp.weight": _Program()}, tmp_path / "adapter_model.bin")
    with pytest.raises(DoraError, match="more than tensors"):
        read_any_format(tmp_path, Hints())
    assert "run" not in capsys.readouterr().out
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DoraError, match="damaged"):
        read_any_format(tmp_path, Hints())
    torch.save({"epoch": 3}, tmp_path / "adapter_model.bin")
    with pytest.raises(DoraError, match="epoch is int"):
        read_any_format(tmp_path, Hints())


# MLX-LM


def test_mlx_embeddings_are_told_by_their_shapes():
    embedding = {"emb.lora_a": torch.randn(50, 2), "emb.lora_b": torch.randn(2, 6), "emb.m": torch.rand(50)}
    settings = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 5.0, "dropout": 0.0}}
    found = FORMATS["mlx"].read(RawAdapter(embedding, settings), Hints())
    assert (found.state.layers["emb"].kind, found.config.embedding_axis) == ("token_embedding", "token")
    square = {"emb.lora_a": torch.randn(6, 2), "emb.lora_b": torch.randn(2, 6), "emb.m": torch.rand(6)}
    with pytest.raises(DoraError, match="ambiguous"):
        FORMATS["mlx"].read(RawAdapter(square, settings), Hints())
    linear = {key.replace("emb", "q_proj"): value for key, value in square.items()}
    assert FORMATS["mlx"].read(RawAdapter(linear, settings), Hints()).config.lora_alpha == 10
    with pytest.raises(DoraError, match="1 layers have a magnitude"):
        FORMATS["mlx"].read(RawAdapter(linear, {**settings, "fine_tune_type": "lora"}), Hints())
    bare = {key: value for key, value in linear.items() if not key.endswith(".m")}
    with pytest.raises(DoraError, match="not one magnitude"):
        FORMATS["mlx"].read(RawAdapter(bare, settings), Hints())


# torchtune


def test_torchtunes_two_files_are_one_adapter():
    live = read_any_format(GOLDEN / "torchtune" / "adapter_model.pt", known("torchtune"))[1]
    exported = read_any_format(GOLDEN / "torchtune_export" / "adapter_model.safetensors", known("torchtune_export"))[1]
    assert_same_weights(exported.state, live.state, expected("torchtune")[0])
    assert exported.config.method == "dora"
    assert "forgets use_dora" in exported.notes[0]


def test_torchtunes_order_of_rows_depends_on_the_model():
    file = GOLDEN / "torchtune_export" / "adapter_model.safetensors"
    given = known("torchtune_export")
    with pytest.raises(UsageError, match=r"--base MODEL.*no base model is given"):
        read_any_format(file, Hints())
    with pytest.raises(UsageError, match="'phi3'"):
        read_any_format(file, Hints(config={**given.config, "model_type": "phi3"}))
    # qwen2's rows are transformers' own, so its magnitudes are right and its B was turned for nothing
    turned = read_any_format(file, Hints(config={**given.config, "model_type": "qwen2"}))[1].state.layers
    stored = read_tensors(file)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(turned[name].m_O, stored[f"base_model.model.{name}.lora_magnitude_vector"])
    live = torch.load(GOLDEN / "torchtune" / "adapter_model.pt", weights_only=True)
    assert torch.equal(turned[name].b_OR, live["layers.0.attn.q_proj.lora_b.weight"])


# TensorRT-LLM


def test_tensorrt_gets_m_over_n_and_nobody_takes_it_for_peft():
    config, state, base = adapter(LANGUAGE)
    norms = {name: dense_row_norm(base[name], a.a_RI, a.b_OR, a.scale) for name, a in state.layers.items()}
    given = Hints(lengths=lambda _: norms)
    content = tensorrt.write(config, state, given)
    for name, layer in state.layers.items():
        divided = content.tensors[f"base_model.model.{name}.lora_magnitude_vector"]
        V = base[name] + layer.scale * content.tensors[f"base_model.model.{name}.lora_B.weight"] @ layer.a_RI
        torch.testing.assert_close(divided[:, None] * V, merged(layer, base[name]))
    with pytest.raises(UsageError, match="divided by the rows' lengths"):
        detect_format(content).read(content, Hints())
    with pytest.raises(DoraError, match=r"q_proj \(\d+, \d+\): not in the base model"):
        detect_format(content).read(content, Hints(lengths=lambda state: {}))
    back = detect_format(content).read(content, given).state
    for name, layer in state.layers.items():
        torch.testing.assert_close(back.layers[name].m_O, layer.m_O)
        assert torch.equal(back.layers[name].a_RI, layer.a_RI)
    with pytest.raises(DoraError, match="magnitudes_divided_by_norm"):
        from_peft(content.tensors, content.settings)
    mixed = adapter(LANGUAGE, ranks=(2, 3))
    with pytest.raises(UsageError, match="one rank"):
        tensorrt.write(mixed[0], mixed[1], given)


# ai-toolkit, diffusers


def test_layers_of_no_such_part_are_refused():
    config, state, _ = adapter(LANGUAGE)
    with pytest.raises(UsageError, match=r"--component unet: no such part of a pipeline has unet\.model\.layers\.0"):
        FORMATS["diffusers"].write(config, state, Hints(component="unet"))


def test_ai_toolkits_alpha_is_assumed_and_can_be_given():
    _, state, base = adapter(FLUX, scales=(1.0,))
    tensors = {}
    for name, layer in state.layers.items():
        tensors |= {
            f"{name}.lora_A.weight": layer.a_RI,
            f"{name}.lora_B.weight": layer.b_OR,
            f"{name}.magnitude": layer.m_O,
        }
    content = RawAdapter(tensors)
    found = detect_format(content).read(content, Hints())
    assert_same_weights(found.state, state, base)
    assert "no alpha: taken as the rank" in found.notes[0]
    assert {a.scale for a in detect_format(content).read(content, Hints(alpha=8)).state.layers.values()} == {4.0}


def test_diffusers_without_metadata_takes_the_rank_for_alpha_and_says_so():
    file = GOLDEN / "diffusers" / FILES["diffusers"]
    content = RawAdapter(read_tensors(file))
    found = detect_format(content).read(content, Hints())
    assert "no lora_adapter_metadata): taken as the rank" in found.notes[0]
    assert {layer.scale for layer in found.state.layers.values()} == {1.0}
    given = detect_format(content).read(content, Hints(alpha=7))
    assert given.state.layers["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"].scale == 3.5


def test_which_part_of_a_pipeline_is_guessed_given_or_asked():
    config, state, _ = adapter([("down_blocks.0.to_q", 4, 3)])
    assert "unet.down_blocks.0.to_q.lora.down.weight" in FORMATS["diffusers"].write(config, state, Hints()).tensors
    config, state, _ = adapter([("encoder.to_q", 4, 3)])
    with pytest.raises(UsageError, match="--component"):
        FORMATS["diffusers"].write(config, state, Hints())
    written = FORMATS["diffusers"].write(config, state, Hints(component="text_encoder")).tensors
    assert "text_encoder.encoder.to_q.lora_A.weight" in written


def test_gpt2_is_no_pipeline():
    config, state, _ = adapter([("transformer.h.0.attn.c_proj", 4, 3)])
    assert next(iter(FORMATS["kohya"].write(config, state, Hints()).tensors)).startswith("lycoris_transformer_h_0")


# files


def test_a_folder_with_several_or_none(tmp_path):
    with pytest.raises(UsageError, match="holds no adapter: nothing"):
        read_any_format(tmp_path, Hints())
    config, state, _ = adapter(LANGUAGE)
    content = FORMATS["kohya"].write(config, state, Hints())
    for name in ("a.safetensors", "b.safetensors"):
        write_raw_adapter(content, FORMATS["kohya"], tmp_path / name)
    with pytest.raises(UsageError, match=r"several: a\.safetensors, b"):
        read_any_format(tmp_path, Hints())
    with pytest.raises(UsageError, match="exists already"):
        write_raw_adapter(content, FORMATS["kohya"], tmp_path / "a.safetensors")
    write_raw_adapter(content, FORMATS["kohya"], tmp_path / "a.safetensors", overwrite=True)
    with pytest.raises(UsageError, match="name a folder"):
        write_raw_adapter(FORMATS["peft"].write(config, state, Hints()), FORMATS["peft"], tmp_path / "x.safetensors")


def test_settings_say_of_each_layer_what_it_is():
    three = [*LANGUAGE, ("model.layers.0.self_attn.k_proj", 5, 4)]
    layers = adapter(three, ranks=(2, 2, 3), scales=(0.5, 2.0, 2.0))[1].layers
    config = make_config(layers)
    assert isinstance(config, DoraConfig)
    for name, layer in layers.items():
        assert (config.rank_of(name), config.scale_of(name)) == (layer.rank, layer.scale)


@pytest.mark.parametrize("name", ["transformer.blocks.0.attn.Wqkv", "text_encoder.encoder.q", "unet.down_blocks.0.q"])
@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_a_models_own_names_are_no_parts_of_a_pipeline(form, name, tmp_path):
    from doralib.adapters.load import read_for_model

    layer = LayerAdapter(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4), 1.0)
    made = FORMATS[form].write(
        DoraConfig(r=2, lora_alpha=2, target_modules=(name,)), AdapterState({name: layer}), Hints()
    )
    write_raw_adapter(made, FORMATS[form], tmp_path)
    assert set(read_for_model(tmp_path)[1].layers) == {name}
    # asked for, it is a part
    inside = read_for_model(tmp_path, given=Hints(component=name.partition(".")[0]))[1].layers
    assert set(inside) == {name.partition(".")[2]}


def test_an_archive_with_another_byte_is_damaged(tmp_path):
    path = tmp_path / "adapter_model.bin"
    torch.save({"base_model.model.q.lora_A.weight": torch.arange(24.0).view(4, 6)}, path)
    whole = path.read_bytes()
    at = whole.index(torch.arange(24.0).numpy().tobytes())
    path.write_bytes(whole[: at + 9] + b"\x7f" + whole[at + 10 :])
    with pytest.raises(DoraError, match=r"adapter_model\.bin is damaged \(.*data/0 is not what torch wrote\)"):
        read_raw_adapter(path)
    # a bomb: small as it lies there, large once it is unpacked
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(DoraError, match="is damaged"):
        read_raw_adapter(path)
    # an end that says that the archive goes on in a second one
    second = b"PK\x06\x07" + (0).to_bytes(4, "little") + (0).to_bytes(8, "little") + (2).to_bytes(4, "little")
    path.write_bytes(whole[:-22] + second + whole[-22:])
    with pytest.raises(DoraError, match="is damaged"):
        read_raw_adapter(path)
    path.write_bytes(whole)
    assert read_raw_adapter(path).tensors["base_model.model.q.lora_A.weight"].shape == (4, 6)


def test_twins_of_another_dtype_are_not_the_same(tmp_path):
    """float8 cannot be compared with others, and with itself by its bytes alone."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 6), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    m_O = torch.tensor([1.0, 2.0, 3.0, 4.0])
    file = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}')
    for other, same in [
        (m_O.to(torch.float8_e4m3fn), True),
        (m_O, False),
        (m_O.flip(0).to(torch.float8_e4m3fn), False),
    ]:
        twins = {f"{layer}.lora_magnitude_vector": m_O.to(torch.float8_e4m3fn)}
        twins[f"{layer}.lora_magnitude_vector.weight"] = other
        write_tensors(file, {**tensors, **twins})
        if same:
            assert torch.equal(
                read_any_format(tmp_path, Hints())[1].state.layers["model.layers.0.self_attn.q_proj"].m_O.float(), m_O
            )
        else:
            with pytest.raises(DoraError, match="two keys of one magnitude, with different numbers"):
                read_any_format(tmp_path, Hints())


@pytest.mark.parametrize("empty", ["lora_A", "lora_B"])
def test_factors_without_numbers_are_refused(tmp_path, empty):
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (2, 6), "lora_B": (4, 2)} | {empty: {"lora_A": (0, 6), "lora_B": (4, 0)}[empty]}
    tensors = {f"{layer}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(DoraError, match=rf"{empty}\.weight: .* holds no numbers"):
        read_any_format(tmp_path, Hints())
