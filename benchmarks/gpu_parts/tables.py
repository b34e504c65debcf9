"""The JSON as Markdown tables."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(data: dict[str, Any], path: Path) -> None:
    """Write every table whose rows are there."""
    machine = data["machine"]
    lines = [f"# {machine.get('gpu', 'dry run')}, " + ", ".join(f"{k} {v}" for k, v in machine.items() if k != "gpu")]
    for row in data.get("ceilings", []):
        lines.append("- " + ", ".join(f"{k}: {_text(v)}" for k, v in row.items()))
    for name in ("failures", "tune_failures", "block_failures", "skipped"):
        lines += [f"- {name}: {str(row)[:400]}" for row in data.get(name, [])[:6]]
    sections = [
        ("Worst errors in eps of the formula on absolute values", "checks", _check_row),
        ("Norm against float64", "norm_checks", lambda row: row),
        ("Freshness", "freshness", lambda row: row),
        ("Norm, microseconds on the device", "norm", _norm_row),
        ("Tiles", "tune", _tune_row),
        ("Layer step: PEFT LoRA in ms (median), the others as ratios to it", "layers", _step_row("step_ms")),
        ("Layer inference, likewise", "layers", _step_row("infer_ms")),
        ("Layer: bytes saved for backward (of these the output), MB", "layers", _saved_row),
        ("Layer: peak of a step, MB", "layers", _peak_row),
        ("Layer step as a replayed graph", "graphs", _step_row("step_ms")),
        ("Blocks, step ms and ratios", "blocks", _block_row),
        ("Blocks, peak of a step with adapter and optimizer, GB; ratios", "blocks", _block_memory_row),
        ("Loss curves", "losses", lambda row: {"method": row["method"], "losses": row["losses"]}),
        ("torch.compile", "compile", lambda row: row),
        ("NF4", "nf4", lambda row: row),
    ]  # fmt: skip
    for title, table, shape in sections:
        rows = [shaped for row in data.get(table, []) if (shaped := shape(row))]
        if rows:
            lines += ["", f"## {title}", "", *_table(rows)]
    path.write_text("\n".join(lines) + "\n")


def _table(rows: list[Row]) -> Iterable[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_row(row: Row) -> Row:
    return {k.removesuffix("_eps"): v for k, v in row.items() if not k.startswith(("y", "d")) or k.endswith("_eps")} | {
        "dtype": row["dtype"].removeprefix("torch.")
    }


def _norm_row(row: Row) -> Row:
    return {k.removesuffix("_us"): v for k, v in row.items() if k in ("O", "I", "R") or k.endswith(("_us", "_error"))}


def _tune_row(row: Row) -> Row:
    best = row["best"][0] if row["best"] else {}
    return {"kernel": row["kernel"], "sizes": row["sizes"], "default": row["default_us"], "best": best.get("us"),
            "tile": best.get("tile"), "unfused": (row["unfused"] or {}).get("us")}  # fmt: skip


def _step_row(which: str) -> Any:
    def shape(row: Row) -> Row | None:
        if which not in row:
            return None
        times = {name: found["median"] for name, found in row[which].items()}
        return {key: row[key] for key in ("O", "I", "R", "N")} | _ratios(times)

    return shape


def _ratios(values: dict[str, float]) -> Row:
    lora = values.get("peft_lora") or 1.0
    return {"peft_lora": lora} | {k: round(v / lora, 3) for k, v in values.items() if k != "peft_lora"}


def _saved_row(row: Row) -> Row | None:
    if "saved" not in row:
        return None
    sizes = {k: f"{total / 1e6:.1f} ({output / 1e6:.1f})" for k, (total, output) in row["saved"].items()}
    return {key: row[key] for key in ("O", "I", "R", "N")} | sizes


def _peak_row(row: Row) -> Row | None:
    if "peak" not in row:
        return None
    return {key: row[key] for key in ("O", "I", "R", "N")} | {k: round(v / 1e6, 1) for k, v in row["peak"].items()}


def _job(row: Row) -> Row:
    job = row["job"]
    return {"targets": len(job["targets"]), "R": job["R"], "tokens": f"{job['batch']}x{job['length']}",
            "accumulate": job["accumulate"], "checkpointing": job["checkpointing"]}  # fmt: skip


def _block_row(row: Row) -> Row:
    return _job(row) | _ratios({name: found["median"] for name, found in row["step_ms"].items()})


def _block_memory_row(row: Row) -> Row:
    total = {k: (row["base_bytes"] + row["own_bytes"][k] + peak) / 1e9 for k, peak in row["step_peak"].items()}
    return _job(row) | _ratios(total)
