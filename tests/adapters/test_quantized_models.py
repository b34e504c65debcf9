"""transformers' quantized models: train, save, load, merge, and save the merged model."""

import warnings

import pytest
import torch
from torch import nn

import doralib
from doralib.adapters.merge import dequantize
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.layers.base.opaque import Quantized
from doralib.layers.base.registry import open_base
from doralib.quantization.error import QuantizationCost, format_costs, is_change_lost

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def settings_of(kind):
    if kind.startswith("torchao"):
        q = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        made = {
            "int8": q.Int8WeightOnlyConfig,
            "int4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
            "float8": q.Float8WeightOnlyConfig,
        }
        return transformers.TorchAoConfig(made[kind.split()[1]]())
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.split()[0],
        bnb_4bit_use_double_quant="double" in kind,
        bnb_4bit_compute_dtype=torch.float32,
    )


KINDS = ("nf4", "nf4 double", "int8", "torchao int8", "torchao int4", "torchao float8")
each_kind = pytest.mark.parametrize("kind", KINDS)
CONFIG = DoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))
IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))


def load(folder, kind=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"quantization_config": settings_of(kind)} if kind else {}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model):
    """In training mode, in which bitsandbytes' int8 layers do not round their inputs."""
    training = model.training
    with torch.no_grad():
        out = model.train()(IDS).logits
    model.train(training)
    return out


def train(model, steps=4, rate=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(open_base(module), Quantized)}


@each_kind
def test_train_save_load_switch_and_remove(kind, even_llama_folder, tmp_path):
    model = load(even_llama_folder, kind)
    before = logits(model)
    torch.manual_seed(5)
    doralib.adapt(model, CONFIG)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        model.eval()(IDS)  # an evaluation between two steps changes nothing
    losses = train(model)
    assert losses[-1] < losses[0] - 0.03
    torch.manual_seed(5)
    assert losses == train(doralib.adapt(load(even_llama_folder, kind), CONFIG))
    after = logits(model)
    assert (after - before).abs().max() > 0.01
    doralib.save_adapter(model, tmp_path / "adapter")
    fresh = doralib.load_adapter(load(even_llama_folder, kind), tmp_path / "adapter")
    assert torch.equal(logits(fresh), after)
    with doralib.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(doralib.remove(model)), before)


@each_kind
def test_the_loss_curve_is_that_of_the_dense_twin(kind, even_llama_folder):
    losses = []
    for dense in (False, True):
        model = load(even_llama_folder, kind)
        if dense:
            dequantize(model, torch.float32)
        torch.manual_seed(3)
        losses.append(train(doralib.adapt(model, CONFIG)))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)


@each_kind
def test_dequantised_merge_saves_and_loads_as_a_plain_model(kind, even_llama_folder, tmp_path):
    model = doralib.adapt(load(even_llama_folder, kind), CONFIG)
    train(model)
    want = logits(model)
    doralib.merge(model, dequantise=True)
    assert not quantized(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
    assert not getattr(model, "is_loaded_in_4bit", False)
    assert not getattr(model, "is_loaded_in_8bit", False)
    assert not hasattr(model.config, "quantization_config")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))
    assert model.float() is model, "refused for a model that counts as quantized"


@each_kind
def test_requantised_merge_saves_and_loads_quantised(kind, even_llama_folder, tmp_path):
    model = load(even_llama_folder, kind)
    names = quantized(model)
    assert len(names) == 14
    doralib.adapt(model, CONFIG)
    train(model)
    layer, want = model.model.layers[1].mlp.down_proj, logits(model)
    W, V = layer.base.W_OI, layer.merged_weight()
    report = doralib.merge_report(model)
    assert [row.layer for row in report] == [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert torch.equal(logits(model), want), "reporting changes nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doralib.merge(model)
    told = [str(w.message) for w in caught if "lost most of the change" in str(w.message)]
    assert bool(told) == is_change_lost(report)
    Q = open_base(model.model.layers[1].mlp.down_proj).W_OI
    assert report[-1].of_change == pytest.approx(((Q - V).norm() / (V - W).norm()).item(), rel=1e-4)
    assert report[-1].of_weight == pytest.approx(((Q - V).norm() / V.norm()).item(), rel=1e-4)
    assert quantized(model) == names
    assert not hasattr(model, "_doralib")
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert quantized(again) == names
    assert torch.equal(logits(again), logits(model))


def test_a_small_change_is_swallowed_by_four_bits_and_said_so(even_llama_folder):
    model = doralib.adapt(load(even_llama_folder, "nf4"), CONFIG)
    train(model, steps=1, rate=1e-4)
    assert is_change_lost(doralib.merge_report(model))
    with pytest.warns(
        UserWarning, match=r"lost most of the change; doralib.merge.model, dequantise=True[\s\S]*q_proj.*worst"
    ):
        doralib.merge(model)


def test_plain_models_have_nothing_to_report(tiny_llama):
    model = doralib.adapt(tiny_llama[0], CONFIG)
    assert doralib.merge_report(model) == []
    state = model.config.to_dict()
    doralib.merge(model, dequantise=True)
    assert model.config.to_dict() == state


def test_an_evaluation_does_not_spoil_layers_without_an_adapter(even_llama_folder):
    """Gradients pass through them, so that bitsandbytes must not repack them either."""
    model = doralib.adapt(load(even_llama_folder, "nf4"), CONFIG)
    other = model.model.layers[0].self_attn.o_proj
    W = open_base(other).W_OI
    with torch.no_grad():
        model.eval()(IDS)
    assert torch.equal(open_base(other).W_OI, W)
    assert not getattr(other.weight.quant_state, "packing_format_for_cpu", False)


def test_a_quantised_module_cannot_be_trained_whole(even_llama_folder):
    config = DoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("mlp",))
    with pytest.raises(DoraError, match="quantized and cannot be trained whole"):
        doralib.adapt(load(even_llama_folder, "nf4"), config)


@pytest.mark.parametrize(("shares", "verdict"), [([0.1, 0.2, 0.9], False), ([0.1, 0.7, 0.9], True), ([], False)])
def test_the_median_layer_decides(shares, verdict):
    assert is_change_lost([QuantizationCost("a.q_proj", "x", share, 0.1) for share in shares]) is verdict


def test_measured_by_hand():
    W, V, Q = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 4.5]])
    row = QuantizationCost.measure("l.q_proj", "x", W, V, Q)
    assert row.of_change == pytest.approx(0.5)
    assert row.of_weight == pytest.approx(0.5 / 34**0.5)
    assert QuantizationCost.measure("l", "x", W, W, W).of_change == 0
    assert QuantizationCost.measure("l", "x", W, W, Q).of_change == float("inf")
    lines = format_costs([row, QuantizationCost("m.q_proj", "x", 0.75, 0.1)]).splitlines()
    assert "x2" in lines[1]
    assert "worst m.q_proj, 75.0%" in lines[1]
