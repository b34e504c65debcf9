"""The settings of an adapter in other forms: PEFT's configs, mappings; and what `help` says of them."""

import pydoc

import peft
import pytest
import torch
from conftest import make_llama

import doralib
from doralib.adapters.registry import trainable
from doralib.config import DoraConfig
from doralib.errors import UsageError

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def trained_shapes(model):
    return sorted((name.replace(".default", "").removesuffix(".weight"), tuple(p.shape)) for name, p in model)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(use_dora=True, **LORA),
        peft.LoraConfig(**LORA),
        peft.LoraConfig(use_dora=True, **LORA | {"target_modules": r".*\.1\..*_proj"}),
        peft.LoraConfig(
            use_dora=True, **LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}, use_rslora=True
        ),
        peft.LoraConfig(use_dora=True, **LORA, layers_to_transform=[1]),
        peft.LoraConfig(use_dora=True, **LORA, layers_to_transform=0, layers_pattern="layers"),
        peft.LoraConfig(use_dora=True, **LORA | {"target_modules": "all-linear"}, exclude_modules=["down_proj"]),
        peft.LoraConfig(**LORA, modules_to_save=["lm_head"], bias="none"),
    ],
    ids=range(8),
)
def test_what_pefts_config_trains_is_trained(config):
    theirs = peft.get_peft_model(make_llama(), config)
    ours = doralib.adapt(make_llama(), config)
    assert next(iter(trainable(ours)))
    wanted = [(n.removeprefix("base_model.model."), p) for n, p in theirs.named_parameters() if p.requires_grad]
    count = lambda found: sorted(tuple(p.shape) for _, p in found)
    assert count(trainable(ours)) == count(wanted)
    # the same A and B give the same outputs, so scale and magnitude are the same
    own = {name.replace("lora_magnitude_vector", "m"): p for name, p in ours.named_parameters()}
    with torch.no_grad():
        for name, p in wanted:
            if "lora_A" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
                layer, _, rest = name.partition(".lora_")
                side = f"{layer}.lora_{rest[0]}"
                (mine,) = [q for key, q in own.items() if key.startswith(side)]
                mine.copy_(p)
        ids = torch.arange(3, 12)[None]
        assert torch.allclose(ours.eval()(ids).logits, theirs.eval()(ids).logits, atol=1e-5)


def test_other_forms_and_their_mistakes():
    assert DoraConfig.from_peft(peft.LoraConfig(**LORA)).method == "lora"
    assert DoraConfig.from_peft(peft.LoraConfig(**LORA, lora_dropout=0.1)).dropout_mode == "exact"
    assert DoraConfig.from_peft(peft.LoraConfig(**LORA, init_lora_weights="pissa")).init_lora_weights == "pissa"
    vera = DoraConfig.from_peft(peft.VeraConfig(r=8, target_modules=["q_proj"], d_initial=0.2, projection_prng_key=3))
    assert (vera.method, vera.r, vera.d_initial, vera.projection_prng_key) == ("vera", 8, 0.2, 3)
    assert DoraConfig.of({"r": 4}) == DoraConfig(r=4)
    assert DoraConfig.of(peft.LoraConfig(**LORA).to_dict()).r == 4
    assert next(iter(trainable(doralib.adapt(make_llama(), {"r": 2, "target_modules": ["q_proj"]}))))
    with pytest.raises(UsageError, match="did you mean 'lora_alpha'"):
        doralib.adapt(make_llama(), {"lora_alhpa": 2})
    with pytest.raises(UsageError, match="config is a int"):
        doralib.adapt(make_llama(), 3)
    with pytest.raises(
        UsageError, match=r"B has a bias(.|\n)*target_modules is not set(.|\n)*init_lora_weights is False"
    ):
        DoraConfig.from_peft(peft.LoraConfig(lora_bias=True, init_lora_weights=False))
    with pytest.raises(UsageError, match="'IA3': LoraConfig and VeraConfig are read"):
        DoraConfig.from_peft(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def test_help_explains_every_field():
    text = pydoc.render_doc(DoraConfig, renderer=pydoc.plaintext)
    for name, field in DoraConfig.model_fields.items():
        assert f"{name} (" in text
        assert " ".join(field.description.split())[:30] in " ".join(text.replace("|", " ").split())
    assert "Fields, with" not in DoraConfig.model_json_schema()["description"]
