"""Merge adapters into a diffusion pipeline: its parts one by one, and all else of its folder as it is."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..disk import replacing
from ..errors import DoraError, UsageError
from ..files import write_json
from ..formats.files import read_any_format
from ..formats.pipeline import COMPONENTS, find_component
from .adapter import describe_base
from .merge import RECORD, Ingredient, MergeSummary, check_out, list_written_files, merge_checkpoint
from .replay import Replay, verify_bits


def merge_pipeline(
    adapters: Sequence[Ingredient],
    base: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    exact: bool = False,
) -> tuple[dict[str, MergeSummary], list[Replay]]:
    """Write the pipeline with adapters merged into each part that they have layers of; what was done, by part.

    Args:
        adapters: Of any format; one may be of several parts.
        base: The pipeline's folder.
        out: Made whole or not at all; what stands there is refused unless ``overwrite``.
        dtype: Of the parts that are merged into; None: as stored.
        exact: Make every bit of those again, and compare.

    Raises:
        UsageError: if an adapter has no layers of a part, or trained new tokens, which no pipeline holds.
        DoraError: if an adapter does not fit the pipeline; nothing is written then.
    """
    parts = {each.path: _list_parts(each, base) for each in adapters}
    wanted = [name for name in COMPONENTS if any(name in own for own in parts.values())]
    check_out(out, base, [each.path for each in adapters], overwrite)
    done: dict[str, MergeSummary] = {}
    replays = []
    with replacing(out) as part:
        shutil.copytree(base, part, ignore=lambda folder, _: wanted if Path(folder) == base else [], symlinks=False)
        for name in wanted:
            own = [_restrict(each, name) for each in adapters if name in parts[each.path]]
            summary = merge_checkpoint(own, base / name, part / name, dtype=dtype)
            # what one part leaves, another takes
            notes = tuple(note for note in summary.notes if "layers of other parts" not in note)
            done[name] = replace(summary, out=out / name, notes=notes)
            if exact:
                replays.append(_verify(part / name, own, base / name, dtype))
        record = {"base": str(base), "dtype": dtype, "adapters": [str(each.path) for each in adapters]}
        write_json(part / RECORD, {**record, "files": sorted(list_written_files(part))})
    return done, replays


def _restrict(adapter: Ingredient, part: str) -> Ingredient:
    """The adapter's layers of one part."""
    return replace(adapter, given=replace(adapter.given, component=part))


def _verify(merged: Path, own: Sequence[Ingredient], base: Path, dtype: str | None) -> Replay:
    replay = verify_bits(merged, own, base, dtype)
    if not replay.passed:
        raise DoraError(f"{base.name} is not bit for bit what base and adapters make:\n  {replay.text()}")
    return replay


def _list_parts(adapter: Ingredient, base: Path) -> set[str]:
    """The parts of the pipeline that an adapter has layers of."""
    state = read_any_format(adapter.path, describe_base(adapter.given, base))[1].state
    if state.rows:
        raise UsageError(
            f"{adapter.path} trained new tokens, and a pipeline's files have no place for them beside its tokenizers: "
            "load the adapter as it is, with the *_emb.safetensors beside it"
        )
    found = {find_component(name) for name in state.layers}
    if None in found or not found:
        raise UsageError(
            f"{adapter.path}: its layers do not say which part of the pipeline they are of; give one of them with "
            f"--base {base}/PART"
        )
    return {name for name in found if name}
