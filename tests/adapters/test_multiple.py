"""Several adapters on one model: each one's numbers are those it has alone; switching, rows of a batch, the files."""

import copy
import json
import sys

import pytest
import torch
from adapted import ids, move
from conftest import make_llama
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import doralib
from doralib import DoraConfig, DoraError, UsageError
from doralib.adapters import registry
from doralib.adapters.load import complete_hints
from doralib.adapters.scan import Scan
from doralib.kernels import cache, renewal
from doralib.layers.base.opaque import Opaque
from doralib.layers.linear import DoraLinear
from doralib.layers.multi_adapter import MultiAdapter

CONFIGS = {
    "maths": DoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj", "up_proj"), rank_pattern={"v_proj": 2}),
    "code": DoraConfig(method="lora", r=3, lora_alpha=3, target_modules=("q_proj", "down_proj")),
    "vera": DoraConfig(method="vera", r=5, target_modules=("q_proj", "up_proj")),
    "dvora": DoraConfig(method="dvora", r=5, target_modules=("k_proj", "up_proj"), projection_prng_key=3),
    "lengths": DoraConfig(r=2, target_modules=("v_proj",), magnitude_modules=("q_proj",)),
    "words": DoraConfig(r=2, lora_alpha=5, target_modules=("embed_tokens", "o_proj"), modules_to_save=("lm_head",)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each adapter on a model of its own: its folder, its logits and its gradients."""
    found = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        model = move(doralib.adapt(make_llama(), config), seed=i)
        folder = tmp_path_factory.mktemp("alone") / name
        doralib.save_adapter(model, folder)
        found[name] = folder, model(ids()).logits.detach(), model
    return found


@pytest.fixture
def several(alone):
    model = make_llama()
    for name, (folder, _, _) in alone.items():
        doralib.load_adapter(model, folder, name)
    return model


# switching


def test_every_adapter_has_the_numbers_that_it_has_alone(several, alone):
    base = make_llama()(ids()).logits
    assert doralib.adapter_names(several) == tuple(CONFIGS)
    assert doralib.active_adapter(several) == "maths"
    for name in [*CONFIGS, *reversed(CONFIGS)]:
        doralib.set_adapter(several, name)
        assert torch.equal(several(ids()).logits, alone[name][1]), name
        with torch.no_grad():
            torch.testing.assert_close(several(ids()).logits, alone[name][1], rtol=1e-5, atol=1e-5)
        with doralib.disabled(several):
            assert torch.equal(several(ids()).logits, base)
    doralib.set_adapter(several, None)
    assert torch.equal(several(ids()).logits, base)


def test_the_files_are_those_of_each_alone(several, alone, tmp_path):
    for name, (folder, _, _) in alone.items():
        doralib.save_adapter(several, tmp_path / name, name)
        for file in ("adapter_config.json", "doralib_config.json"):
            assert json.loads((tmp_path / name / file).read_text()) == json.loads((folder / file).read_text())
        want, got = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / name))
        assert want.keys() == got.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_switching_computes_nothing_and_copies_nothing(several, monkeypatch):
    for name in CONFIGS:
        doralib.set_adapter(several, name)(ids())
    pointers = {name: (id(p), p.data_ptr(), p._version) for name, p in several.named_parameters()}
    monkeypatch.setattr(renewal, "renew_norms", lambda *a: pytest.fail("a norm was computed again"))
    monkeypatch.setattr(cache, "renew_operands", lambda *a: pytest.fail("what follows from a norm was made again"))

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} ran")

    with Nothing():
        for name in (*CONFIGS, None, "maths"):
            doralib.set_adapter(several, name)
    for name in CONFIGS:
        doralib.set_adapter(several, name)(ids())
    assert pointers == {name: (id(p), p.data_ptr(), p._version) for name, p in several.named_parameters()}


def test_the_frozen_weights_are_there_once(several):
    names = dict(several.named_parameters())
    plain = {name for name, _ in make_llama().named_parameters()}
    frozen = {name.replace(".base_layer", "") for name in names if ".adapters." not in name}
    assert frozen == plain
    assert len(several.state_dict()) == len(names)
    twin = copy.deepcopy(several)
    for place in twin.modules():
        if isinstance(place, MultiAdapter):
            assert all(layer.base_layer is place.base_layer for layer in place.adapters.values())
            assert all(
                layer.base.module is place.base_layer for layer in place.adapters.values() if hasattr(layer, "base")
            )


def test_a_cast_model_keeps_masters(several, alone):
    several.to(torch.bfloat16)
    for name, (folder, _, _) in alone.items():
        one = doralib.load_adapter(make_llama().to(torch.bfloat16), folder)
        doralib.set_adapter(several, name)
        assert torch.equal(several(ids()).logits, one(ids()).logits)
    assert {p.dtype for n, p in several.named_parameters() if "lora_" in n or "vera_" in n} == {torch.float32}


def test_gradients_are_those_of_each_alone(several, alone):
    for name, (_, _, one) in alone.items():
        doralib.set_adapter(several, name)
        several.zero_grad(), one.zero_grad()
        for model in (several, one):
            model(ids(), labels=ids()).loss.backward()
        theirs = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        ours = {
            n.replace(f".adapters.{name}.", "."): p.grad for n, p in several.named_parameters() if p.grad is not None
        }
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_model_with_one_adapter_takes_a_second(alone):
    model = doralib.load_adapter(make_llama(), alone["maths"][0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(ids()).logits
    doralib.add_adapter(model, "fresh", CONFIGS["code"])
    assert doralib.adapter_names(model) == ("default", "fresh")
    assert torch.equal(model(ids()).logits, before)
    assert torch.equal(doralib.set_adapter(model, "fresh")(ids()).logits, make_llama()(ids()).logits)
    doralib.set_adapter(model, "default")
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert not torch.equal(model(ids()).logits, before)
    assert torch.equal(doralib.set_adapter(model, "fresh")(ids()).logits, make_llama()(ids()).logits)


def test_deleting_leaves_the_others(several, alone):
    flags = {name: p.requires_grad for name, p in make_llama().named_parameters()}
    for name in CONFIGS:
        doralib.set_adapter(several, name)
        doralib.delete_adapter(several, name)
        left = tuple(CONFIGS)[tuple(CONFIGS).index(name) + 1 :]
        if left:
            assert doralib.active_adapter(several) is None
            assert torch.equal(several(ids()).logits, make_llama()(ids()).logits)
            assert torch.equal(doralib.set_adapter(several, left[0])(ids()).logits, alone[left[0]][1])
    assert not any(isinstance(m, MultiAdapter | DoraLinear) for m in several.modules())
    assert {name: p.requires_grad for name, p in several.named_parameters()} == flags


def test_remove_and_merge(several, alone):
    with pytest.raises(UsageError, match=r"merging maths would throw code, vera.* away"):
        doralib.merge(several)
    for name in tuple(CONFIGS)[1:]:
        doralib.delete_adapter(several, name)
    twin = doralib.merge(copy.deepcopy(several))
    torch.testing.assert_close(twin(ids()).logits, alone["maths"][1], rtol=1e-4, atol=1e-5)
    doralib.load_adapter(several, alone["code"][0], "code")
    doralib.remove(several)
    assert [n for n, _ in several.named_parameters()] == [n for n, _ in make_llama().named_parameters()]
    assert torch.equal(several(ids()).logits, make_llama()(ids()).logits)


@pytest.mark.parametrize("name", ["kohya", "mlx", "ai-toolkit", "torchtune", "fsdp-qlora"])
def test_files_of_any_format(several, name, tmp_path):
    from doralib.formats import FORMATS
    from doralib.formats.base import Hints
    from doralib.formats.files import write_raw_adapter

    given, config = complete_hints(Hints(), Scan(several)), CONFIGS["maths"].model_copy(update={"rank_pattern": {}})
    state = registry.state_of(move(doralib.adapt(make_llama(), config), seed=9))
    write_raw_adapter(FORMATS[name].write(config, state, given), FORMATS[name], tmp_path)
    want = doralib.load_adapter(make_llama(), tmp_path)(ids()).logits
    doralib.load_adapter(several, tmp_path, "theirs")
    assert torch.equal(doralib.set_adapter(several, "theirs")(ids()).logits, want)


def test_biases_change_with_the_adapter(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    configs = {
        "a": DoraConfig(r=2, target_modules=("0",), bias="all"),
        "b": DoraConfig(r=2, target_modules=("2",), bias="lora_only"),
        "c": DoraConfig(r=2, target_modules=("0", "2")),
    }
    x, want, model = torch.randn(4, 5), {}, base()
    for i, (name, config) in enumerate(configs.items()):
        one = move(doralib.adapt(base(), config), seed=i)
        doralib.save_adapter(one, tmp_path / name)
        want[name] = one(x)
        doralib.load_adapter(model, tmp_path / name, name)
    for name in ("b", "a", "c", "b", "c", "a"):
        assert torch.equal(doralib.set_adapter(model, name)(x), want[name])
        with doralib.disabled(model):
            assert torch.equal(model(x), base()(x))
        assert registry.state_of(model, "a").extra.keys() == {"0.bias", "2.bias"}
        trained = {n.replace(".base_layer", "") for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        assert trained == {"a": {"0.bias", "2.bias"}, "b": {"2.bias"}, "c": set()}[name]
    with doralib.disabled(model):  # what is switched to meanwhile shows afterwards
        doralib.set_adapter(model, None)
        doralib.set_adapter(model, "b")
        assert torch.equal(model(x), base()(x))
    assert torch.equal(model(x), want["b"])
    with doralib.adapter_rows(model, ["c", None, "c", None]):
        torch.testing.assert_close(model(x), torch.stack([want["c"], base()(x)] * 2).flatten(0, 1)[[0, 5, 2, 7]])
    assert torch.equal(model(x), want["b"])
    move(model, seed=9)
    trained_on = model(x)
    doralib.set_adapter(model, "a")
    assert torch.equal(doralib.set_adapter(model, "b")(x), trained_on)
    assert torch.equal(doralib.remove(model)(x), base()(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: doralib.set_adapter(m, "mahts"), "did you mean 'maths'"),
        (lambda m: doralib.add_adapter(m, "maths", CONFIGS["maths"]), "there is an adapter 'maths' already"),
        (lambda m: doralib.add_adapter(m, "a.b", CONFIGS["maths"]), "cannot be an adapter's name"),
        (lambda m: doralib.add_adapter(m, "keys", CONFIGS["maths"]), "cannot be an adapter's name"),
        (lambda m: doralib.add_adapter(m, "x", DoraConfig(target_modules=("q_porj",))), "q_proj"),
        (lambda m: doralib.add_adapter(m, "x", DoraConfig(method="full")), "no adapter beside"),
        (lambda m: doralib.add_adapter(m, "x", DoraConfig(modules_to_save=("mlp",), target_modules=("q_proj",))), "a"),
        (lambda m: doralib.adapt(m, CONFIGS["maths"]), "doralib.add_adapter"),
        (lambda m: doralib.save_adapter(m, "nowhere", "x"), "there is no adapter 'x'"),
        (lambda m: doralib.adapter_rows(m, ["maths", "x"]).__enter__(), "there is no adapter 'x'"),
        (lambda m: doralib.adapter_rows(m, []).__enter__(), "for each row"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_refusals_change_nothing(several, alone, call, message):
    flags = {name: p.requires_grad for name, p in several.named_parameters()}
    with pytest.raises(DoraError, match=message):
        call(several)
    assert {name: p.requires_grad for name, p in several.named_parameters()} == flags
    assert torch.equal(several(ids()).logits, alone["maths"][1])
    assert doralib.adapter_names(several) == tuple(CONFIGS)


def test_with_none_active_there_is_nothing_to_save(several, alone, tmp_path):
    doralib.set_adapter(several, None)
    with pytest.raises(UsageError, match="no adapter is active"):
        doralib.save_adapter(several, tmp_path)
    with pytest.raises(UsageError, match="no adapter is active"):
        doralib.load_adapter(several, alone["maths"][0])


# rows of a batch

NAMES = ["vera", None, "maths", "words", "code", "maths", "lengths", "dvora"]


def one_at_a_time(model, batch, names, **inputs):
    rows = []
    for i, name in enumerate(names):
        doralib.set_adapter(model, name)
        rows.append(model(batch[i : i + 1], **inputs).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_rows_have_the_numbers_of_one_at_a_time(several, dtype, grad):
    several.to(dtype)
    batch = ids(len(NAMES))
    with torch.set_grad_enabled(grad):
        want = one_at_a_time(several, batch, NAMES)
        doralib.set_adapter(several, "code")
        before = several(batch).logits
        with doralib.adapter_rows(several, NAMES):
            got = several(batch).logits
            with doralib.disabled(several):
                assert torch.equal(several(batch).logits, make_llama().to(dtype)(batch).logits)
        assert torch.equal(several(batch).logits, before)
    # a few roundings of two layers
    close = 16 * torch.finfo(dtype).eps * want.abs().max()
    assert (got - want).abs().max() < close
    if dtype == torch.bfloat16:
        return  # some of these adapters do less than its roundings
    assert (one_at_a_time(several, batch, [None] * len(NAMES)) - want).abs().amax((1, 2))[[0, 2, 3, 4]].min() > close


def test_a_batch_of_one_adapter_is_that_adapter(several, alone):
    for name in CONFIGS:
        with doralib.adapter_rows(several, [name] * 4):
            assert torch.equal(several(ids()).logits, alone[name][1])


class Products(TorchDispatchMode):
    """Counts products with operands of the given shapes."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.count = set(shapes), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in ("mm", "addmm", "bmm", "addmm_"):
            self.count += any(isinstance(a, torch.Tensor) and tuple(a.shape) in self.shapes for a in args)
        return func(*args, **kwargs or {})


def test_one_product_with_each_frozen_weight():
    model = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 17))
    for i in range(3):
        config = DoraConfig(r=2 + i, target_modules=("0", "2"), method=("dora", "lora", "dvora")[i])
        doralib.add_adapter(model, f"a{i}", config) if i else doralib.adapt(model, config, "a0")
    move(model)
    x = torch.randn(6, 11, requires_grad=True)
    names = ["a0", None, "a2", "a1", "a1", "a0"]
    with doralib.adapter_rows(model, names):
        model(x).sum().backward()  # norms are computed once
        with Products((11, 13), (13, 17), (13, 11), (17, 13)) as forward:
            y = model(x)
        assert forward.count == 2
        with Products((11, 13), (13, 17), (13, 11), (17, 13)) as backward:
            y.sum().backward()
        assert backward.count == 2


