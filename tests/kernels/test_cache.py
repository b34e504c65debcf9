"""What follows from the parameters of many layers is made anew for all at once, and is what each would make alone."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import doralib
from doralib import DoraConfig
from doralib.kernels import cache, renewal
from doralib.kernels.cache import LayerCache

SIZES = {"a": (7, 5), "b": (6, 4), "c": (7, 5), "d": (1, 9)}


class Layers(nn.Module):
    """Linear layers of several sizes side by side, some with a bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for i, (name, (O, I)) in enumerate(SIZES.items()):
            setattr(self, name, nn.Linear(I, O, bias=i % 2 == 0, dtype=dtype))

    def forward(self, names="abcd", rows=3):
        outputs = []
        for name in names:
            layer = getattr(self, name)
            x = torch.arange(1.0 * rows * layer.in_features).view(rows, -1).sin().to(layer.weight.dtype)
            outputs.append(layer(x))
        return outputs


def make(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    settings = {"r": 3, "rank_pattern": {"c": 2}, "alpha_pattern": {"b": 5}, "target_modules": "all-linear"} | settings
    model = doralib.adapt(Layers(dtype), DoraConfig(**settings)).train()
    step(model)
    return model


@torch.no_grad()
def step(model, seed=1, size=0.1):
    """As an optimizer changes all parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=size)


@pytest.fixture
def renewed(monkeypatch):
    """The layers of each round: norms, and what follows from them."""
    rounds = {"norms": [], "operands": []}

    def watch(module, name, key):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda changes, *more: rounds[key].append(len(changes)) or own(changes, *more)
        )

    watch(renewal, "renew_norms", "norms")
    watch(cache, "renew_operands", "operands")
    return rounds


def outputs_and_gradients(model):
    model.zero_grad()
    outputs = model()
    sum(y.float().square().sum() for y in outputs).backward()
    return [y.detach() for y in outputs] + [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.same_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_round_a_step_and_the_bits_of_each_alone(dtype, renewed):
    model, alone = make(dtype), make(dtype)
    for layer in alone.children():
        layer.cache.group = None
    outputs_and_gradients(model), outputs_and_gradients(alone)
    for seed in range(5):
        step(model, seed), step(alone, seed)
        renewed["norms"].clear(), renewed["operands"].clear()
        got = outputs_and_gradients(model)
        assert renewed == {"norms": [4], "operands": [4]}
        for ours, theirs in zip(got, outputs_and_gradients(alone), strict=True):
            assert torch.equal(ours, theirs)


def test_a_row_that_cancels_is_summed_densely_among_others():
    model = make(rank_pattern={}, alpha_pattern={}, r=5)
    model()
    step(model)
    layer = model.c
    with torch.no_grad():  # s B A about -W
        target = -layer.weight.double() * (1 - 1e-3) / layer.scale
        layer.lora_B.copy_(torch.linalg.lstsq(layer.lora_A.double().T, target.T).solution.T)
    model.a(torch.zeros(1, 5))
    for each in (model.a, model.c):
        V = each.weight.double() + each.scale * each.lora_B.double() @ each.lora_A.double()
        size = each.weight.double().norm(dim=1) + each.scale * (
            each.lora_B.double().abs() @ each.lora_A.double().abs()
        ).norm(dim=1)
        assert (
            (each.cache.constant_norm(each.lora_A, each.lora_B, each.scale).double() - V.norm(dim=1)).abs()
            <= 4 * torch.finfo(torch.float32).eps * size
        ).all()


def test_layers_out_of_use_are_left_out(renewed):
    model = make()
    model()
    step(model), model("ab")
    step(model), model("ab")
    renewed["norms"].clear()
    step(model), model("ab")
    assert renewed["norms"] == [2]
    step(model), model("c")
    assert renewed["norms"] == [2, 3]
    step(model), model("abc")
    assert sum(renewed["norms"]) == 2 + 3 + 3


def test_a_layer_that_changes_again_after_its_round_is_seen(renewed):
    model = make()
    model()
    step(model)
    model("a")
    model.b.lora_B.data.add_(0.5)
    model.c.lora_magnitude_vector.data.mul_(2)
    twin = copy.deepcopy(model)
    for ours, theirs in zip(model(), twin(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "bias", "weight"])
def test_what_follows_is_never_stale(part):
    """Through `.data`, which no version counter sees; the frozen bias too."""
    model = make()
    model()
    with torch.no_grad():
        model()
        tensor = getattr(model.a, part)
        if part == "weight":
            tensor.mul_(1.5)
        else:
            tensor.data.mul_(1.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = twin.a.base_layer.weight + twin.a.scale * twin.a.lora_B @ twin.a.lora_A
        gain = twin.a.lora_magnitude_vector / wanted.norm(dim=1)
        x = torch.arange(15.0).view(3, -1).sin()
        exact = gain * (x @ wanted.T) + twin.a.bias
        torch.testing.assert_close(model("a")[0], exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model("a")[0].detach(), exact, rtol=1e-5, atol=1e-6)


def test_copies_meet_among_themselves(renewed):
    model = make()
    model()
    twin = copy.deepcopy(model)
    assert twin.a.cache.group is twin.d.cache.group is not model.a.cache.group
    twin(), step(twin)
    renewed["norms"].clear()
    twin("a")
    assert renewed["norms"] == [4]
    renewed["norms"].clear()
    model()
    assert renewed["norms"] == []


def test_the_tiny_gains_of_one_layer_do_not_spoil_another():
    """m of about 0: the product cannot be read back from the output, and its gradient is right all the same."""
    model = make(torch.float64)
    model()
    step(model)
    with torch.no_grad():
        model.a.lora_magnitude_vector[2] = 0
        model.c.lora_magnitude_vector[1] = 1e-200
    got = outputs_and_gradients(model)
    for (name, layer), y in zip(model.named_children(), got, strict=False):
        A, B, m = (getattr(layer, n).detach().requires_grad_() for n in ("lora_A", "lora_B", "lora_magnitude_vector"))
        V = layer.base_layer.weight + layer.scale * B @ A
        x = torch.arange(3.0 * layer.in_features).view(3, -1).sin().double()
        plain = (m / V.norm(dim=1).detach()) * (x @ V.T) + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(y, plain.detach())
        for p, want in zip(
            (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector),
            torch.autograd.grad(plain.square().sum(), (A, B, m)),
            strict=True,
        ):
            torch.testing.assert_close(p.grad, want, msg=lambda m, name=name: f"{name}: {m}")


def test_a_layer_that_is_gone_is_forgotten(renewed):
    model = make()
    model()
    gone = weakref.ref(model.b.cache)
    del model.b
    gc.collect()
    assert gone() is None
    step(model), model("acd")
    assert renewed["norms"][-1] == 3


def assert_current(model, names="abcd"):
    """Outputs by the dense formula, of the values as they are."""
    for name, y in zip(names, model(names), strict=True):
        layer = getattr(model, name)
        V = layer.base_layer.weight + layer.scale * layer.lora_B @ layer.lora_A
        m, bias = layer.lora_magnitude_vector, layer.bias
        gain = 1 if m is None else m / V.norm(dim=1)
        x = torch.arange(3.0 * layer.in_features).view(3, -1).sin()
        torch.testing.assert_close(y, gain * (x @ V.T) + (0 if bias is None else bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_parameter_that_took_anothers_place_is_the_one_that_counts(method):
    """Of the same values at first; the old one is then written to."""
    model = make(method=method)
    with torch.no_grad():
        model()
        old = model.a.lora_A
        model.a.lora_A = nn.Parameter(old.detach().clone())
        model()
        old.zero_()
        assert_current(model)
    assert_current(model)


@pytest.mark.parametrize(
    ("module", "name", "slot"),
    [(renewal, "renew_norms", "last_norm"), (cache, "renew_operands", "last_operands")],
    ids=["norms", "operands"],
)
def test_another_threads_round_does_not_change_what_this_one_gets(module, name, slot, monkeypatch):
    """Between a round and its use: the others' results are put in every layer's place."""
    model, own = make(), getattr(module, name)
    model()
    caches = [layer.cache for layer in model.children()]
    old = [getattr(each, slot) for each in caches]
    step(model)

    def with_another_thread(requests):
        result = own(requests)
        for each, value in zip(caches, old, strict=True):
            setattr(each, slot, value)
        return result

    monkeypatch.setattr(module, name, with_another_thread)
    with torch.no_grad():
        assert_current(model)


def test_memory_that_was_freed_is_not_read(renewed):
    """As FSDP2 frees a layer's parameters, and fills them again before the layer computes."""
    model = make()
    model()
    step(model)
    kept = {}
    for p in model.c.parameters():
        kept[p] = p.detach().clone()
        p.untyped_storage().resize_(0)
    renewed["norms"].clear()
    assert_current(model, "abd")
    assert renewed["norms"] == [3]
    for p, value in kept.items():
        p.untyped_storage().resize_(value.nbytes)
        p.data.copy_(value)
    assert_current(model)


def test_a_model_made_in_inference_mode_computes():
    with torch.inference_mode():
        model = make()
        model()
        step(model)
        assert_current(model)


def test_only_generation_pays_for_columns():
    """A transposed copy of every B costs a training step of a high rank several per cent."""
    model, columns = make(), []
    for learning in (True, False):
        step(model)
        with torch.set_grad_enabled(learning):
            model()
            assert_current(model)
        made = [layer.cache.last_operands.operands for layer in (model.a, model.b, model.c)]
        columns.append([each.columns_OR is not None and each.columns_OR.stride() for each in made])
        # a training step reads these, whatever came before it
        assert [each.gsb_OR.stride() for each in made] == [(3, 1), (3, 1), (2, 1)]
    assert columns == [[False, False, False], [(1, 7), (1, 6), (1, 7)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_rows_of_each_are_aligned_as_a_tensor_of_its_own(dtype):
    """A CPU may multiply what lies at another address in another way."""
    model = make(dtype)
    for seed in range(2):
        step(model, seed), model()
    for layer in model.children():
        operands, seen = layer.cache.last_operands.operands, layer.cache.last_norm
        for t in (operands.gsb_OR, operands.wide_gsb_OR, seen.a_RI.value, seen.b_OR.value):
            assert t.data_ptr() % 64 == 0


@pytest.mark.same_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_evaluation_changes_no_bit_of_the_training_around_it(method, rows, dtype):
    """Of the parameters after some steps: with evaluations of the same and of other sizes in between, and without."""
    trained = []
    for evaluates in (False, True):
        model = make(dtype, method=method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for k in range(4):
            if evaluates:
                with torch.no_grad() if k % 2 else torch.inference_mode():
                    model("dcba"), model("b", rows), model("ca", 1)
            optimizer.zero_grad()
            sum(y.float().square().sum() for y in model("abcd", rows)).backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *trained))


def test_a_norm_that_a_kernel_writes_in_place_is_not_kept_as_it_was(monkeypatch):
    """As Triton's does: one tensor, other values."""
    layer, place = make().a, torch.empty(7)
    monkeypatch.setattr(type(layer.base), "triton_weight", lambda _: layer.base.W_OI)
    monkeypatch.setattr(LayerCache, "constant_norm", lambda _, a, b, s: place.copy_(fresh_norm(layer)))
    with torch.no_grad():
        for _ in range(2):
            layer.lora_A.data.mul_(1.5)
            A, B, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
            operands = layer.cache.operands(A, B, m, layer.scale, None, torch.float32)
            torch.testing.assert_close(operands.gain_O, m / fresh_norm(layer))


def fresh_norm(layer):
    return (layer.base_layer.weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1)
