"""`doralib.peft.accelerate`: PEFT's own layers with PEFT's numbers, by our kernels, and back."""

import copy

import pytest
import torch
from adapted import move
from conftest import make_llama, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from doralib.errors import Note, UsageError
from doralib.kernels.dropout import draw, zeroed
from doralib.peft import accelerate, restore

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def peft_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_dora": True}
    model = get_peft_model(make_llama().to(dtype), LoraConfig(**settings | changes))
    return move(model)


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
    own = peft.eager.apply_operands
    monkeypatch.setattr(peft.eager, "apply_operands", lambda *a: calls.append(1) or own(*a))
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


def test_exact_dropout_has_pefts_mean_and_spread():
    model = accelerate(peft_model(lora_dropout=0.3)).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(7, 32)
    ours = torch.stack([layer(x).detach() for _ in range(2000)])
    restore(model)
    theirs = torch.stack([layer(x).detach() for _ in range(2000)])
    # the mean of 2000 is off by 0.004, the spread by 2 %
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0, rtol=0.12)
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = peft_model().train()
    _, want = run(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, grads = run(accelerate(model))
    assert model.base_model.model.model.gradient_checkpointing
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_the_same_dropout_gives_pefts_numbers(monkeypatch, p):
    """PEFT's dropout is made to draw its masks as ours are drawn: one a layer, in the same order."""

    def drawn(x, p, training, inplace):
        if not training:
            return x
        ours = draw(x, p, exact=True)
        return zeroed(x, ours.drawn) / (1 - ours.p)

    monkeypatch.setattr(nn.functional, "dropout", drawn)
    model = peft_model(lora_dropout=p).train()
    results = []
    for prepare in (restore, accelerate):
        prepare(model)
        torch.manual_seed(7)
        results.append(run(model))
    (want, want_grads), (logits, grads) = results
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_as_near_to_the_truth_as_pefts(dtype, adapters):
    model = peft_model(dtype)
    for p in model.parameters():
        p.data = p.data.to(adapters) if p.requires_grad else p.data
    exact, exact_grads = run(copy.deepcopy(model).double())
    errors = []
    for prepare in (restore, accelerate):
        with torch.autocast("cpu", torch.bfloat16):
            logits, grads = run(prepare(model))
        assert logits.dtype == torch.bfloat16
        assert all(grad.dtype == adapters for grad in grads.values())
        off = sum((grads[n].double() - g).square().sum() for n, g in exact_grads.items()).sqrt()
        errors.append([(logits.double() - exact).norm().item(), off.item()])
    theirs, ours = errors
    assert ours[0] <= 1.3 * theirs[0]
    assert ours[1] <= 1.3 * theirs[1]


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_come_go_and_take_turns():
    """Two of DoRA, one of LoRA, two at once: whatever is active, PEFT's own numbers."""
    model = accelerate(peft_model().eval())
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS[:2], use_dora=True))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS[1:], init_lora_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".two" in name:
                p.add_(0.2 * torch.randn_like(p))
    seen = []
    for active in ("default", "two", "plain", ["default", "two"], ["two", "plain"], "default"):
        model.base_model.set_adapter(active)
        want = logits_of(restore(model))
        torch.testing.assert_close(logits_of(accelerate(model)), want, rtol=1e-4, atol=1e-5)
        seen.append(want)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen[:5]) for b in seen[:i])
    model.set_adapter("two")
    model.delete_adapter("default")
    torch.testing.assert_close(logits_of(model), seen[1], rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), seen[1], rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    # the weights are now what unmerging left of them: the norm must follow
    want = logits_of(restore(model))
    torch.testing.assert_close(logits_of(accelerate(model)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_the_norm_follows_a_base_that_was_changed_and_an_adapter_that_was_loaded(tmp_path):
    model = accelerate(peft_model().eval())
    logits_of(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    want = logits_of(restore(model))
    torch.testing.assert_close(logits_of(accelerate(model)), want, rtol=1e-4, atol=1e-5)
    other = peft_model(r=2)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    want = logits_of(restore(model))
    torch.testing.assert_close(logits_of(accelerate(model)), want, rtol=1e-4, atol=1e-5)


def test_files_are_pefts_to_the_byte(tmp_path):
    model = accelerate(peft_model())
    model.save_pretrained(tmp_path / "fast")
    restore(model).save_pretrained(tmp_path / "own")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_a_plain_copy_computes_on_its_own():
    model = accelerate(peft_model().eval())
    want = logits_of(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(logits_of(twin), want)
    assert not any("forward" in m.__dict__ for m in restore(twin).modules())


def fresh(model):
    """Whether a layer's forward is our code, asked by a call."""
    from doralib import peft

    calls = []
    original = peft._Fast._dora
    peft._Fast._dora = lambda self, *args: calls.append(1) or original(self, *args)
    try:
        logits = model(IDS).logits
    finally:
        peft._Fast._dora = original
    return len(calls), logits


def test_a_base_that_trains_or_is_hooked_is_left_to_peft():
    model = accelerate(peft_model())
    assert fresh(model)[0] == 8
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    first.base_layer.weight.requires_grad_(True)
    seen = []
    second.base_layer.register_forward_hook(lambda *args: seen.append(1))
    count, logits = fresh(model)
    assert (count, len(seen)) == (6, 1)
    logits.sum().backward()
    assert first.base_layer.weight.grad.abs().sum() > 0


def test_an_adapter_added_later_with_another_dropout_is_left_to_peft():
    model = accelerate(peft_model().train())
    model.add_adapter("two", LoraConfig(r=2, target_modules=TARGETS, use_dora=True, lora_dropout=0.4))
    model.set_adapter("two")
    assert fresh(model)[0] == 8
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_dropout["two"] = nn.AlphaDropout(0.4)
    assert fresh(model)[0] == 7


def test_a_compiler_sees_pefts_numbers():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    model = accelerate(get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], use_dora=True)))
    x, compiled = torch.randn(3, 5), torch.compile(model, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        results = []
        for call in (model, compiled):
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            results += [[y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(6, 5))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], use_dora=True, fan_in_fan_out=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(4, 5)
    want = model(x)
    torch.testing.assert_close(accelerate(model)(x), want)


@pytest.mark.interop
@pytest.mark.parametrize("bf16", [False, True])
def test_trains_under_trls_sft_trainer(tmp_path, bf16):
    """With gradient checkpointing, dropout off: the same losses and the same adapter as with PEFT's own forward."""
    trl = pytest.importorskip("trl", reason="TRL is not installed; tried with trl 1.16.0")
    from datasets import Dataset

    rows = [{"prompt": "Review: a dull film", "completion": f" {word}"} for word in ("negative", "terrible") * 4]
    results = []
    for fast in (False, True):
        model = peft_model()
        model = accelerate(model) if fast else model
        args = trl.SFTConfig(
            output_dir=str(tmp_path / f"{fast}"), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, bf16=bf16, gradient_checkpointing=True, max_length=32,
            disable_tqdm=True, dataloader_pin_memory=False, save_strategy="steps", save_steps=5, seed=3,
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())
        trainer.train()
        assert bool([m for m in trainer.model.modules() if "doralib_fast" in m.__dict__]) == fast
        again = PeftModel.from_pretrained(make_llama(), tmp_path / f"{fast}" / "checkpoint-5").eval()
        results.append(([line["loss"] for line in trainer.state.log_history if "loss" in line], logits_of(again)))
    (theirs, their_logits), (ours, our_logits) = results
    assert len(theirs) == 5
    assert ours == pytest.approx(theirs, rel=2e-2 if bf16 else 2e-4)
    torch.testing.assert_close(
        our_logits, their_logits, **({"atol": 0.1, "rtol": 0.1} if bf16 else {"atol": 1e-3, "rtol": 1e-3})
    )
    assert theirs[-1] < theirs[0]


def test_refusals_name_every_layer_with_its_reason():
    with pytest.raises(UsageError, match="no PEFT layer with use_dora"):
        accelerate(peft_model(use_dora=False))
    with pytest.raises(UsageError, match="no PEFT layer"):
        accelerate(make_llama())
    model = peft_model()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.forward = lambda x, f=layer.base_layer.forward: f(x)
    with pytest.raises(UsageError, match=r"1 of 8[\s\S]*layers.1.mlp.up_proj: its base, Linear, is a storage"):
        accelerate(model)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "head"], use_dora=True))
    with pytest.raises(UsageError, match=r"1 of 2 DoRA layers[\s\S]*conv: it is PEFT's Conv2d"):
        accelerate(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_pefts_caching_is_said_to_do_nothing_and_the_norms_are_kept_all_the_same(monkeypatch):
    from peft.helpers import DoraCaching

    from doralib import peft
    from doralib.kernels import cache

    peft._note_caching.cache_clear()
    made, own = [], cache.renew_operands
    monkeypatch.setattr(cache, "renew_operands", lambda requests: made.append(len(requests)) or own(requests))
    model = accelerate(peft_model()).eval()
    with torch.no_grad(), DoraCaching():
        with pytest.warns(Note, match="DoraCaching has no effect") as said:
            first = model(IDS).logits
        computed = sum(made)
        again = model(IDS).logits
    assert len(said) == 1
    assert computed == sum(made) == 8
    assert torch.equal(first, again)
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"]._dora_cache


def test_magnitudes_in_16_bits_are_warned_of_with_the_remedy(recwarn):
    model = peft_model()
    accelerate(model)
    assert not [each for each in recwarn if "magnitudes" in str(each.message)]
    restore(model)
    # as TRL does with a 4-bit base
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    with pytest.warns(UserWarning, match=r"8 in torch.bfloat16, where small steps are lost.*p.data = p.data.float\(\)"):
        accelerate(model)
    # the remedy is one
    for name, p in model.named_parameters():
        if "lora_magnitude_vector" in name:
            p.data = p.data.float()
    restore(model)
    recwarn.clear()
    accelerate(model)
    assert not [each for each in recwarn if "magnitudes" in str(each.message)]
    lengths = [p for name, p in model.named_parameters() if "magnitude" in name]
    before = [p.detach().clone() for p in lengths]
    optimizer = torch.optim.AdamW(lengths, lr=1e-4, weight_decay=0)
    run(model)
    optimizer.step()
    assert all((p != old).float().mean() > 0.9 for p, old in zip(lengths, before, strict=True))