def conv(kind, **options):
    return lambda: nn.Sequential(kind(4, 6, 3, **options), nn.Tanh(), kind(6, 2, 3, padding=1))


def gpt2(positions=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=20, n_embd=12, n_layer=2, n_head=2)).eval()


class OwnLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 1.05, self.bias)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), ("0", "2"), (4, 5)),
    "wide": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)), ("0", "2"), (4, 6, 5)),
    "opaque": (lambda: nn.Sequential(OwnLinear(5, 7), nn.Tanh(), OwnLinear(7, 3)), ("0", "2"), (4, 6, 5)),
    "conv1d": (conv(nn.Conv1d, stride=2, groups=2), ("0", "2"), (4, 4, 15)),
    "conv2d": (conv(nn.Conv2d, padding=1, padding_mode="reflect"), ("0", "2"), (4, 4, 6, 5)),
    "transposed": (conv(nn.ConvTranspose2d, groups=2), ("0", "2"), (4, 4, 5, 4)),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc", "wte", "wpe"), None),
}


def of_kind(name, seed=0):
    """The model of that name in MODELS, what to adapt in it, and four rows of inputs."""
    make, targets, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    if not shape:
        model.lm_head = nn.Linear(12, 50)  # not tied to the embedding
    x = torch.randn(shape) if shape else torch.randint(0, 50, (4, 6))
    return model, targets, x


