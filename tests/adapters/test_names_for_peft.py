"""The target_modules of a written file: PEFT adapts by them what was adapted, and nothing else."""

import json
import re
import warnings

import pytest
import torch
from adapted import move
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import doralib
from doralib.config import DoraConfig
from doralib.formats.peft import to_peft
from doralib.state import AdapterState, LayerAdapter


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        x = self.q(x)
        return self.mlp(self.out_proj(self.attention(x, x, x)[0]))


class Model(nn.Module):
    """Names that are endings of others', a layer that is no target beside, and a part called as a pipeline's."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(1)
        self.part = part
        self.add_module(part, nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2))}))
        self.q, self.input_norm, self.norm = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.score = nn.Linear(4, 4)

    def forward(self, x):
        for block in getattr(self, self.part)["blocks"]:
            x = block(self.input_norm(x))
        return self.score(self.norm(self.q(x)))


TARGETS = {
    "all": {},
    "all but some": {"exclude_modules": ("mlp.0",)},
    "an ending": {"target_modules": ("q",)},
    "an ending without the outermost": {"target_modules": ("q",), "exclude_modules": r"q"},
    "the outermost alone": {"target_modules": r"q"},
    "an expression": {"target_modules": r".*blocks\.\d\.q|q"},
    "an expression but one": {"target_modules": r".*blocks\.\d\.q", "exclude_modules": r".*\.1\.q"},
    "ranks": {"target_modules": ("q",), "rank_pattern": {r".*\.1\.q": 3}},
    "magnitudes": {"target_modules": ("mlp.0",), "magnitude_modules": ("q",)},
}


@pytest.mark.filterwarnings("ignore::doralib.errors.Note")
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "unet"])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_adapts_what_was_adapted(targets, part, tmp_path):
    model = doralib.adapt(Model(part).eval(), DoraConfig(r=2, lora_alpha=4, **TARGETS[targets]))
    doralib.save_adapter(move(model, seed=3), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = PeftModel.from_pretrained(Model(part).eval(), tmp_path)
    ours = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    found = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "use_dora")}
    assert found - {""} == ours
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    loaded = doralib.load_adapter(Model(part).eval(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::doralib.errors.Note")
def test_endings_are_kept_where_they_say_enough(tmp_path):
    model = Model("encoder")
    doralib.save_adapter(doralib.adapt(model, DoraConfig(r=2)), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {"q"} < set(written)
    assert "out_proj" not in written  # nn.MultiheadAttention has one too
    assert "encoder.blocks.1.out_proj" in written


def test_without_the_model_names_are_whole():
    layers = {f"a.{i}.q": LayerAdapter(torch.ones(1, 2), torch.ones(2, 1), torch.ones(2), 1.0) for i in range(2)}
    _, settings = to_peft(DoraConfig(r=1), AdapterState(layers))
    assert settings["target_modules"] == ["a.0.q", "a.1.q"]
    _, settings = to_peft(DoraConfig(r=1, target_modules=("q",)), AdapterState(layers))
    assert settings["target_modules"] == ["q"]


def test_modules_to_save_are_matched_by_their_endings_as_peft_does(tmp_path):
    # PEFT's "norm" is every module whose name ends so: input_norm too
    theirs = get_peft_model(
        Model("encoder").eval(),
        LoraConfig(r=2, use_dora=True, target_modules=["q"], modules_to_save=["norm"], lora_alpha=4),
    )
    move(theirs, seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = doralib.load_adapter(Model("encoder").eval(), tmp_path / "theirs")
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    fresh = doralib.adapt(Model("encoder"), DoraConfig(r=2, target_modules=("q",), modules_to_save=("norm",)))
    whole = {re.sub(r"\.trained\..*", "", n) for n, p in fresh.named_parameters() if ".trained." in n}
    assert whole == {"norm", "input_norm"}
    doralib.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(Model("encoder").eval(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-5)
