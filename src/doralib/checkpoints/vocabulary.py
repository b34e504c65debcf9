"""The vocabulary of a checkpoint: embedding and output head, tied or apart, and other numbers of tokens."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DoraError
from ..state import RowValues
from .safetensors import Stored

Each = TypeVar("Each")

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_tied(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> bool:
    """Whether the output head is not stored because it is the input embedding."""
    has_head = any(name.endswith(HEADS) for name in stored)
    return not has_head and any(name.endswith(_WITH_HEAD) for name in config.get("architectures") or [])


def find_tied_head(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, str]:
    """The embedding by the name of the head that is tied to it; nothing where the head is stored."""
    embeddings = [name for name in stored if name.endswith(EMBEDDINGS)]
    if not is_tied(stored, config) or len(embeddings) != 1:
        return {}
    (embedding,) = embeddings
    front = "language_model." if embedding.startswith("language_model.model.") else ""
    return {front + HEADS[config.get("model_type") == "gpt_neox"]: embedding}


def find_stored_tie(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Embedding and head of a model that ties them and has both in its files, as older tools wrote them."""
    inner = config.get("text_config")
    ties = [part.get("tie_word_embeddings") for part in (config, inner if isinstance(inner, dict) else {})]
    embeddings = [name for name in stored if name.endswith(EMBEDDINGS)]
    heads = [name for name in stored if name.endswith(HEADS)]
    return (embeddings[0], heads[0]) if True in ties and len(embeddings) == len(heads) == 1 else None


def drop_tied(
    given: Mapping[str, Each],
    are_equal: Callable[[Each, Each], bool],
    stored: Mapping[str, Stored],
    config: Mapping[str, Any],
) -> dict[str, Each]:
    """What an adapter has by tensor, less that of an output head that equals the embedding's it is tied to."""
    embeddings = [each for name, each in given.items() if name.endswith(EMBEDDINGS)]
    tied = is_tied(stored, config)
    is_copy = lambda name, each: tied and name.endswith(HEADS) and any(are_equal(each, own) for own in embeddings)
    return {name: each for name, each in given.items() if not is_copy(name, each)}


def are_equal_rows(one: RowValues, other: RowValues) -> bool:
    """Whether two sets of rows are of the same tokens and hold the same numbers."""
    return torch.equal(one.index_N, other.index_N) and torch.equal(one.rows_ND, other.rows_ND)


def share_rows(
    ties: Iterable[tuple[str, str]], rows: Mapping[str, RowValues], changed: Collection[str]
) -> dict[str, RowValues]:
    """The rows, an embedding's also for the head that is tied to it, where nothing else changes the head."""
    shared = {head: rows[embedding] for embedding, head in ties if embedding in rows and head not in changed}
    return {**rows, **shared}


def are_apart(
    tie: tuple[str, str], rows: Mapping[str, RowValues], layers: Collection[str], whole: Mapping[str, Tensor]
) -> bool:
    """Whether an adapter changes a tied weight in one of its places only, or otherwise than in the other."""
    embedding, head = tie
    if not {embedding, head} & {*rows, *layers, *whole}:
        return False
    if embedding in whole and head in whole:
        return not torch.equal(whole[embedding], whole[head])
    return not (embedding in rows and head in rows and are_equal_rows(rows[embedding], rows[head]))


def explain_apart(tie: tuple[str, str]) -> str:
    """What to do about a tied weight that an adapter changes otherwise in each of its places."""
    return (
        f"{tie[1]}: is tied to {tie[0]} by config.json, and the adapter changes the two differently; merge with "
        "--untie, which says that they are not tied"
    )


def find_untied(embeddings: list[str], stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    """An embedding trained as a copy of its own cannot go where the output head is the same tensor."""
    return [
        f"{name}: the output head is tied to this embedding, which was trained apart; replacing it would change both; "
        "merge with --untie, which gives the head a tensor of its own"
        for name in embeddings
        if name.endswith(EMBEDDINGS) and is_tied(stored, config) and config.get("tie_word_embeddings", True)
    ]


@dataclass(frozen=True)
class Resized:
    """A stored tensor with the rows of another vocabulary."""

    stored: Stored
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        return self.stored.code

    @property
    def plain(self) -> bool:
        return self.stored.plain


def check_vocabularies(stored: Mapping[str, Stored]) -> None:
    """Check that each embedding and head of a checkpoint has a row for each token.

    Raises:
        DoraError: naming those that are a single number, as in a damaged file.
    """
    single = [name for name, each in stored.items() if name.endswith((*EMBEDDINGS, *HEADS)) and not each.shape]
    if single:
        raise DoraError(f"the base model is damaged: {', '.join(single)} is one number, and no row for each token")


def find_resized(
    values: Mapping[str, Tensor], names: Mapping[str, str], stored: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """The embeddings and heads that have another number of tokens, by their stored names."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if (target := names.get(name, "")).endswith((*EMBEDDINGS, *HEADS)):
            (size, *others), (mine, *same) = stored[target].shape, tuple(value.shape) or (0,)
            found |= {target: value} if others == same and size != mine else {}
    return found


def find_bad_rows(rows: Mapping[str, RowValues], stored: Mapping[str, Stored]) -> list[str]:
    """Rows of another width, of a quantized tensor, with a gap before new ones, or that are no numbers."""
    problems = []
    for name, each in rows.items():
        (V, *width), D = stored[name].shape, each.rows_ND.shape[1]
        last = int(each.index_N.max()) if len(each.index_N) else -1
        if width != [D] or not stored[name].plain:
            problems.append(f"{name}: the adapter has rows of {D}, the checkpoint {stored[name].code} {(V, *width)}")
        elif gap := sorted({*range(V, last)} - {*each.index_N.tolist()}):
            problems.append(f"{name}: trains token {last}, and neither it nor the checkpoint has {gap[0]}")
        elif not bool(each.rows_ND.isfinite().all()):
            problems.append(f"{name}: the adapter holds NaN or infinite rows; merge an earlier checkpoint of the run")
    return problems


def find_uneven(rows: Mapping[str, RowValues], stored: Mapping[str, Stored]) -> list[str]:
    """An embedding and a head that would have different numbers of tokens, where the adapter changes them."""
    sizes = {name: each.shape[0] for name, each in stored.items() if name.endswith((*EMBEDDINGS, *HEADS))}
    for name, each in rows.items():
        sizes[name] = max(sizes[name], int(each.index_N.max()) + 1 if len(each.index_N) else 0)
    changed = {name for name in sizes if isinstance(stored[name], Resized) or sizes[name] > stored[name].shape[0]}
    ends = {name: sizes[name] for name in sizes if changed}
    if len(set(ends.values())) < 2:
        return []
    return [f"the vocabulary would have several sizes: {', '.join(f'{name} {size}' for name, size in ends.items())}"]