def outputs(model, x):
    y = model(x)
    return getattr(y, "logits", y)


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_rows_and_their_gradients(model, method, seed):
    model, targets, x = of_kind(model, seed)
    model, names = model.double(), ["b", None, "a", "b"]
    doralib.adapt(model, DoraConfig(r=2, method=method, target_modules=targets, detach_norm=not seed), "a")
    doralib.add_adapter(model, "b", DoraConfig(r=3, method="dora", target_modules=targets[:1]))
    move(model, seed=seed)
    x = x.double() if x.is_floating_point() else x
    weight = torch.randn_like(outputs(model, x))
    params = dict(registry.trainable(model))

    def gradients(y):
        model.zero_grad()
        (y * weight).sum().backward()
        return {name: p.grad for name, p in params.items()}

    want_y = []
    for i, name in enumerate(names):
        doralib.set_adapter(model, name)
        want_y.append(outputs(model, x[i : i + 1]))
    want = gradients(torch.cat(want_y))
    with doralib.adapter_rows(model, names):
        got_y = outputs(model, x)
    got = gradients(got_y)
    torch.testing.assert_close(got_y, torch.cat(want_y), rtol=1e-12, atol=1e-12)
    assert all(grad is not None for grad in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=name)


def test_opaque_is_what_it_says():
    assert isinstance(DoraLinear(OwnLinear(5, 7), 2, 1.0, DoraConfig()).base, Opaque)


