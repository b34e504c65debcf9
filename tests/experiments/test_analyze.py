"""How far weights moved: the paper's definitions in float64, every kind of source, steps of a run, spectra, pages."""

import csv
import json
import math

import pytest
import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import doralib
from doralib.checkpoints.safetensors import Checkpoint
from doralib.errors import DoraError, UsageError
from doralib.experiments.analyze.correlate import correlate
from doralib.experiments.analyze.measure import WeightMovement, find_spectrum, measure
from doralib.experiments.analyze.report import COLUMNS
from doralib.experiments.analyze.sources import find_sources

STEPS = 6


def by_definition(W_OI, V_OI):
    """Equations 3 and 4, row by row, in float64."""
    moved_m, moved_d = [], []
    for w, v in zip(W_OI.double(), V_OI.double(), strict=True):
        moved_m.append(abs(v.norm() - w.norm()))
        moved_d.append(1 - (v @ w) / (v.norm() * w.norm()))
    return float(sum(moved_m) / len(moved_m)), float(sum(moved_d) / len(moved_d))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and a short run of it by each of three methods."""
    folder = tmp_path_factory.mktemp("runs")
    make_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = [{"text": f"the movie {i}", "label": ("good", "bad")[i % 2]} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from doralib.recipe import Recipe
    from doralib.training.job import fine_tune

    for method in ("full", "lora", "dora"):
        adapter = {"method": method}
        if method != "full":
            adapter |= {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        training = {"learning_rate": 1e-2, "max_steps": STEPS, "per_device_train_batch_size": 8, "save_steps": 2}
        data = {"train": str(folder / "train.jsonl"), "style": "completion", "prompt": "{text}", "target": " {label}"}
        fine_tune(
            Recipe(
                model={"path": str(folder / "base"), "dtype": "float32"},
                data=data,
                adapter=adapter,
                training=training,
                out=str(folder / method),
            )
        )
    return folder


def base_of(folder):
    return Checkpoint.open(folder / "base")


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_definitions(runs, method):
    """Against the merged model of each method, as live weights."""
    model = make_llama()
    if method == "full":
        model.load_state_dict(load_file(runs / "full" / "model" / "model.safetensors"), strict=False)
    else:
        doralib.merge(doralib.load_adapter(model, runs / method))
    before, after = make_llama().state_dict(), model.state_dict()
    found = [*measure(find_sources(runs / method, base_of(runs)))]
    modules = {"q_proj", "v_proj", "down_proj"}
    assert {each.module for each in found} == (
        modules if method != "full" else modules | {"k_proj", "o_proj", "gate_proj", "up_proj"}
    )
    assert {each.layer for each in found} == {0, 1}
    for each in found:
        part = "mlp" if "down" in each.module or each.module in ("gate_proj", "up_proj") else "self_attn"
        name = f"model.layers.{each.layer}.{part}.{each.module}.weight"
        delta_m, delta_d = by_definition(before[name], after[name])
        assert each.delta_m == pytest.approx(delta_m, rel=1e-5)
        assert each.delta_d == pytest.approx(delta_d, rel=1e-4, abs=1e-12)
        assert (each.method, each.tuned, each.step) == (method, method, STEPS)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_every_step_of_a_run(runs, method):
    found = [*measure(find_sources(runs / method, base_of(runs), every_step=True), ["q_proj"])]
    assert [each.step for each in found] == [2, 2, 4, 4, 6, 6]
    first, _, _, _, last, _ = found
    assert 0 < first.delta_d < last.delta_d
    (end, _) = measure(find_sources(runs / method, base_of(runs)), ["q_proj"])
    assert (end.delta_m, end.delta_d) == pytest.approx((last.delta_m, last.delta_d), rel=1e-6)


def test_a_small_turn_is_told_from_none(tmp_path):
    """1 - cos of rows turned by 1e-3 is 5e-7, of which float32 has one digit."""
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = base.model.layers[0].self_attn.q_proj.weight
        side = torch.randn_like(weight)
        side -= (side * weight).sum(1, keepdim=True) / (weight * weight).sum(1, keepdim=True) * weight
        weight += 1e-3 * weight.norm(dim=1, keepdim=True) * side / side.norm(dim=1, keepdim=True)
    base.save_pretrained(tmp_path / "tuned")
    first, second = measure(find_sources(tmp_path / "tuned", Checkpoint.open(tmp_path / "base")), ["q_proj"])
    assert first.delta_d == pytest.approx(5e-7, rel=1e-2)
    assert (second.delta_m, second.delta_d) == (0, pytest.approx(0, abs=1e-15))


def test_an_adapter_of_another_tool_without_a_model(runs, tmp_path):
    """The paper's own numbers of a PEFT folder and of a kohya file of the same adapter."""
    from doralib.checkpoints.convert import ConversionRequest, convert_adapter

    convert_adapter(ConversionRequest(runs / "dora", "mlx", tmp_path / "mlx", base=str(runs / "base")))
    one = [*measure(find_sources(runs / "dora", base_of(runs)))]
    other = [*measure(find_sources(tmp_path / "mlx", base_of(runs)))]
    assert len(one) == len(other) == 6
    for a, b in zip(sorted(one, key=_place), sorted(other, key=_place), strict=True):
        assert (a.layer, a.module, a.method) == (b.layer, b.module, b.method)
        assert (a.delta_m, a.delta_d) == pytest.approx((b.delta_m, b.delta_d), rel=1e-4)
    assert {each.step for each in other} == {None}


def _place(each):
    return each.layer, each.module


