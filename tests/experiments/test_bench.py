"""The measurements measure what they say: rounds, ratios, products, bytes, files. Never how long anything took."""

import io
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from doralib.cli.bench import rich_table
from doralib.errors import UsageError
from doralib.experiments.bench import figures, memory, workload
from doralib.experiments.bench.counting import ProductCounter, allocations, peak, saved_bytes
from doralib.experiments.bench.layer import OneLayer, Pass, counts
from doralib.experiments.bench.measure import Neighbors, Rounds, Turn, describe_machine, interleave, order_of
from doralib.experiments.bench.options import LayerOptions, MergeOptions, StepOptions, batch_of
from doralib.experiments.bench.runner import BENCHES, run_bench
from doralib.experiments.bench.subjects import (
    SUBJECTS,
    AdapterSettings,
    build,
    default_subjects,
    nudge,
    pairs,
    share_weights,
    trained_parameters,
)
from doralib.experiments.bench.tables import Bar, Bars, Goal, Report, markdown, timing_table
from doralib.experiments.bench.workload import TrainingStep, base_model, token_batch
from doralib.runs import plots

O, I, N, R = 7, 5, 11, 3
F32 = 4
STEP = {"model": "tiny", "tokens": "1x8", "dtype": "float32", "rounds": 3, "warmup": 1}


# ---- rounds


@pytest.mark.long
def test_every_subject_runs_once_a_round_and_each_begins_as_often():
    log = []
    turns = {name: Turn(lambda name=name: log.append(name)) for name in "abc"}
    rounds = interleave(turns, rounds=6, warmup=2)
    assert len(log) == 3 * 8
    assert all(sorted(log[i : i + 3]) == ["a", "b", "c"] for i in range(0, 24, 3))
    assert [log[i : i + 3] for i in range(6, 24, 3)] == rounds.orders
    assert sorted(order[0] for order in rounds.orders) == sorted("aabbcc")
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == dict.fromkeys("abc", 6)


def test_who_runs_before_whom_changes():
    before = {tuple(order_of(list("abcd"), k)[i : i + 2]) for k in range(8) for i in range(3)}
    assert ("a", "b") in before
    assert ("b", "a") in before


def test_preparation_is_done_before_every_run():
    log = []
    interleave({"a": Turn(lambda: log.append("run"), lambda: log.append("prepare"))}, rounds=2, warmup=1)
    assert log == ["prepare", "run"] * 3


def test_ratios_are_taken_within_a_round():
    # the machine is twice, then ten times as slow: the ratio of medians would say 1.5, each round says 2
    rounds = Rounds({"slow": [2.0, 4.0, 20.0], "fast": [1.0, 2.0, 10.0]}, [])
    ratio = rounds.summary([("slow", "fast"), ("slow", "absent")])["ratios"]
    assert ratio["slow / fast"]["all"] == [2.0, 2.0, 2.0]
    assert list(ratio) == ["slow / fast"]
    uneven = Rounds({"a": [1.0, 9.0, 5.0], "b": [2.0, 1.0, 5.0]}, []).summary([("a", "b")])
    assert uneven["ratios"]["a / b"]["median"] == 1.0
    assert uneven["ratios"]["a / b"]["of_minima"] == 1.0
    assert uneven["seconds"]["a"] == {"median": 5.0, "low": 3.0, "high": 7.0, "min": 1.0, "all": [1.0, 9.0, 5.0]}


def test_machine_says_where():
    found = describe_machine()
    assert {"cpu", "cores", "threads", "versions", "date", "load_average"} <= found.keys()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["peft"]
    cores = Neighbors().cores()
    assert cores is None or cores >= 0


# ---- subjects


def one_layer(dtype=torch.float32):
    return OneLayer(O, I, dtype), torch.randn(N, I).to(dtype), torch.randn(N, O).to(dtype)