def test_rows_with_dropout_drop_only_their_own(several):
    several.train()
    several.config.attention_dropout = 0.0
    doralib.add_adapter(
        several, "drop", DoraConfig(r=2, lora_dropout=0.5, dropout_mode="exact", target_modules=("q_proj",))
    )
    with torch.no_grad():
        for n, p in several.named_parameters():
            if ".drop." in n:
                p.add_(0.3 * torch.randn_like(p))
    with doralib.adapter_rows(several, ["maths", "drop", "code", None]):
        first, second = several(ids()).logits, several(ids()).logits
    changed = (first - second).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, True, False, False]


def test_rows_under_autocast(several):
    with torch.autocast("cpu", torch.bfloat16):
        want = one_at_a_time(several, ids(8), NAMES)
        with doralib.adapter_rows(several, NAMES):
            got = several(ids(8)).logits
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


# generation


def test_rows_in_generate(several):
    batch, names = ids(4), ["maths", None, "words", "code"]
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    want = []
    for i, name in enumerate(names):
        doralib.set_adapter(several, name)
        want.append(several.generate(batch[i : i + 1], **options))
    with doralib.adapter_rows(several, names):
        assert torch.equal(several.generate(batch, **options), torch.cat(want))


def test_beams_repeat_rows_and_so_must_the_names(several):
    batch, names = ids(2), ["words", "maths"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    want = []
    for i, name in enumerate(names):
        doralib.set_adapter(several, name)
        want.append(several.generate(batch[i : i + 1], **options))
    with (
        doralib.adapter_rows(several, names),
        pytest.raises(UsageError, match=r"2 names, and the batch has 6 rows.*in range\(3\)"),
    ):
        several.generate(batch, **options)
    with doralib.adapter_rows(several, [name for name in names for _ in range(3)]):
        assert torch.equal(several.generate(batch, **options), torch.cat(want))


def test_prompts_that_are_sorted_are_refused(several):
    from conftest import make_tokenizer

    from doralib.evaluation.generation import generate

    with doralib.adapter_rows(several, ["maths", "code"]), pytest.raises(UsageError, match=r"call model\.generate"):
        generate(several, make_tokenizer(), ["a", "longer prompt"], max_new_tokens=2)


@pytest.mark.parametrize("rows", [3, 5])
def test_a_batch_of_another_size_is_refused(several, alone, rows):
    with doralib.adapter_rows(several, NAMES[:4]):
        with pytest.raises(UsageError, match=f"4 names, and the batch has {rows} rows"):
            several(ids(rows))
        with pytest.raises(UsageError, match="cannot go by rows"):
            several.model(input_ids=ids(rows))
    assert torch.equal(several(ids(rows)).logits, alone["maths"][2](ids(rows)).logits)


def test_layers_that_see_no_rows_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            return self.up(x.flatten(0, 1))

    model = doralib.adapt(Flat(), DoraConfig(r=2, target_modules=("up",)), "a")
    with doralib.adapter_rows(model, ["a", None]), pytest.raises(UsageError, match=r"up is called with \(6, 4\)"):
        model(torch.randn(2, 3, 4))
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    doralib.adapt(experts, DoraConfig(r=2, target_modules=("0",)), "a")
    with pytest.raises(UsageError, match="sees tokens, not rows"), doralib.adapter_rows(experts, ["a"]):
        pass
    biased = doralib.adapt(nn.Sequential(nn.Linear(4, 4)), DoraConfig(r=2, target_modules=("0",), bias="all"), "a")
    with pytest.raises(UsageError, match="trains biases"), doralib.adapter_rows(biased, ["a", None]):
        pass


def test_checkpointing_with_rows(several):
    several.train()
    several.enable_input_require_grads()
    names = ["maths", None, "words", "code"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            several.gradient_checkpointing_enable({"use_reentrant": False})
        several.zero_grad()
        with doralib.adapter_rows(several, names):
            several(ids(), labels=ids()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in several.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-5, atol=1e-7)
    with doralib.adapter_rows(several, names):
        loss = several(ids(), labels=ids()).loss
    with pytest.raises(UsageError, match="inside the block"):
        loss.backward()


def test_adapters_stay_as_they_are_inside_rows(several, alone):
    with doralib.adapter_rows(several, ["maths"] * 4):
        for call in (
            lambda: doralib.delete_adapter(several, "maths"),
            lambda: doralib.set_adapter(several, "code"),
            lambda: doralib.load_adapter(several, alone["code"][0], "again"),
            lambda: doralib.add_weighted_adapter(several, {"maths": 1.0}, "sum"),
            lambda: doralib.remove(several),
        ):
            with pytest.raises(UsageError, match="inside a block"):
                call()
        with doralib.adapter_rows(several, ["code", "maths", None, "code"]):
            mixed = several(ids()).logits
        assert torch.equal(several(ids()).logits, alone["maths"][1])
    torch.testing.assert_close(mixed[3], alone["code"][1][3], rtol=1e-4, atol=1e-5)


def test_generate_on_the_command_line(alone, tiny_llama_folder, capsys, monkeypatch, tmp_path):
    from doralib.cli import main as cli

    def run(*arguments):
        options = ["--max-new-tokens", "3", *arguments]
        monkeypatch.setattr(sys, "argv", ["doralib", "generate", str(tiny_llama_folder), *options])
        try:
            cli.main()
        except SystemExit as done:
            return done.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    named = [f"--adapter={name}={alone[name][0]}" for name in ("maths", "words")]
    status, both, _ = run("--prompt", "a good", *named)
    assert status == 0
    for name, argument in zip(("maths", "words"), named, strict=True):
        status, answer, _ = run("--prompt", "a good", argument)
        assert status == 0
        assert f"{name}: {answer}" in both
    assert run("--prompt", "a good", "--adapter=maths")[::2] == (
        2,
        "doralib: --adapter maths: give a name and a path, NAME=PATH\n",
    )
    assert "--out is for one --adapter" in run("--prompt", "a good", "--out", str(tmp_path / "a.jsonl"), *named)[2]
