"""`doralib merge`: which files, what was done, and whether the merged model answers as the adapted one."""

from pathlib import Path

from rich.progress import Progress

from ..console import console
from ..errors import DoraError, UsageError
from ..files import read_json
from ..gguf import local_base
from ..merging import MergeSummary, merge_checkpoint
from ..verify import verify_merge


def merge_command(
    adapter: Path, base: str | None, out: Path, *, dtype: str | None, verify: bool, overwrite: bool
) -> MergeSummary:
    """Merge, print the summary, and with `verify` compare logits on real text.

    Raises:
        UsageError: if there is no adapter, or no base is named.
        DoraError: if the merged model does not answer as the adapted one does.
    """
    named = base or base_of(adapter)
    console.print(f"merging {adapter} into {named}")
    with local_base(named, out) as folder:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("merging", total=None)
            summary = merge_checkpoint(
                adapter,
                folder,
                out,
                dtype=dtype,
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        console.print(summary.text())
        if verify:
            check = verify_merge(out, adapter, folder, requantised=summary.requantised)
            console.print(check.text())
            if not check.passed:
                raise DoraError(f"{out}: the merged model does not answer as the adapted one does")
    return summary


def base_of(adapter: Path) -> str:
    """The model that an adapter names as its own."""
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise UsageError(f"{adapter} does not say which model it adapts; name it with --base MODEL")
    return str(named)
