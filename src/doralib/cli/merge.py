"""`doralib merge`: which files, what was done, and whether the merged model answers as the adapted one."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from ..errors import DoraError, UsageError, collecting, raise_all
from .console import console, print_json
from .options import AllowNonfinite, Alpha, Component, Json, Overwrite, Revision, Variant, VerifyingCommand

if TYPE_CHECKING:
    from ..checkpoints.merge import Ingredient, MergeSummary


def merge_command(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Runs, adapter folders or files, of any format.")
    ],
    base: Annotated[str | None, typer.Option(help="Checkpoint folder, .gguf or hub name; else what it names.")] = None,
    out: Annotated[Path, typer.Option(help="The merged checkpoint's folder.")] = ...,  # type: ignore[assignment]
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as the base.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Once for each adapter, in their order: its share; else 1.")
    ] = None,
    revision: Revision = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    component: Component = None,
    variant: Variant = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied output head a tensor of its own.")] = False,
    verify: Annotated[
        list[str] | None,
        typer.Option(metavar="[logits|exact]", help="Compare logits on text, or every bit; or both."),
    ] = None,
    server: Annotated[
        str | None, typer.Option("--for", help="vllm, llama.cpp or ollama: make the folder ready for that server.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint."""
    from ..checkpoints.deploy import check_server, prepare_for
    from ..checkpoints.kind import find_pipeline_folder
    from ..checkpoints.merge import Ingredient
    from ..checkpoints.visual_file import read_visual
    from ..formats.base import Hints
    from ..hub import add_revision, fetch_folder

    adapters = [fetch_folder(add_revision(each, revision)) for each in adapters]
    if server is not None:
        check_server(server)
    if any(read_visual(each) is not None for each in adapters):
        given: dict[str, object] = {"--weight": weight, "--component": component, "--variant": variant, "--for": server}
        given |= {"--untie": untie, "--alpha": alpha, "--verify exact": "exact" in (verify or ())}
        _merge_visual(adapters, base, out, dtype, overwrite, [name for name, value in given.items() if value])
        return
    each = Ingredient(Path(), given=Hints(alpha=alpha, component=component, allow_nonfinite=allow_nonfinite))
    pipeline = find_pipeline_folder(adapters[0], base)
    if pipeline is not None:
        asked = {"--component": component, "--variant": variant, "--for": server, "--untie": untie or None}
        if wrong := [option for option, value in asked.items() if value is not None]:
            raise UsageError(
                f"{', '.join(wrong)}: is for one model, and {pipeline} is a pipeline; give --base {pipeline}/unet"
            )
        merge_parts(with_weights(adapters, weight or [], each), pipeline, out, dtype, verify or (), overwrite, as_json)
        return
    summary = merge_and_show(
        with_weights(adapters, weight or [], each),
        base,
        out,
        dtype=dtype,
        untie=untie,
        verify=verify or (),
        overwrite=overwrite,
        variant=variant,
    )
    for line in prepare_for(server, out) if server is not None else ():
        console.print(line)
    if as_json:
        print_json(asdict(summary))


def _merge_visual(
    adapters: Sequence[Path], base: str | None, out: Path, dtype: str | None, overwrite: bool, others: Sequence[str]
) -> None:
    """Merge the one adapter of a VL-BART, whose logits are always compared.

    Args:
        others: Options that were given and mean nothing here.

    Raises:
        UsageError: if there are several adapters, or such options.
    """
    from ..checkpoints.merge_visual import merge_visual

    if len(adapters) > 1 or others:
        what = ", ".join(others) or "several adapters"
        raise UsageError(f"{what}: an adapter of a VL-BART is merged alone, with --base, --dtype and --overwrite")
    console.print(f"merging {adapters[0]}, with its visual embedding and the extra tokens")
    found = merge_visual(adapters[0], base, out, dtype=dtype, overwrite=overwrite)
    console.print(f"logits of the merged and the adapted model differ by {found:.1e} of the largest; written to {out}")


