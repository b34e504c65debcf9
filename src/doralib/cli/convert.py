"""`doralib convert`."""

from rich.console import Group
from rich.table import Table

from ..checkpoints.convert import Conversion, ConversionRequest, convert_adapter
from ..console import console

# of a layer's change, in Frobenius norm: above it the LoRA is another adapter
_BAD = 0.1


def convert(request: ConversionRequest) -> Conversion:
    """Convert, and tell the user what was done and assumed.

    Raises:
        UsageError: if the request cannot be right, e.g. a base model is needed.
        DoraError: if the adapter is damaged, or anything of it would be lost.
    """
    done = convert_adapter(request)
    console.print(f"{request.adapter} ({done.source}): {done.layers} layers written as {request.to} to {done.out}")
    for note in done.notes:
        console.print(f"note: {note}")
    if done.errors:
        console.print(_table(done))
    return done


def _table(done: Conversion) -> Group:
    table = Table("layer", "rank", "error of the change", "error of the weight")
    for each in done.errors:
        table.add_row(each.layer, str(each.rank), f"{100 * each.relative:.3g} %", f"{100 * each.of_weight:.3g} %")
    lines = []
    if done.logits is not None:
        lines.append(f"logits differ by {100 * done.logits:.3g} %")
    worst = max(done.errors, key=lambda each: each.relative)
    if worst.relative > _BAD:
        lines.append(
            f"{worst.layer} loses {100 * worst.relative:.3g} % of its change: this LoRA is not the adapter. "
            "Merging loses nothing (doralib merge), a larger --rank loses less"
        )
    return Group(table, *lines)