def test_subjects_share_the_frozen_weights():
    base, _ = base_model("tiny", None, "float32")
    pointers = {p.data_ptr() for p in base.parameters()}
    for name in SUBJECTS:
        model = build(name, base, AdapterSettings())
        mine = {id(p) for p in trained_parameters(model)}
        assert {p.data_ptr() for p in model.parameters() if id(p) not in mine} == pointers, name
        assert bool(mine) == (name not in ("base", "frozen"))
    # the base itself got no adapter
    assert not any("lora" in name for name, _ in base.named_modules())


def test_every_subject_trains_and_the_first_loss_is_the_models():
    base, described = base_model("tiny", None, "float32")
    batch = token_batch(described["vocab_size"], 2, 8)
    assert torch.equal(batch["input_ids"], token_batch(described["vocab_size"], 2, 8)["input_ids"])
    losses = {}
    for name in [*default_subjects("float32", 0.0), "ours-dora-exact"]:
        step = TrainingStep(build(name, base, AdapterSettings()), batch, checkpointing=name == "ours-dora")
        before = [p.detach().clone() for p in trained_parameters(step.model)]
        losses[name] = step()
        assert all(p.grad is None for p in step.model.parameters())
        assert (name == "frozen") == (step.state_bytes() == 0)
        if before:
            assert any(not torch.equal(p, old) for p, old in zip(trained_parameters(step.model), before, strict=True))
    assert max(losses.values()) - min(losses.values()) < 1e-5


def test_frozen_is_the_floor_of_a_step():
    """Forward and the gradient of the embeddings' output: two products a layer, and no more."""
    base, described = base_model("tiny", None, "float32")
    step = TrainingStep(build("frozen", base, AdapterSettings()), token_batch(described["vocab_size"], 1, 8))
    with ProductCounter() as counter:
        step()
    layers = described["num_hidden_layers"] * 7 + 1
    attention = counter.calls - 2 * layers
    assert attention in (0, 2 * described["num_hidden_layers"] * 2, 3 * described["num_hidden_layers"] * 2), attention


def test_a_shortened_model_keeps_the_heads_share():
    base, described = base_model("smollm2", 1, "float32")
    assert described["weights"] == "random"
    assert described["num_hidden_layers"] == len(base.model.layers) == 1
    assert described["vocab_size"] == round(49152 / 30 / 64) * 64


def test_unknown_subject_is_refused():
    with pytest.raises(UsageError, match="did you mean 'ours-dora'"):
        build("our-dora", OneLayer(O, I, torch.float32), AdapterSettings())


def test_pairs():
    assert pairs(["frozen", "peft-lora", "peft-dora", "ours-dora"]) == [
        ("frozen", "peft-lora"),
        ("peft-dora", "peft-lora"),
        ("ours-dora", "peft-lora"),
        ("ours-dora", "peft-dora"),
    ]


# ---- counting


def test_products_of_known_calls():
    a, b, c = torch.randn(2, 3), torch.randn(3, 5), torch.randn(2, 5)
    with ProductCounter() as counter:
        a @ b
        c.addmm_(a, b)
        torch.nn.functional.linear(a, b.T)
        a + a
        b.T @ torch.randn(3)
    assert counter.flops == [2 * 2 * 3 * 5] * 3 + [2 * 3 * 5]