def merge_parts(
    adapters: "Sequence[Ingredient]",
    pipeline: Path,
    out: Path,
    dtype: str | None,
    verify: Sequence[str],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge into the parts of a diffusion pipeline, and print the summaries.

    Raises:
        UsageError: if logits are to be compared, of which there are none.
        DoraError: if a bit is not what it should be.
    """
    from ..checkpoints.merge_pipeline import merge_pipeline

    if "logits" in verify:
        raise UsageError("--verify logits: a pipeline that draws has none; give --verify exact")
    console.print(f"merging {', '.join(str(each.path) for each in adapters)} into {pipeline}")
    exact = "exact" in verify
    done, replays = merge_pipeline(adapters, pipeline, out, dtype=dtype, overwrite=overwrite, exact=exact)
    for text in (*(each.text() for each in done.values()), *(each.text() for each in replays)):
        console.print(text)
    if as_json:
        print_json({name: asdict(each) for name, each in done.items()})


def merge_and_show(
    adapters: "Sequence[Ingredient]",
    base: str | None,
    out: Path,
    *,
    dtype: str | None,
    untie: bool = False,
    verify: Sequence[str],
    overwrite: bool,
    variant: str | None = None,
) -> "MergeSummary":
    """Merge, print the summary, and check it.

    Args:
        verify: ``logits`` compares those of merged and adapted on real text, ``exact`` makes every bit again; what
            fails leaves nothing at ``out``, or the model that stood there.

    Raises:
        UsageError: if an adapter is not there, or no base is named.
        DoraError: if the merged model does not answer as the adapted one does, or a bit of it is not what it should be.
    """
    from ..checkpoints.merge import check_out, merge_checkpoint
    from ..checkpoints.replay import verify_bits
    from ..checkpoints.safetensors import find_variant
    from ..disk import replacing

    if unknown := [each for each in verify if each not in VerifyingCommand.choices]:
        raise UsageError(f"--verify {unknown[0]}: give {' or '.join(VerifyingCommand.choices)}")
    if variant and "logits" in verify:
        raise UsageError("--verify logits loads a folder's own weights, not a variant; give --verify exact")
    with ExitStack() as stack:
        folder = _open_base(adapters, base, out, stack)
        folder = find_variant(folder, variant) if variant else folder
        check_out(out, folder if folder.is_dir() else folder.parent, [each.path for each in adapters], overwrite)
        # it takes its name once it is verified: until then what stands there stays
        part = stack.enter_context(replacing(out))
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("merging", total=None)
            summary = merge_checkpoint(
                adapters,
                folder,
                part,
                dtype=dtype,
                untie=untie,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        summary = replace(summary, out=out)
        console.print(summary.text())
        if "exact" in verify:
            replay = verify_bits(part, adapters, folder, dtype, untie=untie)
            console.print(replay.text())
            if not replay.passed:
                raise DoraError(f"it is not bit for bit what base and adapters make; {out} was not written")
        if "logits" in verify:
            from ..checkpoints.verify import verify_merge

            check = verify_merge(part, adapters, folder, costs=summary.requantised)
            console.print(check.text())
            if not check.passed:
                raise DoraError(f"it does not answer as the adapted one does; {out} was not written")
    return summary


def with_weights(paths: Sequence[Path], weights: Sequence[float], each: "Ingredient") -> "list[Ingredient]":
    """The adapters with their weights, 1 where none are given; all else as in ``each``.

    Raises:
        UsageError: if there are some, but not one for each adapter.
    """
    if weights and len(weights) != len(paths):
        raise UsageError(
            f"{len(paths)} adapters need {len(paths)} times --weight, in the same order, not {len(weights)}"
        )
    return [replace(each, path=path, weight=w) for path, w in zip(paths, weights or [1.0] * len(paths), strict=True)]


def _open_base(adapters: "Sequence[Ingredient]", base: str | None, out: Path, stack: ExitStack) -> Path:
    """The base as a local folder or file, for as long as the stack; everything that is missing is told at once."""
    from ..checkpoints.adapter import telling_places
    from ..checkpoints.gguf import open_base_folder
    from ..disk import check_replaceable, check_writable
    from ..formats.files import find_adapter_file

    problems: list[DoraError] = []
    folder = Path()
    for each in adapters:
        with collecting(problems):
            find_adapter_file(each.path)
    with collecting(problems):
        check_writable(out, "--out", folder=True)
        check_replaceable(out, "--out")
    with collecting(problems):
        named = base or (None if problems else _find_base(adapters))
        if named:
            console.print(f"merging {', '.join(str(each.path) for each in adapters)} into {named}")
            with nullcontext() if base else telling_places(adapters[0].path, named):
                folder = stack.enter_context(open_base_folder(named, out))
    raise_all(problems)
    return folder


def _find_base(adapters: "Sequence[Ingredient]") -> str:
    """The one model that all the adapters name as their own."""
    from ..checkpoints.adapter import locate_base
    from ..formats.files import find_base_name

    names = {str(each.path): find_base_name(each.path) for each in adapters}
    if silent := [path for path, name in names.items() if not name]:
        raise UsageError(f"{', '.join(silent)} does not say which model it adapts; name it with --base MODEL")
    if len(set(names.values())) > 1:
        lines = "\n".join(f"  {path}: {name}" for path, name in names.items())
        raise UsageError(f"the adapters name different models; say which one with --base MODEL:\n{lines}")
    path, name = next(iter(names.items()))
    return locate_base(Path(path), str(name))