def test_conv1d_rows_are_columns(tmp_path):
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone().T
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight += 0.1 * torch.randn(8, 32)
    model.save_pretrained(tmp_path / "tuned")
    (found,) = measure(find_sources(tmp_path / "tuned", Checkpoint.open(tmp_path / "base")), ["c_fc"])
    expected = by_definition(before, model.transformer.h[0].mlp.c_fc.weight.detach().T)
    assert (found.delta_m, found.delta_d) == pytest.approx(expected, rel=1e-6)


def test_large_matrices_are_read_some_rows_at_a_time(tmp_path, monkeypatch):
    from doralib.experiments.analyze import sources

    for name, shift in (("base", 0.0), ("tuned", 0.01)):
        torch.manual_seed(0)
        weight = torch.randn(64, 32)
        (tmp_path / name).mkdir()
        tensors = {"model.layers.0.q_proj.weight": weight + shift * torch.randn(64, 32)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.setattr(sources.F, "row_blocks", lambda O, I: (slice(at, at + 7) for at in range(0, O, 7)))
    read, whole = [], sources.read_rows
    monkeypatch.setattr(sources, "read_rows", lambda slot, rows: read.append(rows) or whole(slot, rows))
    (found,) = measure(find_sources(tmp_path / "tuned", Checkpoint.open(tmp_path / "base")))
    assert len(read) == 2 * math.ceil(64 / 7)
    pair = [*(load_file(tmp_path / name / "model.safetensors").values() for name in ("base", "tuned"))]
    pair = [tensor for (tensor,) in pair]
    assert (found.delta_m, found.delta_d) == pytest.approx(by_definition(*pair), rel=1e-9)


def test_what_cannot_be_analyzed(runs, tmp_path):
    base = base_of(runs)
    with pytest.raises(UsageError, match="is no run, and has no steps"):
        find_sources(runs / "full" / "model", base, every_step=True)
    with pytest.raises(UsageError, match="name runs, adapters"):
        find_sources(tmp_path / "none", base)
    make_llama(hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(DoraError, match="no matrix has a name and shape"):
        find_sources(tmp_path / "other", base)


# spectra


def test_spectra_and_intruders():
    g = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(40, 40, generator=g))
    V, _ = torch.linalg.qr(torch.randn(30, 30, generator=g))
    W_OI = U[:, :30] * torch.linspace(3, 1, 30) @ V.T
    still = find_spectrum(W_OI, W_OI * 1.01)
    assert still.intruders == 0
    assert still.values == pytest.approx([0.01 * value for value in torch.linspace(3, 1, 30).tolist()], rel=1e-3)
    # two directions that the weight has not, larger than all of its own
    new = find_spectrum(W_OI, W_OI + 9 * torch.outer(U[:, 35], V[:, 3]) + 8 * torch.outer(U[:, 36], V[:, 4]))
    assert new.intruders == 2
    assert new.values[:3] == pytest.approx([9, 8, 0], abs=1e-4)


# correlations


@pytest.mark.long
def test_correlations_are_pooled_and_beside_the_papers():
    pytest.importorskip("scipy")
    made = [
        WeightMovement("x", method, step, layer, module, sign * (layer + step), layer + step + (module == "v_proj"))
        for method, sign in (("full", -1), ("lora", 1))
        for step in (1, 2)
        for layer in range(4)
        for module in ("q_proj", "v_proj")
    ]
    found = {(each.method, each.module): each for each in correlate(made)}
    assert found.keys() == {(m, module) for m in ("full", "lora") for module in ("q_proj", "v_proj", "all")}
    assert found["full", "q_proj"].pearson.value == pytest.approx(-1)
    assert found["lora", "v_proj"].spearman.value == pytest.approx(1)
    assert 0.8 < found["lora", "all"].pearson.value < 1
    assert [found[m, "q_proj"].published for m in ("full", "lora")] == [-0.62, 0.83]
    assert found["full", "v_proj"].published is None
    assert found["full", "all"].points == 16


# the command


@pytest.mark.long
def test_the_command(runs, run, tmp_path):
    pytest.importorskip("scipy")
    out = tmp_path / "analysis"
    tuned = [runs / method for method in ("full", "lora", "dora")]
    words = ("analyze", runs / "base", *tuned, "--out", out, "--steps", "all", "--spectra")
    status, shown, err = run(*words, "--modules", "q_proj,v_proj")
    assert status == 0, err
    with (out / "analysis.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == 3 * 3 * 2 * 2
    assert {line["step"] for line in lines} == {"2", "4", "6"}
    with (out / "spectra.csv").open() as file:
        spectra = list(csv.DictReader(file))
    # the change of LoRA has rank 3
    values = [float(line["singular_value"]) for line in spectra if line["tuned"] == "lora" and line["step"] == "6"]
    assert sum(value > 1e-4 for value in values) == 3 * 4
    names = {path.stem for path in (out / "figures").iterdir()}
    assert names == {f"{kind}-{module}" for kind in ("scatter", "layers", "spectra") for module in ("q_proj", "v_proj")}
    page = (out / "analysis.html").read_text()
    assert page.count("data:image/png") == 6
    assert "-0.62" in page
    assert "+0.83" in shown
    status, _, err = run("analyze", runs / "base", runs / "dora", "--out", out, "--modules", "qproj")
    assert (status, "did you mean 'q_proj'" in err) == (2, True)
    status, _, err = run("analyze", runs / "base", runs / "dora", runs / "dora", "--out", out)
    assert (status, "two folders have this name" in err) == (2, True)
    assert run("analyze", runs / "base", runs / "dora", "--out", out, "--steps", "3")[0] == 2
