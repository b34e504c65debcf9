"""The report's last word: the lines that load, merge, score and publish what was trained."""

import shlex
from pathlib import Path

from .markup import Child, Markup, el
from .runs import RunRecord


def use_section(record: RunRecord) -> Markup | None:
    """Commands and code with this run's own paths in them."""
    base = record.summary.get("base_model")
    if not base:
        return None
    parts = _full(record) if record.summary.get("method") == "full" else _adapter(record, str(base))
    content: list[Child] = []
    for title, code in parts.items():
        content += [el("h3", title), el("pre", code)]
    return el("section", el("h2", "Use it"), *content)


def _adapter(record: RunRecord, base: str) -> dict[str, str]:
    run, quoted = shlex.quote(str(record.path)), shlex.quote(base)
    return {
        "Try it": f"doralib generate {run}\n{_eval(record, run)}",
        "Merge it into a checkpoint of its own": f"doralib merge {run} --base {quoted} --out {run}-merged --verify",
        "Load it in Python": "from doralib.models import load_any\n\n"
        f"model, tokenizer = load_any({str(record.path)!r})",
        "Load it in PEFT": _peft(record.path, base),
    }


def _full(record: RunRecord) -> dict[str, str]:
    model, run = record.path / "model", shlex.quote(str(record.path))
    return {
        "Try it": f"doralib generate {run}\n{_eval(record, run)}",
        "Load it in transformers": f"from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(model)!r})",
    }


def _eval(record: RunRecord, run: str) -> str:
    settings = record.config.get("eval")
    tasks = settings.get("tasks") if isinstance(settings, dict) else None
    names = ",".join(str(task) for task in tasks) if tasks else "TASK.yaml"
    return f"doralib eval {run} --tasks {shlex.quote(names)}"


def _peft(run: Path, base: str) -> str:
    where, more = repr(base), ""
    if base.endswith(".gguf"):
        where, more = repr(str(Path(base).parent)), f", gguf_file={Path(base).name!r}"
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({where}{more})\n"
        f"model = PeftModel.from_pretrained(model, {str(run)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where}{more})"
    )
