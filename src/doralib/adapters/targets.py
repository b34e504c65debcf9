"""Which modules of a model an adapter goes on: names, regular expressions, "all-linear", and every refusal."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from ..config import DoraConfig, Names, fits_whole
from ..errors import UsageError, did_you_mean, list_some, nearest
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
            problems.append(f"{name} {tuple(p.shape)} {_explain_no_stack(found, name)}")
        elif name not in found.stacks:
            problems.append(
                f"{name}: its module does not say which axis is the output; set `is_transposed` on it: False where it "
                "is stored (experts, out, in), True where (experts, in, out)"
            )
        elif others:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
    _raise("target_parameters:", problems)
    return [name for name in found.stacks if name in chosen]


def _explain_no_stack(found: Scan, name: str) -> str:
    """Why a parameter that is no 3-D stack cannot be adapted as one, and what can be done."""
    layer, _, field = name.rpartition(".")
    if layer in found.bases and field == "weight":
        return f"is the weight of one layer, which goes into target_modules as {layer.rpartition('.')[2]!r}"
    holder = type(found.modules[layer]).__name__
    return (
        f"is no stack of weights: of the parameters that {holder} uses itself only those of 3 dimensions can be "
        "adapted, as of experts; modules_to_save trains the module whole"
    )


ALL_LINEAR = "all-linear"


def choose(found: Scan, config: DoraConfig) -> list[str]:
    """Names of the layers to adapt, in model order.

    Raises:
        UsageError: a target that nothing is named, a target that is not a linear layer, a layer that is tied, already
            adapted or bypassed by its parent; all of them at once.
    """
    wanted = ALL_LINEAR if config.target_modules is None else config.target_modules
    if wanted == ALL_LINEAR:
        chosen = [name for name in found.linear if name not in found.unreached]
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
        raise UsageError(_explain_none_left(found, config))
    check_layers(found, chosen)
    return chosen


def _explain_none_left(found: Scan, config: DoraConfig) -> str:
    wanted = config.target_modules or ALL_LINEAR
    told = f"no layer is left to adapt: target_modules {wanted!r}, exclude {config.exclude_modules!r}"
    if wanted == ALL_LINEAR and found.unreached:
        told += f"; left out: {_list_by_reason(found.unreached)}"
    others = Counter(base.kind.replace("_", " ") for base in found.bases.values() if base.kind != "linear")
    if wanted == ALL_LINEAR and others:
        told += f"; it has {', '.join(f'{count} {kind} layers' for kind, count in others.items())}, which can be named"
    return f"{told}\n{_HELP}"


def describe_choice(found: Scan, config: DoraConfig, chosen: list[str]) -> list[str]:
    """What to say of the layers that are adapted: a line on those that "all-linear" leaves out, or on asked ones that
    the model does not call everywhere."""
    if config.target_modules in (None, ALL_LINEAR):
        left_out = {name: why for name, why in found.unreached.items() if name not in chosen}
        return [f"all-linear leaves out {_list_by_reason(left_out)}"] if left_out else []
    in_part = {name: str(found.bypassed[name]) for name in chosen if name in found.bypassed}
    return [_list_by_reason(in_part)] if in_part else []


def _list_by_reason(reasons: dict[str, str]) -> str:
    """On one line: ``"q_proj, k_proj (24 layers): WavLMAttention.forward reads ..."``."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    told = []
    for reason, each in names.items():
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in each))
        told.append(f"{each[0] if len(each) == 1 else f'{ends} ({len(each)} layers, first {each[0]})'}: {reason}")
    return "; ".join(told)


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
        whole = [name for name in known if fits_whole(names, name)]
        if not whole:
            raise UsageError(_no_whole_match(names, known, setting))
        return whole
    ends = {target: [n for n in known if n == target or n.endswith("." + target)] for target in names}
    if missing := [target for target, ending in ends.items() if not ending]:
        raise UsageError(_no_match(missing, known, setting))
    chosen = {name for ending in ends.values() for name in ending}
    return [name for name in known if name in chosen]


def match_endings(found: Scan, names: Sequence[str], setting: str) -> list[str]:
    """Modules whose name ends in one of these, which need not be whole parts of it: as PEFT reads modules_to_save.

    Of a module and one inside it that both match, the outer one counts.

    Raises:
        UsageError: with the nearest names in the model.
    """
    known = [name for name in found.modules if name and ".base_layer" not in name]
    if missing := [name for name in names if not any(each.endswith(name) for each in known)]:
        raise UsageError(_no_match(missing, known, setting))
    chosen = [name for name in known if name.endswith(tuple(names))]
    return [name for name in chosen if not any(name.startswith(outer + ".") for outer in chosen)]


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
        elif name in found.refused:
            problems.append(f"{name}: {found.refused[name]}")
        elif name not in found.bases:
            inside = [n.rpartition(".")[2] for n in found.bases if n.startswith(name + ".")]
            hint = f"; inside it: {', '.join(dict.fromkeys(inside))}" if inside else ""
            problems.append(f"{name} is a {type(found.modules[name]).__name__}, not a linear layer{hint}")
        elif others and not tied:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
        elif name in found.bypassed and found.bypassed[name].always:
            problems.append(f"{name}: {found.bypassed[name]}")
    _raise("these layers cannot be adapted:", problems)


_HELP = "list every layer that can be adapted with: doralib targets MODEL"


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise UsageError(f"{what}\n  {list_some(problems, 8)}\n  {_HELP}")


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
