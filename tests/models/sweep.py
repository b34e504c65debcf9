"""Every architecture of transformers, tiny: adapted, trained, merged, saved, loaded, and read by PEFT.

python tests/models/sweep.py [MODEL_TYPE ...]     runs these, or all, and keeps what it saw in results.json
python tests/models/sweep.py --write              writes docs/models.md from results.json
"""

import copy
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
import transformers
from peft import PeftModel

import doralib
from doralib.adapters.registry import places_of

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def try_architecture(model_type: str, kind: str, model_class: Any) -> dict[str, Any]:
    """What happened, by step; "not built" where transformers has no such tiny model."""
    row: dict[str, Any] = {"kind": kind, "class": model_class.__name__}
    try:
        model = tiny.build(kind, model_class, transformers.CONFIG_MAPPING[model_type])
        inputs, base = _find_inputs(model)
    except Exception as error:  # noqa: BLE001  whatever a foreign model raises
        return {**row, "not_built": _in_one_line(error)}
    for step in (_adapt, _train, _save_and_load, _let_peft_read, _merge):
        try:
            step(model, inputs, base, row)
        except Exception as error:  # noqa: BLE001
            row.setdefault("failed", {})[step.__name__.strip("_")] = _in_one_line(error)
            if step is _adapt:
                break
    return {key: value for key, value in row.items() if not key.startswith("_")}


def _find_inputs(model: Any) -> tuple[dict[str, Any], torch.Tensor]:
    problem: Exception = ValueError("no inputs are known for it")
    for inputs in tiny.make_inputs(model):
        try:
            with torch.no_grad():
                return inputs, tiny.run(model, inputs)
        except Exception as error:  # noqa: BLE001
            problem = error
    raise problem


