"""`doralib.peft.accelerate`: PEFT's own layers with PEFT's numbers, by our kernels, and back."""

import copy

import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from doralib.errors import UsageError
from doralib.peft import accelerate, restore

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def peft_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_dora": True}
    model = get_peft_model(make_llama().to(dtype), LoraConfig(**settings | changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def run(model):
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_pefts(training):
    model = peft_model().train(training)
    keys = model.state_dict().keys()
    logits, grads = run(model)
    assert accelerate(model) is model
    assert model.state_dict().keys() == keys
    ours, our_grads = run(model)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_it_is_our_code_that_runs_and_restore_takes_it_off(monkeypatch):
    from doralib import peft

    calls = []
    monkeypatch.setattr(peft, "dora_linear", lambda *a, f=peft.dora_linear: calls.append(1) or f(*a))
    model = accelerate(accelerate(peft_model()))
    model(IDS)
    assert len(calls) == 8
    restore(model)(IDS)
    assert len(calls) == 8
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_zero_rows_give_no_nan():
    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
        layer.lora_B["default"].weight[3] = 0
        layer.lora_magnitude_vector["default"].weight[3] = 0
    x = torch.randn(2, 32)
    assert layer(x)[:, 3].isnan().all()
    accelerate(model)
    assert layer(x)[:, 3].tolist() == [0, 0]
    logits, grads = run(model)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_exact_dropout_has_pefts_mean():
    model = accelerate(peft_model(lora_dropout=0.3)).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(7, 32)
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    restore(model)
    theirs = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, theirs, atol=0.1, rtol=0)
    assert not torch.equal(accelerate(model)(IDS).logits, model(IDS).logits)


def test_what_only_peft_can_do_is_left_to_it(tmp_path):
    model = accelerate(peft_model().eval())
    want = model(IDS).logits
    with model.disable_adapter():
        assert (model(IDS).logits - want).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = accelerate(PeftModel.from_pretrained(make_llama(), tmp_path).eval())
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-3, atol=1e-4)


def test_bfloat16_base_keeps_float32_masters():
    model = accelerate(peft_model(torch.bfloat16))
    logits, grads = run(model)
    assert logits.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_a_copy_computes_on_its_own():
    model = accelerate(peft_model().eval())
    with torch.no_grad():
        want = model(IDS).logits
        twin = accelerate(restore(copy.deepcopy(model)))
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(twin(IDS).logits, want)


def test_trains_under_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = []
    for fast in (False, True):
        model = peft_model()
        model = accelerate(model) if fast else model
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            logging_steps=1, save_strategy="no", learning_rate=1e-2, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in IDS.tolist() * 4]
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_refusals_name_every_layer_with_its_reason():
    with pytest.raises(UsageError, match="no PEFT layer with use_dora"):
        accelerate(peft_model(use_dora=False))
    with pytest.raises(UsageError, match="no PEFT layer"):
        accelerate(make_llama())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "head"], use_dora=True))
    with pytest.raises(UsageError, match=r"1 of 2 DoRA layers[\s\S]*conv: it is PEFT's Conv2d"):
        accelerate(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
