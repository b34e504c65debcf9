"""PEFT's names and shapes for stacks of experts (`target_parameters`).

PEFT wraps the module that holds the parameters, once for each, so its keys do not name them: the first parameter of the
module is innermost, with a ``base_layer`` for every wrapper around it. A is (experts · r, in), an expert after the
other; B is (out, r · experts), the experts of a rank side by side. Magnitudes, which PEFT has none of, are (experts,
out).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import Tensor

from ..config import DoraConfig, fits_whole
from ..errors import DoraError
from ..state import MAGNITUDE, ExpertsValues, LayerAdapter
from .tensors import check_complete

# the order in which transformers' modules have them
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_WRAPPER = ".base_layer"
_KEYS = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight"}


def to_tensors(stacks: Mapping[str, LayerAdapter]) -> dict[str, Tensor]:
    """Stacks by PEFT's keys, without its prefix."""
    fields = defaultdict(list)
    for name in stacks:
        fields[name.rpartition(".")[0]].append(name.rpartition(".")[2])
    tensors = {}
    for name, adapter in stacks.items():
        holder, _, field = name.rpartition(".")
        order = _order_fields(fields[holder])
        # names without an order are kept as they are, which doralib alone can read
        place = holder + _WRAPPER * (len(order) - 1 - order.index(field)) if order else name
        tensors[f"{place}.lora_A.weight"] = adapter.a_RI.flatten(0, 1)
        tensors[f"{place}.lora_B.weight"] = adapter.b_OR.permute(1, 2, 0).flatten(1).contiguous()
        if adapter.m_O is not None:
            tensors[f"{place}.{MAGNITUDE}"] = adapter.m_O
    return tensors


def find_names(places: Collection[str], config: DoraConfig) -> tuple[dict[str, str], list[str]]:
    """The parameter's whole name for each place in PEFT's keys that is one, and a line for each that cannot be told."""
    names: dict[str, str] = {}
    depths = defaultdict(list)
    for place in places:
        if _is_named(place, config.target_parameters):
            names[place] = place
        elif not _is_module(place, config):
            depths[re.sub(rf"({re.escape(_WRAPPER)})+$", "", place)].append(place)
    problems = []
    for holder, found in depths.items():
        wanted = {
            target.rpartition(".")[2]
            for target in config.target_parameters
            if not (parent := target.rpartition(".")[0]) or _is_named(holder, (parent,))
        }
        if not wanted:
            continue
        order = _order_fields(wanted)
        if len(order) != len(found):
            problems.append(
                f"{holder}: {len(found)} adapted parameters, and target_parameters name {', '.join(sorted(wanted))}: "
                "which is which cannot be told"
            )
            continue
        for field, place in zip(order, sorted(found, key=len, reverse=True), strict=True):
            names[place] = f"{holder}.{field}"
    return names, problems


def read_stack(found: Mapping[str, Tensor], config: DoraConfig, name: str) -> LayerAdapter:
    """Read one stack from PEFT's tensors.

    Raises:
        DoraError: if a tensor is missing, too many or of another shape.
    """
    check_complete(found, _KEYS, config)
    a, b, m, r = found["a_RI"], found["b_OR"], found.get("m_O"), config.rank_of(name)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] % r or a.shape[0] != b.shape[1]:
        raise DoraError(f"A {tuple(a.shape)} and B {tuple(b.shape)} are no stack of experts of rank {r}")
    E = a.shape[0] // r
    b_EOR = b.unflatten(1, (r, E)).permute(2, 0, 1).contiguous()
    return LayerAdapter(values=ExpertsValues(a.unflatten(0, (E, r)), b_EOR, m), scale=config.scale_of(name))


def _order_fields(fields: Collection[str]) -> list[str]:
    """As the module has them; none, if that is not known."""
    if len(fields) == 1:
        return list(fields)
    return [field for field in _ORDER if field in fields] if set(fields) <= set(_ORDER) else []


def _is_named(name: str, targets: Collection[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_module(name: str, config: DoraConfig) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        return fits_whole(targets, name)
    return _is_named(name, targets or ())
