"""Which modules of a model an adapter goes on: names, regular expressions, "all-linear", and every refusal."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from ..config import DoraConfig, Names
from ..errors import UsageError, did_you_mean, list_some, nearest
from ..layers.wrapper import base_module
from .scan import Scan


def choose_parameters(found: Scan, names: Sequence[str]) -> list[str]:
    """Whole names of the stacks to adapt, in model order.

    Raises:
        UsageError: a name that no parameter has, a parameter that is no stack of weights, or of which it cannot be told
            which axis is the output, or that is tied; all of them at once.
    """
    if not names:
        return []
    chosen: set[str] = set()
    problems = []
    for target in names:
        meant = [name for name in found.parameters if name == target or name.endswith(f".{target}")]
        chosen.update(meant)
        if not meant:
            near = nearest(target, {name.rpartition(".")[2] for name in found.stacks}) or sorted(found.stacks)[:3]
            problems.append(f"no parameter is named {target!r}; this model has: {', '.join(near) or 'none'}")
    for name in [name for name in found.parameters if name in chosen]:
        p, others = found.parameters[name], found.other_names(name)
        if name.rpartition(".")[0] in found.adapted:
            problems.append(f"{name} is adapted already; doralib.remove(model) takes an adapter off")
        elif p.dim() != 3:
            problems.append(f"{name} {tuple(p.shape)} is no stack of weights; a layer goes into target_modules")
        elif name not in found.stacks:
            problems.append(
                f"{name}: its module does not say which axis is the output; set `is_transposed` on it: False where it "
                "is stored (experts, out, in), True where (experts, in, out)"
            )
        elif others:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
    _raise("target_parameters:", problems)
    return [name for name in found.stacks if name in chosen]


ALL_LINEAR = "all-linear"


def choose(found: Scan, config: DoraConfig) -> list[str]:
    """Names of the layers to adapt, in model order.

    Raises:
        UsageError: a target that nothing is named, a target that is not a linear layer, a layer that is tied, already
            adapted or bypassed by its parent; all of them at once.
    """
    wanted = ALL_LINEAR if config.target_modules is None else config.target_modules
    if wanted == ALL_LINEAR:
        heads = _heads(found)
        chosen = [name for name, base in found.bases.items() if base.kind == "linear" and name not in heads]
    else:
        chosen = match_modules(found, wanted, "target_modules")
    if config.exclude_modules is not None:
        out = set(match_modules(found, config.exclude_modules, "exclude_modules"))
        chosen = [name for name in chosen if name not in out]
    alone = choose_magnitudes(found, config)
    if wanted == ALL_LINEAR:
        chosen = [name for name in chosen if name not in alone]
    if both := [name for name in alone if name in chosen]:
        raise UsageError(f"{', '.join(both)}: in magnitude_modules and in target_modules, which train it whole anyway")
    chosen += alone
    if not chosen and not config.target_parameters and not config.trainable_token_indices:
        raise UsageError(f"no layer is left to adapt: target_modules {wanted!r}, exclude {config.exclude_modules!r}")
    check_layers(found, chosen)
    return chosen


def choose_magnitudes(found: Scan, config: DoraConfig) -> list[str]:
    """Names of the layers of which only the magnitude is trained, in model order."""
    names = config.magnitude_modules
    return match_modules(found, names, "magnitude_modules") if names else []


def match_modules(found: Scan, names: Names, setting: str) -> list[str]:
    """Modules with one of these name endings, or whose whole name matches the regular expression.

    Raises:
        UsageError: with the nearest names in the model.
    """
    known = [name for name in found.modules if name and ".base_layer" not in name]
    if isinstance(names, str):
        whole = [name for name in known if re.fullmatch(names, name)]
        if not whole:
            raise UsageError(_no_whole_match(names, known, setting))
        return whole
    ends = {target: [n for n in known if n == target or n.endswith("." + target)] for target in names}
    if missing := [target for target, ending in ends.items() if not ending]:
        raise UsageError(_no_match(missing, known, setting))
    chosen = {name for ending in ends.values() for name in ending}
    return [name for name in known if name in chosen]


def check_layers(found: Scan, chosen: list[str], *, tied: bool = False) -> None:
    """Say everything that stands in the way of adapting these modules.

    Args:
        tied: a weight may be adapted in one of its places only, as in adapters that were trained so.

    Raises:
        UsageError: if anything does.
    """
    problems = []
    for name in chosen:
        others = [each.rpartition(".")[0] for each in found.other_names(f"{name}.weight")]
        if name in found.adapted:
            problems.append(f"{name} is adapted already; doralib.remove(model) takes an adapter off")
        elif name not in found.bases:
            inside = [n.rpartition(".")[2] for n in found.bases if n.startswith(name + ".")]
            hint = f"; inside it: {', '.join(dict.fromkeys(inside))}" if inside else ""
            problems.append(f"{name} is a {type(found.modules[name]).__name__}, not a linear layer{hint}")
        elif others and not tied:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
        elif isinstance(found.modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            problems.append(f"{name}: nn.MultiheadAttention reads its weight without calling it; it cannot be adapted")
    _raise("these layers cannot be adapted:", problems)


_HELP = "list every layer that can be adapted with: doralib targets MODEL"


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise UsageError(f"{what}\n  {list_some(problems, 8)}\n  {_HELP}")


def _heads(found: Scan) -> set[str]:
    """The output layer of a language model or classifier, which "all-linear" leaves alone, as in PEFT."""
    output_layer: Callable[[], nn.Module | None] | None = getattr(found.model, "get_output_embeddings", None)
    head = output_layer() if output_layer is not None else None
    named = {name for name, module in found.modules.items() if head is not None and module is base_module(head)}
    return named | {name for name in ("score", "classifier", "qa_outputs") if hasattr(found.model, name)}


def _no_whole_match(pattern: str, known: list[str], setting: str) -> str:
    """What a text for target_modules should have been: a list, mostly."""
    asked, ends = [part.strip() for part in pattern.split(",")], {n.rpartition(".")[2] for n in known}
    hint = did_you_mean(pattern, [ALL_LINEAR])
    if ends.intersection(asked):
        hint = f"; for name endings give a list, [{', '.join(asked)}]"
    longest = ", ".join(map(repr, sorted(known, key=len)[-2:]))
    return (
        f"{setting}: no module's whole name matches the regular expression {pattern!r}{hint}\n"
        f"  whole names here look like {longest}\n{_HELP}"
    )


def _no_match(missing: list[str], known: list[str], setting: str) -> str:
    """Say what was asked, what the model has instead, and what to do."""
    count = Counter(n.rpartition(".")[2] for n in known if not n.rpartition(".")[2].isdigit())
    lines = [f"{setting}: no module is named {', '.join(map(repr, missing))}"]
    for target in missing:
        near = nearest(target, count) or [n for n, _ in count.most_common(3)]
        lines.append(f"  for {target!r} this model has: " + ", ".join(f"{n} (x{count[n]})" for n in near))
    return "\n".join([*lines, _HELP])