def _adapt(model: Any, inputs: Any, base: torch.Tensor, row: dict[str, Any]) -> None:
    row["_fresh"] = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        doralib.adapt(model, doralib.DoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    row["left_out"] = [str(each.message) for each in told if "leaves out" in str(each.message)]
    row["layers"] = len(places_of(model))
    with torch.no_grad():
        row["identity"] = _distance(tiny.run(model, inputs), base) <= 1e-6


def _train(model: Any, inputs: Any, base: torch.Tensor, row: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW(doralib.parameter_groups(model, learning_rate=1e-2))
    watch = doralib.audit(model, optimizer, tell=lambda _: None)
    for _ in range(2):
        optimizer.zero_grad()
        tiny.run(model, inputs).float().square().mean().backward()
        optimizer.step()
    row["no_gradient"] = sorted({f"{each.name.rpartition('.')[2]}: {each.reason}" for each in watch.findings})
    row["in_vain"] = len(watch.findings)
    with torch.no_grad():
        torch.manual_seed(3)
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1 + 0.1 * torch.randn_like(p)).add_(0.02 * torch.randn_like(p))
        row["_adapted"] = tiny.run(model, inputs)


def _save_and_load(model: Any, inputs: Any, base: torch.Tensor, row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        doralib.save_adapter(model, folder)
        loaded = doralib.load_adapter(copy.deepcopy(row["_fresh"]), folder)
        row["loads"] = _distance(tiny.run(loaded, inputs), row["_adapted"]) <= 1e-6


def _let_peft_read(model: Any, inputs: Any, base: torch.Tensor, row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        doralib.save_adapter(model, folder)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            theirs = PeftModel.from_pretrained(copy.deepcopy(row["_fresh"]), folder).eval()
        if missing := [str(each.message) for each in told if "missing adapter keys" in str(each.message)]:
            raise ValueError(f"PEFT renames keys of the file: {missing[0]}")
        names = {
            name.removeprefix("base_model.model.")
            for name, module in theirs.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        }
        ours = {name for name, _ in places_of(model)}
        if names != ours:
            raise ValueError(f"PEFT adapts {sorted(names - ours)[:3]} too, and not {sorted(ours - names)[:3]}")
        row["peft"] = _distance(tiny.run(theirs.base_model.model, inputs), row["_adapted"]) <= 1e-4


def _merge(model: Any, inputs: Any, base: torch.Tensor, row: dict[str, Any]) -> None:
    with torch.no_grad():
        row["merges"] = _distance(tiny.run(doralib.merge(model), inputs), row["_adapted"]) <= 1e-4


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, in the largest element; where both are infinite or not numbers in the same places, these count not."""
    one, other = torch.nan_to_num(one.float(), 0, 0, 0), torch.nan_to_num(other.float(), 0, 0, 0)
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def sweep(wanted: list[str], results: Path) -> None:
    """Try these architectures, or all, and keep what was seen; one after the other, so that a stop loses nothing."""
    architectures = tiny.list_architectures()
    names = [name for name, (kind, _) in architectures.items() if not wanted or {name, kind} & set(wanted)]
    for model_type in names:
        row = try_architecture(model_type, *architectures[model_type])
        kept = json.loads(results.read_text()) if results.exists() else {}
        kept[model_type] = row
        results.write_text(json.dumps(dict(sorted(kept.items())), indent=1, sort_keys=True) + "\n")
        bad = {key: row[key] for key in ("failed",) if key in row}
        bad |= {key: False for key in ("identity", "loads", "peft", "merges") if row.get(key) is False}
        if row.get("in_vain") or bad:
            sys.stdout.write(f"{model_type} {bad} {row.get('no_gradient')}\n")
            sys.stdout.flush()


_HEAD = """# Models

Every architecture of transformers {version} that one of its Auto classes builds for causal language modeling, sequence
to sequence, masked language modeling, speech, images with text, classification (sequences, tokens, audio, images), or
as an encoder: each as a tiny model with random weights. All that is listed here without a remark held: `all-linear` was
adapted, a fresh adapter changed nothing, two steps of AdamW ran under the
[audit](layers.md#layers-that-no-adapter-reaches), the adapter was saved and loaded into a fresh model, PEFT {peft} read
it and adapted the same layers, and the merged model computed what the adapted one did.

`make models` runs all this anew and writes this page. It takes about an hour of one processor.
"""


def write_page(rows: dict[str, Any]) -> str:
    """docs/models.md of what was seen; it says what holds, and no number that depends on a machine."""
    import peft

    built = {name: row for name, row in rows.items() if "not_built" not in row}
    remarks = {name: _remarks(row) for name, row in built.items()}
    lines = [_HEAD.format(version=transformers.__version__, peft=peft.__version__)]
    lines += ["| kind | architectures | built | with a remark |", "|---|---|---|---|"]
    for kind in tiny.KINDS:
        ours = [name for name, row in rows.items() if row["kind"] == kind]
        counts = [sum(name in some for name in ours) for some in (rows, built, [n for n in remarks if remarks[n]])]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    lines += ["", "## Architectures with a remark", "", "| model type | class | remark |", "|---|---|---|"]
    lines += [f"| {name} | {built[name]['class']} | {'<br>'.join(told)} |" for name, told in remarks.items() if told]
    lines += ["", "## Architectures where everything holds", ""]
    for kind in tiny.KINDS:
        if names := [name for name, told in remarks.items() if not told and built[name]["kind"] == kind]:
            lines += [f"{kind}: {', '.join(names)}.", ""]
    lines += ["## Not built", "", "No tiny model of these could be made, or no inputs are known that it takes.", ""]
    lines += [", ".join(name for name, row in rows.items() if "not_built" in row) + ".", ""]
    return "\n".join(lines)


_WHY = {
    "ValueError: lora.ParamWrapper does not work with use_dora=True.": (
        "for this model type PEFT takes gate_proj, up_proj and down_proj for stacks of experts, where it has no DoRA"
    )
}


def _remarks(row: dict[str, Any]) -> list[str]:
    told = [f"left out: {each.removeprefix('all-linear leaves out ')}" for each in row.get("left_out", [])]
    by_reason: dict[str, list[str]] = {}
    for each in row.get("no_gradient", []):
        name, _, reason = each.partition(": ")
        by_reason.setdefault(reason, []).append(name)
    told += [f"no gradient here: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    for step, error in row.get("failed", {}).items():
        words = {"adapt": "refused", "let_peft_read": "PEFT does not read it"}.get(step, f"{step} fails")
        told.append(f"{words}: {_WHY.get(error, error)}")
    wrong = {"identity": "a fresh adapter changes rounding", "loads": "loads wrongly", "merges": "merges wrongly"}
    wrong["peft"] = "PEFT computes other numbers"
    told += [words for key, words in wrong.items() if row.get(key) is False]
    return [each.replace("|", "\\|").replace("<", "&lt;") for each in told]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    asked = sys.argv[1:]
    out = Path(asked[asked.index("--out") + 1]) if "--out" in asked else RESULTS
    if "--write" not in asked:
        sweep([name for name in asked if not name.startswith("-") and name != str(out)], out)
    if out == RESULTS:
        PAGE.write_text(write_page(json.loads(RESULTS.read_text())))
