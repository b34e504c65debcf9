"""Which modules of a model an adapter goes on: names, regular expressions, "all-linear", and every refusal."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from torch import nn

from ..config import DoraConfig, Names
from ..errors import UsageError, did_you_mean, nearest
from ..layers.linear import DoraLinear
from .scan import _kind, _owners, adaptable, expert_weights

_HELP = "list every stack that can be adapted with: doralib targets MODEL"


def choose_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Whole names of the stacks to adapt, in model order.

    Raises:
        UsageError: a name that no parameter has, a parameter that is no stack of weights, or of which it cannot be told
            which axis is the output, or that is tied; all of them at once.
    """
    if not names:
        return []
    owners = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    known, parameters = expert_weights(model), dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    problems = []
    for target in names:
        found = [name for name in parameters if name == target or name.endswith(f".{target}")]
        chosen.update(found)
        if not found:
            near = nearest(target, {name.rpartition(".")[2] for name in known}) or sorted(known)[:3]
            problems.append(f"no parameter is named {target!r}; this model has: {', '.join(near) or 'none'}")
    for name in [name for name in parameters if name in chosen]:
        p, others = parameters[name], [other for other in owners[id(parameters[name])] if other != name]
        if p.dim() != 3:
            problems.append(f"{name} {tuple(p.shape)} is no stack of weights; a layer goes into target_modules")
        elif name not in known:
            problems.append(
                f"{name}: its module does not say which axis is the output; set `is_transposed` on it: False where it "
                "is stored (experts, out, in), True where (experts, in, out)"
            )
        elif others:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UsageError("\n  ".join(["target_parameters:", *problems[:8], *more, _HELP]))
    return [name for name in known if name in chosen]


ALL_LINEAR = "all-linear"


def choose(model: nn.Module, config: DoraConfig) -> list[str]:
    """Names of the layers to adapt, in model order.

    Raises:
        UsageError: a target that nothing is named, a target that is not a linear layer, a layer that is tied, already
            adapted or bypassed by its parent; all of them at once.
    """
    linear = adaptable(model)
    wanted = ALL_LINEAR if config.target_modules is None else config.target_modules
    if wanted == ALL_LINEAR:
        heads = _heads(model)
        chosen = [name for name in linear if name not in heads and _kind(model, name) == "linear"]
    else:
        chosen = matching(model, wanted, "target_modules")
    if config.exclude_modules is not None:
        out = set(matching(model, config.exclude_modules, "exclude_modules"))
        chosen = [name for name in chosen if name not in out]
    alone = magnitudes(model, config)
    if wanted == ALL_LINEAR:
        chosen = [name for name in chosen if name not in alone]
    if both := [name for name in alone if name in chosen]:
        raise UsageError(f"{', '.join(both)}: in magnitude_modules and in target_modules, which train it whole anyway")
    chosen += alone
    if not chosen and not config.target_parameters:
        raise UsageError(f"no layer is left to adapt: target_modules {wanted!r}, exclude {config.exclude_modules!r}")
    refuse(model, chosen, linear)
    return chosen


def magnitudes(model: nn.Module, config: DoraConfig) -> list[str]:
    """Names of the layers of which only the magnitude is trained, in model order."""
    names = config.magnitude_modules
    return matching(model, names, "magnitude_modules") if names else []


def matching(model: nn.Module, names: Names, setting: str) -> list[str]:
    """Modules with one of these name endings, or whose whole name matches the regular expression.

    Raises:
        UsageError: with the nearest names in the model.
    """
    known = [name for name, _ in model.named_modules() if name and ".base_layer" not in name]
    if isinstance(names, str):
        found = [name for name in known if re.fullmatch(names, name)]
        if not found:
            raise UsageError(_no_whole_match(names, known, setting))
        return found
    ends = {target: [n for n in known if n == target or n.endswith("." + target)] for target in names}
    if missing := [target for target, found in ends.items() if not found]:
        raise UsageError(_no_match(missing, known, setting))
    chosen = {name for found in ends.values() for name in found}
    return [name for name in known if name in chosen]


def refuse(model: nn.Module, chosen: list[str], linear: dict[str, tuple[int, ...]]) -> None:
    """Say everything that stands in the way of adapting these modules.

    Raises:
        UsageError: if anything does.
    """
    modules, owners = dict(model.named_modules()), _owners(model)
    problems = []
    for name in chosen:
        module = modules[name]
        parent = modules[name.rpartition(".")[0]]
        shared = [other for other in owners[id(getattr(module, "weight", None))] if other != name]
        if isinstance(module, DoraLinear):
            problems.append(f"{name} is adapted already; doralib.remove(model) takes an adapter off")
        elif name not in linear:
            inside = [n.rpartition(".")[2] for n in linear if n.startswith(name + ".")]
            hint = f"; inside it: {', '.join(dict.fromkeys(inside))}" if inside else ""
            problems.append(f"{name} is a {type(module).__name__}, not a linear layer{hint}")
        elif shared:
            problems.append(f"{name} is tied to {', '.join(shared)}: one weight cannot be adapted in one place only")
        elif isinstance(parent, nn.MultiheadAttention):
            problems.append(f"{name}: nn.MultiheadAttention reads its weight without calling it; it cannot be adapted")
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UsageError("\n  ".join(["these layers cannot be adapted:", *problems[:8], *more, _HELP]))


_HELP = "list every layer that can be adapted with: doralib targets MODEL"


def _heads(model: nn.Module) -> set[str]:
    """The output layer of a language model or classifier, which "all-linear" leaves alone, as in PEFT."""
    output_layer: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = output_layer() if output_layer is not None else None
    named = {name for name, module in model.named_modules() if head is not None and module is head}
    return named | {name for name in ("score", "classifier", "qa_outputs") if hasattr(model, name)}


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