@pytest.mark.parametrize(
    ("name", "dropout", "fresh", "again"),
    [
        ("frozen", 0.0, 2, 2),  # x Wᵀ, dy W
        ("peft-lora", 0.0, 8, 8),  # forward x Wᵀ, x Aᵀ, (x Aᵀ) Bᵀ; backward dy W and, of both factors, two each
        ("ours-lora", 0.0, 8, 8),
        ("peft-dora", 0.0, 10, 10),  # and B A as two products with the unit matrix, every time
        ("ours-dora", 0.0, 11, 8),  # and W Aᵀ, A Aᵀ, B (A Aᵀ), all small, after an optimizer step only
        ("peft-dora", 0.05, 12, 12),  # the base once more, forward and backward
        ("ours-dora-adapter", 0.05, 11, 8),
        ("ours-dora-exact", 0.05, 13, 10),  # the base once more, forward and backward
    ],
)
def test_products_of_a_layer(name, dropout, fresh, again):
    base, x, dy = one_layer()
    found = counts(build(name, base, AdapterSettings(R, dropout, ("proj",))).train(), x, dy)
    assert found["products, fresh"]["calls"] == fresh
    assert found["products, next micro-batch"]["calls"] == again
    base_flops, factor_flops = 2 * N * O * I, 2 * N * R * (I + O)
    bases = 4 if dropout and name != "ours-dora-adapter" else 2
    flops = bases * base_flops
    if name.startswith("ours") and not dropout:
        flops += 2 * factor_flops + 2 * (2 * O * I * R)  # N > I: the effective weight, made in each pass
    elif name != "frozen":
        flops += 3 * factor_flops
    if not name.startswith("peft-dora"):
        assert found["products, next micro-batch"]["flops"] == flops
    if name in ("ours-dora", "ours-dora-adapter"):
        # U = W Aᵀ, A Aᵀ, B (A Aᵀ)
        assert found["products, fresh"]["flops"] == flops + 2 * O * I * R + 2 * R * I * R + 2 * O * R * R


@pytest.mark.parametrize(
    ("name", "output", "rest"),
    [
        ("frozen", 0, 0),
        ("peft-lora", 0, N * R),
        ("ours-lora", 0, N * R + O * R),  # x Aᵀ, s g B
        ("ours-dora", N * O, N * R + O * R),
    ],
)
def test_saved_bytes_of_a_layer(name, output, rest):
    base, x, dy = one_layer()
    model = build(name, base, AdapterSettings(R, targets=("proj",))).train()
    once = Pass(model, x, dy)
    once()
    saved = saved_bytes(once.model, once.x, model.parameters())
    assert saved.input == (0 if name == "frozen" else N * I * F32)
    assert saved.output == output * F32
    assert saved.rest == rest * F32
    assert saved.with_output - saved.without_output == saved.output
    assert saved.to_json()["with_output"] == saved.with_output


def test_memory_that_is_shared_is_counted_once():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x[:2], x + 1)
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy

    x = torch.randn(6, 4, requires_grad=True)
    saved = saved_bytes(Twice.apply, x, [])
    assert (saved.input, saved.output, saved.weights, saved.rest) == (96, 0, 0, 96)


def test_allocations_and_their_peak():
    x = torch.ones(256, 256)
    size = x.nbytes

    def run():
        y = x + 1
        z = y * 2
        del y
        return z + z

    sizes = allocations(run)
    assert sizes.count(size) == 3
    assert 2 * size <= peak(sizes) < 2 * size + 100  # and a few scalars
    assert peak([5, -5, 4, 4, -8, 1]) == 8
    assert peak([]) == 0


def test_a_norm_refresh_of_ours_makes_nothing_of_the_weights_size():
    big = OneLayer(96, 4096, torch.float32)
    x, dy = torch.randn(4, 4096), torch.randn(4, 96)
    found = {
        name: counts(build(name, big, AdapterSettings(2, targets=("proj",))).train(), x, dy)["largest temporary"]
        for name in ("ours-dora", "peft-dora")
    }
    weight = 96 * 4096 * F32
    assert found["peft-dora"] >= weight
    assert found["ours-dora"] < weight / 8


def test_a_nudge_makes_the_norm_stale():
    base, x, _ = one_layer()
    model = build("ours-dora", base, AdapterSettings(R, targets=("proj",)))
    nudge(model, size=0.5)
    before = model(x)
    nudge(model, size=0.5)
    assert not torch.allclose(before, model(x))


def test_share_keeps_tensors_and_copies_modules():
    base, _, _ = one_layer()
    other = share_weights(base)
    assert other.proj is not base.proj
    assert other.proj.weight is base.proj.weight


# ---- options


