"""Which weight of a model each part of an adapter means, whatever tool or version spelled the names.

One way for all verbs: for checkpoints by the names that they store, for live models by those that they have. A name is
taken as it is, else without what wraps the model, else under another prefix, else as transformers renames it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Fits = Callable[[str, str], bool]


@dataclass(frozen=True)
class StoredPart:
    """A tensor of a model that a checkpoint stores as one of several equal shares of another one's rows."""

    stored: str
    index: int
    count: int


def _split_nothing(_name: str) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Spelling:
    """How transformers names what a model's files name otherwise."""

    rename: Callable[[str], str]
    """A tensor's name in the model, from its name in a file, of whatever age."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """By a tensor's name in the model the one that the checkpoint stores it under; empty for a live model."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """Likewise, for tensors that are stored together."""
    split: Callable[[str], tuple[str, ...]] = _split_nothing
    """The model's tensors that a tensor of a file is divided into, by its rows; none, where it stays one."""


@dataclass(frozen=True)
class NameMatch:
    """The adapter's names in a model."""

    found: Mapping[str, str]
    """The model's name by the adapter's."""
    missing: list[str]
    """Names that the model does not have."""
    problems: list[str]
    """A line for each name that may mean several."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """By the adapter's names, those of tensors that the checkpoint stores together."""


# what stands in front of a model's own names, or between them, where something is wrapped around it
_WRAPPERS = re.compile(
    r"^(?:(?:base_model\.model|module)\.)+|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# what holds other modules and does nothing itself; a name without a number is not known by less than what is in these
_HOLDERS = frozenset({"model", "language_model", "text_model", "transformer", "encoder", "decoder", "backbone"})
# the layers of a causal language model, and what they are part of where that model sees or hears
_CAUSAL, _LANGUAGE_MODEL = "model.layers.", "language_model"


def match_names(
    wanted: Iterable[str], known: Iterable[str], fits: Fits, find_spelling: Callable[[], Spelling | None]
) -> NameMatch:
    """Find tensors by the names that an adapter has for them.

    Args:
        known: the model's tensors.
        fits: whether the part of this wanted name could belong to this known tensor, by its shape.
        find_spelling: asked only where names do not match as they are.
    """
    wanted, plain = list(wanted), {name: name for name in known}
    match = _match({name: name for name in wanted}, plain, fits)
    if not (match.missing or match.problems) or (spelling := find_spelling()) is None:
        return match
    table = {**spelling.stored, **plain}
    again = _match({name: name for name in wanted}, table, fits)
    left = [name for name in wanted if name not in again.found]
    renamed = _match({name: spelling.rename(_WRAPPERS.sub("", name)) for name in left}, table, fits)
    taken = set(again.found.values())
    found = {**again.found, **{name: target for name, target in renamed.found.items() if target not in taken}}
    clean = {name: _WRAPPERS.sub("", name) for name in left if name not in found}
    parts = {name: spelling.parts[each] for name, each in clean.items() if each in spelling.parts}
    if len(found) + len(parts) <= len(match.found):
        return match
    problems = [line for line in again.problems if line in renamed.problems]
    missing = [name for name in renamed.missing if name not in found and name not in parts]
    return NameMatch(found, missing, problems, parts)


def _match(spelled: Mapping[str, str], table: Mapping[str, str], fits: Fits) -> NameMatch:
    """Match each wanted name in this spelling.

    A model may have another prefix (`model.`, `transformer.`, `language_model.`): each group of names with a common
    head is moved as a whole, and only where a single prefix fits every one of them.
    """
    clean = {name: each if each in table else _WRAPPERS.sub("", each) for name, each in spelled.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, each in clean.items():
        groups[_find_head(each)].append(name)
    ends = _index_ends(table)
    found: dict[str, str] = {}
    missing, problems, taken = [], [], set[str]()
    for head, names in groups.items():
        inside = {name: clean[name] for name in names}
        moves = [("", "")] if any(each in table for each in inside.values()) else _find_moves(head, inside, table, ends)
        moves = _choose_moves(head, moves, inside, table, fits)
        if len(moves) > 1:
            choices = " or ".join(repr(add + head.removeprefix(strip)) for strip, add in moves)
            problems.append(f"{names[0]}: could be under {choices} in the checkpoint; rename one of them")
            continue
        strip, add = moves[0] if moves else ("", "")
        for name, each in inside.items():
            target = table.get(add + each.removeprefix(strip))
            if target is None:
                missing.append(name)
            elif target in taken:
                problems.append(f"{name}: another part of the adapter also belongs to {target}")
            else:
                found[name] = target
                taken.add(target)
    return NameMatch(found, missing, problems)


def _find_head(name: str) -> str:
    """The name up to its first number, with the dot: ``"model.layers."``."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), max(0, len(parts) - 2))
    return "".join(part + "." for part in parts[:end])


def _index_ends(table: Iterable[str]) -> dict[str, list[str]]:
    """Names by their last two parts."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in table:
        ends[_take_end(name)].append(name)
    return ends


def _take_end(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _find_moves(
    head: str, inside: Mapping[str, str], table: Mapping[str, str], ends: Mapping[str, list[str]]
) -> list[tuple[str, str]]:
    """(prefix to take off, prefix to put on) that finds every name; the shortest cut that finds any."""
    parts, first = head.split(".")[:-1], next(iter(inside.values()))
    numbered = any(part.isdigit() for part in first.split("."))
    for cut in range(len(parts) + 1):
        if not numbered and not _HOLDERS.issuperset(parts[1:cut]):
            break
        strip = "".join(part + "." for part in parts[:cut])
        rest = first.removeprefix(strip)
        near = ends.get(_take_end(rest), []) if "." in rest else []
        adds = [name.removesuffix(rest) for name in near if name == rest or name.endswith("." + rest)]
        moves = [
            (strip, add) for add in adds if all(add + each.removeprefix(strip) in table for each in inside.values())
        ]
        if moves:
            return moves
    return []


def _choose_moves(
    head: str, moves: list[tuple[str, str]], inside: Mapping[str, str], table: Mapping[str, str], fits: Fits
) -> list[tuple[str, str]]:
    """Of several moves those that the shapes allow, and of these the ones whose path is most like the adapter's own."""
    if len(moves) < 2:
        return moves

    def likeness(move: tuple[str, str]) -> int:
        theirs = (move[1] + head.removeprefix(move[0])).split(".")
        return sum((Counter(head.split(".")) & Counter(theirs)).values())

    def has_shapes(move: tuple[str, str]) -> bool:
        return all(fits(name, table[move[1] + each.removeprefix(move[0])]) for name, each in inside.items())

    moves = [move for move in moves if has_shapes(move)] or moves
    most = max(map(likeness, moves))
    moves = [move for move in moves if likeness(move) == most]
    language = [move for move in moves if _LANGUAGE_MODEL in move[1].split(".")]
    return language if head == _CAUSAL and len(language) == 1 else moves