def test_options_take_texts_with_commas():
    options = StepOptions(dtype="float32,bfloat16", tokens="4x256, 64", dropout="0,0.05")
    assert options.dtype == ("float32", "bfloat16")
    assert [batch_of(text) for text in options.tokens] == [(4, 256), (1, 64)]
    assert options.dropout == (0.0, 0.05)
    assert LayerOptions(tokens=256).tokens == ("256",)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("stepp", {}, "did you mean 'step'"),
        ("step", {"round": 3}, "did you mean 'rounds'"),
        ("step", {"tokens": "many"}, "tokens"),
        ("step", {"dtype": "float8"}, "dtype"),
        ("step", {"subjects": "peft-lorra", **STEP}, "did you mean 'peft-lora'"),
        ("all", {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_runs(tmp_path, name, options, said):
    with pytest.raises(UsageError, match=said):
        run_bench(name, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_quick_values_are_settings():
    for bench in BENCHES.values():
        bench.options(**bench.options.QUICK)
    with pytest.raises(UsageError):
        MergeOptions(warmup=1)


# ---- whole measurements, on sizes that take seconds


def written(out: Path, name: str) -> dict:
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.md").read_text().startswith("# ")
    value = json.loads((out / f"{name}.json").read_text())
    assert {"bench", "machine", "settings", "notes", "goals", "cases"} <= value.keys()
    assert "cores_busy_elsewhere" in value["machine"]
    return value


@pytest.mark.long
def test_step(tmp_path):
    returned = run_bench("step", tmp_path, **STEP | {"dtype": "float32,bfloat16", "dropout": "0,0.05"})
    value = written(tmp_path, "step")
    assert value["cases"] == returned["cases"]
    assert len(value["cases"]) == 4
    for case in value["cases"]:
        settings = case["settings"]
        names = default_subjects(settings["dtype"], settings["dropout"])
        assert list(case["seconds"]) == names
        assert all(len(seconds["all"]) == 3 for seconds in case["seconds"].values())
        assert len(case["orders"]) == 3
        assert [order[0] for order in case["orders"]] == names[:3]
        for key, ratio in case["ratios"].items():
            over, under = (case["seconds"][name]["all"] for name in key.split(" / "))
            assert ratio["all"] == [a / b for a, b in zip(over, under, strict=True)]
        assert settings["vocab_size"] == 128
    goals = [goal["what"] for goal in value["goals"]]
    assert len(goals) == 6
    assert any("ours-dora-exact / peft-dora" in goal for goal in goals)


def test_layer(tmp_path):
    run_bench("layer", tmp_path, shapes="9x6", tokens="5", dtype="float32", dropout=0.0, rounds=2, warmup=0, r=2)
    (case,) = written(tmp_path, "layer")["cases"]
    assert case["counts"]["ours-dora"]["products, next micro-batch"]["calls"] == 8
    assert case["ratios"].keys() >= {"ours-dora / peft-lora", "ours-dora / peft-dora", "frozen / peft-lora"}


def test_rank(tmp_path):
    options = {"model": "tiny", "layers": None, "tokens": "1x8", "rounds": 2, "warmup": 0, "ranks": "2,4"}
    run_bench("rank", tmp_path, **options)
    value = written(tmp_path, "rank")
    (case,) = value["cases"]
    assert list(case["seconds"]) == ["peft-lora r2", "ours-dora r2", "peft-lora r4", "ours-dora r4"]
    assert case["ratios"].keys() == {
        "ours-dora r2 / peft-lora r2",
        "ours-dora r4 / peft-lora r4",
        "peft-lora r4 / peft-lora r2",
        "ours-dora r4 / peft-lora r2",
    }
    assert len(value["goals"]) == 2


@pytest.mark.long
def test_accelerate(tmp_path):
    run_bench("accelerate", tmp_path, **STEP | {"dtype": "float32,bfloat16", "dropout": "0,0.05", "rounds": 2})
    value = written(tmp_path, "accelerate")
    assert len(value["cases"]) == 4
    for case in value["cases"]:
        assert list(case["seconds"]) == ["peft-lora", "peft-dora", "peft-dora-accelerated"]
        assert case["ratios"].keys() == {
            "peft-dora / peft-lora",
            "peft-dora-accelerated / peft-lora",
            "peft-dora-accelerated / peft-dora",
        }
        small = 1e-5 if case["settings"]["dtype"] == "float32" else 0.05
        assert 0 < case["agreement"]["logits"] < small
        assert 0 < case["agreement"]["gradient"] < small
        losses = case["first_losses"].values()
        assert max(losses) - min(losses) < (0.05 if small > 1e-5 else 1e-5)
    assert [goal["goal"] for goal in value["goals"]] == [1.0] * 4


def test_generate(tmp_path):
    options = {"model": "tiny", "dtype": "float32", "rounds": 2, "warmup": 0, "prompt": 3, "new": 4}
    run_bench("generate", tmp_path, **options)
    (case,) = written(tmp_path, "generate")["cases"]
    speeds, seconds = case["tokens_per_second"], case["seconds"]
    assert speeds.keys() == {
        *("base", "peft-lora", "peft-dora", "peft-dora-cached"),
        *("ours-lora", "ours-dora", "ours-dora-unchanged"),
    }
    assert speeds["base"]["all"] == [4 / s for s in seconds["base"]["all"]]


@pytest.mark.long
def test_profile(tmp_path):
    """Every operator once: the large products are counted as they are, and the rows add up to the whole."""
    options = {"model": "tiny", "dtype": "float32", "rounds": 2, "warmup": 1, "tokens": "1x8"}
    run_bench("profile", tmp_path, **options)
    (case,) = written(tmp_path, "profile")["cases"]
    found = case["subjects"]
    assert list(found) == ["frozen", "peft-lora", "peft-dora", "ours-lora", "ours-dora"]
    for subject in found.values():
        parts = sum(operator["seconds"] for operator in subject["operators"].values())
        assert parts == pytest.approx(statistics.mean(subject["seconds"]["all"]))
    calls = {name: own["operators"]["aten::linear"]["calls"] for name, own in found.items()}
    # two layers of seven and the head; PEFT calls it for both factors of five targets, we for neither
    assert (calls["frozen"], calls["peft-lora"], calls["ours-dora"]) == (15, 15 + 2 * 2 * 5, 15)
    sweeps = "aten::native_batch_norm_backward"
    assert found["ours-dora"]["operators"][sweeps]["calls"] == 10
    assert sweeps not in found["ours-lora"]["operators"]
    text = (tmp_path / "profile.md").read_text()
    assert sweeps in text
    assert "together" in text


def test_generation_goes_on_from_the_prompt_each_time():
    from doralib.experiments.bench.generate import Writer

    base, _ = base_model("tiny", None, "float32")
    prompt = token_batch(128, 1, 6)["input_ids"]
    writer = Writer(build("base", base, AdapterSettings()), prompt, 5)
    texts = []
    for _ in range(2):
        writer.read_prompt()
        writer.write()
        texts.append(torch.cat(writer.written, 1))
    # greedy without a cache, the whole text read anew for every token
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], ids[:, 6:])


def test_adapt(tmp_path):
    run_bench("adapt", tmp_path, quick=True, divide=64, layers=1)
    value = written(tmp_path, "adapt")
    meta, real = value["cases"]
    assert meta["settings"]["adapted"] == real["settings"]["adapted"] == 5
    assert {"one pass", "ours-dora", "peft-dora"} <= real["seconds"].keys()
    assert "ours-dora" in meta["seconds"]
    assert not {"ours-dora", "ours-lora"} & (meta["failed"].keys() | real["failed"].keys())


def test_memory_of_one_subject_in_this_process():
    request = {"model": "tiny", "layers": None, "r": 4, "dtype": "float32", "tokens": "1x16", "dropout": 0.0}
    found = {
        name: memory.measure_subject({**request, "subject": name, "checkpointing": False})
        for name in ("frozen", "peft-lora", "ours-dora")
    }
    base, _ = base_model("tiny", None, "float32")
    weights = sum(p.nbytes for p in base.parameters())
    assert weights <= found["frozen"]["model_bytes"] < weights + 1000
    assert found["frozen"]["optimizer_bytes"] == 0
    assert found["peft-lora"]["optimizer_bytes"] > 0
    for each in found.values():
        assert each["total_bytes"] == each["model_bytes"] + each["optimizer_bytes"] + each["step_bytes"]
        # at least the logits and their gradient
        assert each["step_bytes"] >= 2 * 16 * 128 * F32


@pytest.mark.long
def test_memory(tmp_path):
    subjects = "peft-lora,ours-dora"
    options = {"model": "tiny", "tokens": "1x8", "dtype": "float32", "checkpointing": "off", "rounds": 1}
    run_bench("memory", tmp_path, subjects=subjects, **options)
    value = written(tmp_path, "memory")
    (case,) = value["cases"]
    run = case["runs"]["ours-dora"][0]
    under = case["runs"]["peft-lora"][0]
    assert case["ratios"]["total_bytes"]["ours-dora / peft-lora"]["all"] == [run["total_bytes"] / under["total_bytes"]]
    assert {goal["goal"] for goal in value["goals"]} == {1.1}


def test_qdora(tmp_path, monkeypatch, even_llama_folder):
    """All subjects on one NF4 base: fresh adapters change nothing, so they begin with the same loss."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr(memory, "_in_a_process", memory.measure_subject)
    options = {"model": str(even_llama_folder), "tokens": "1x8", "dtype": "float32", "checkpointing": "off", "r": 2}
    run_bench("qdora", tmp_path, rounds=2, warmup=0, processes=1, **options)
    value = written(tmp_path, "qdora")
    timed, held = value["cases"]
    losses = timed["first_losses"]
    assert set(losses) == {"frozen", "peft-lora", "peft-dora", "ours-lora", "ours-dora"}
    assert list(losses.values()) == pytest.approx([losses["frozen"]] * 5, rel=1e-5)
    assert (timed["settings"]["quantization"], held["settings"]["quantization"]) == ("nf4", "nf4")
    # the weights of the layers in 4 bits
    plain, _ = base_model(str(even_llama_folder), None, "float32")
    assert held["runs"]["frozen"][0]["model_bytes"] < 0.6 * sum(p.nbytes for p in plain.parameters())
    pair = "ours-dora / peft-lora"
    assert {goal["what"].rpartition(": ")[2] for goal in value["goals"]} == {pair}
    assert {goal["goal"] for goal in value["goals"]} == {1.05}
    assert [goal["measured"] for goal in value["goals"]][:2] == [
        timed["ratios"][pair]["median"],
        held["ratios"]["total_bytes"][pair]["median"],
    ]
    with pytest.raises(UsageError, match="nf4"):
        run_bench("qdora", tmp_path, quantization="int3")


def test_the_demos_model_is_the_default(tmp_path, monkeypatch, tiny_llama_folder):
    monkeypatch.setattr(workload, "DEMO_MODEL", tiny_llama_folder)
    _, described = base_model(None, None, "float32")
    assert (described["model"], described["weights"]) == (str(tiny_llama_folder), "its own")
    monkeypatch.setattr(workload, "DEMO_MODEL", tmp_path / "absent")
    _, described = base_model(None, 1, "float32")
    assert described["model"] == "smollm2"


def test_a_busy_machine_is_named_in_the_report():
    report = Report("x", "X", {}, Bars("", ""), goals=[Goal("a | b", 2.0, 1.0)])
    where = {**describe_machine(), "cores_busy_elsewhere": 1.5}
    assert "not to be quoted" in markdown(report, where)
    assert "not to be quoted" not in markdown(report, where | {"cores_busy_elsewhere": 0.0})
    assert "| a / b | 2 | 1 | no |" in markdown(report, where)
    assert report.to_json(where)["goals"] == [{"what": "a | b", "measured": 2.0, "goal": 1.0, "met": False}]


MARKED = "before\n<!-- measured -->\nold 9.99\n<!-- /measured -->\nafter\n"


def written_results(folder):
    """Two small measurements as `doralib bench` leaves them."""
    machine = {"cpu": "X", "cores": 2, "versions": {"torch": "2"}, "date": "2026-01-01T00", "cores_busy_elsewhere": 0.1}
    goal = {"measured": 1.23456, "goal": 1.0, "met": False}
    step = {
        "bench": "step",
        "title": "A training step",
        "machine": machine,
        "goals": [
            {"what": "f32: ours-dora / peft-lora", **goal},
            {"what": "f32, dropout 0.05: ours-dora-exact / peft-dora", **goal, "measured": 9.0},
            {"what": "bf16: ours-dora / peft-lora", **goal, "measured": 0.5, "met": True},
        ],
        "settings": {"rounds": 5, "r": 16, "dropout": [0.05]},
        "cases": [
            {"name": "f32", "seconds": {"ours-dora": {"median": 2.0}, "peft-lora": {"median": 3.0}}},
            {
                "name": "f32, dropout 0.05",
                "seconds": {"ours-dora-exact": {"median": 4.0}, "peft-dora": {"median": 5.0}},
            },
            {"name": "bf16", "seconds": {"ours-dora": {"median": 6.0}, "peft-lora": {"median": 7.0}}},
        ],
    }
    rank = {
        "bench": "rank",
        "title": "A step by rank",
        "machine": machine,
        "goals": [
            {"what": f"f32: ours-dora r{r} / peft-lora r{r}", **goal, "measured": measured}
            for r, measured in {8: 0.9, 512: 1.1}.items()
        ],
        "settings": {},
        "cases": [],
    }
    memory = {
        "bench": "memory",
        "title": "Peak memory, doralib.x",
        "machine": {**machine, "cores_busy_elsewhere": 0.25},
        "goals": [
            {"what": "f32: bytes saved", **goal, "measured": 2e9, "goal": 1e9},
            {"what": "f32, total bytes: ours-dora / peft-dora", **goal},
        ],
        "settings": {},
        "cases": [
            {"name": "f32", "bytes": {"total_bytes": {"ours-dora": {"median": 2e6}, "peft-dora": {"median": 3e6}}}}
        ],
    }
    profile = {"bench": "profile", "title": "No goals", "machine": machine, "goals": [], "settings": {}, "cases": []}
    for report in (memory, rank, step, profile):
        (folder / f"{report['bench']}.json").write_text(json.dumps(report))


def test_the_pages_tables_come_from_the_json(tmp_path):
    from doralib.experiments.bench.readme import update_pages

    readme, page = tmp_path / "README.md", tmp_path / "bench.md"
    written_results(tmp_path)
    readme.write_text(MARKED)
    page.write_text(MARKED)
    update_pages(readme, page, tmp_path)

    assert readme.read_text().splitlines() == [
        "before",
        "<!-- measured -->",
        "| what | result | goals met | reproduce with |",
        "|---|---|---:|---|",
        "| [A training step](docs/bench.md#a-training-step) | DoRA / PEFT LoRA: 0.5 to 1.23 | 1 of 3 "
        "| `doralib bench step rounds=5 dropout=0.05` |",
        "| [Peak memory, doralib.x](docs/bench.md#peak-memory-doralibx) | bytes saved: 2.0 GB (f32) | 0 of 2 "
        "| `doralib bench memory` |",
        "| [A step by rank](docs/bench.md#a-step-by-rank) | DoRA / PEFT LoRA: 0.9 to 1.1 | 0 of 2 "
        "| `doralib bench rank` |",
        "",
        "Measured on X, 2 cores, torch 2, 2026-01-01; other processes kept at most 0.25 cores busy.",
        "<!-- /measured -->",
        "after",
    ]

    text = page.read_text()
    lines = text.splitlines()
    first, second = lines.index("### A training step"), lines.index("### Peak memory, doralib.x")
    assert first < second  # as `doralib bench all` runs them
    assert lines[first + 2] == "`doralib bench step rounds=5 dropout=0.05`"
    assert lines[first + 6 : first + 9] == [
        "| f32 | ours-dora 2 s | peft-lora 3 s | 1.23 | 1 | no |",
        "| f32, dropout 0.05 | ours-dora-exact 4 s | peft-dora 5 s | 9 | 1 | no |",
        "| bf16 | ours-dora 6 s | peft-lora 7 s | 0.5 | 1 | yes |",
    ]
    assert lines[second + 2] == "`doralib bench memory`"
    assert lines[second + 6 : second + 8] == [
        "| f32: bytes saved | 2.0 GB |  |  | 1.0 GB | no |",
        "| f32, total bytes | ours-dora 2.0 MB | peft-dora 3.0 MB | 1.23 | 1 | no |",
    ]
    assert "9.99" not in text
    assert "No goals" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_pages_that_cannot_be_filled_are_named_and_left_alone(tmp_path):
    from doralib.experiments.bench.readme import update_pages

    readme, page, empty = tmp_path / "README.md", tmp_path / "bench.md", tmp_path / "empty"
    empty.mkdir()
    readme.write_text(MARKED)
    page.write_text(MARKED)
    with pytest.raises(UsageError, match="doralib bench all"):
        update_pages(readme, page, empty)
    page.write_text("no marks")
    written_results(tmp_path)
    with pytest.raises(UsageError, match=r"bench\.md has no lines"):
        update_pages(readme, page, tmp_path)
    assert (readme.read_text(), page.read_text()) == (MARKED, "no marks")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_name_in_a_table_is_cut(width):
    from rich.console import Console

    ratio = {"median": 1.238, "low": 1.176, "high": 1.262, "of_minima": 1.244}
    seconds = {"median": 1.573, "low": 1.48, "high": 1.656, "min": 1.456}
    ratios = {f"{name} / {other}": ratio for name in SUBJECTS for other in ("peft-lora", "peft-dora")}
    table = timing_table({"name": "float32", "ratios": ratios, "seconds": dict.fromkeys(SUBJECTS, seconds)})
    page = Console(file=io.StringIO(), width=width)
    page.print(rich_table(table))
    lines = page.file.getvalue().splitlines()
    assert all(len(line) == width for line in lines[1:2])
    firsts = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [name for name in firsts if name] == list(SUBJECTS)
    assert "…" not in page.file.getvalue()


def test_the_line_of_the_reference_crosses_no_title(tmp_path, monkeypatch):
    drawn = []

    def new_figure(**size):
        drawn.append(plots.new_figure(**size))
        return drawn[0]

    monkeypatch.setattr(figures, "new_figure", new_figure)
    groups = {name: [Bar("frozen", 0.9, 0.8, 1.0), Bar("ours", 1.1, 1.0, 1.2)] for name in ("a title", "another")}
    figures.write_bars(Bars("t", "x", groups), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    titles = [text.get_position()[1] for text in axes.texts if text.get_text() in groups]
    dashed = [c for c in axes.collections if c.get_linestyle()[0][1] is not None]
    spans = [sorted(y for _, y in segment) for c in dashed for segment in c.get_segments()]
    assert len(spans) == len(titles) == 2
    assert not any(low <= at <= high for at in titles for low, high in spans)
    assert not [line for line in axes.lines if line.get_linestyle() == "--"]


def test_without_peft_the_rows_are_there_and_a_measurement_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft.helpers", None)
    model = OneLayer(4, 3, torch.float32)
    build("ours-dora", model, AdapterSettings(2, targets=("proj",)))
    for call in (lambda: build("peft-dora", model, AdapterSettings(2)), lambda: run_bench("layer", tmp_path)):
        with pytest.raises(UsageError, match="PEFT, which is not installed: pip install peft"):
            call()
