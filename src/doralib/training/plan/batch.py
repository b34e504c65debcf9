"""How long the rows of a recipe are, found without its model: what a batch holds at most, and on average."""

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...checkpoints.models import load_tokenizer
from ...data.encoding import context_length
from ...data.packing import is_packed
from ...data.prepare import IGNORED
from ...data.rows import RawRows
from ...data.tokenize import tokenize_rows
from ...errors import DoraError
from ...recipe import Recipe
from ..sampler import PADDING_WORTH_GROUPING, measure_padding

_LOOKED_AT = 400
_SKIMMED = 20_000


@dataclass(frozen=True)
class Lengths:
    """Tokens of a recipe's rows."""

    longest: int
    """Tokens of the longest row, to which its batch is padded."""
    labels: int
    """Tokens of a row that count in the loss, at most."""
    usual: float
    """Tokens of a row on average, with its padding."""
    usual_labels: float
    told: str
    """Where this is known from."""

    def describe(self, rows: int) -> str:
        """So many rows, for a person."""
        return f"{rows} x {self.longest} tokens"

    def describe_logits(self, rows: int) -> str:
        """What the head makes of them, for a person."""
        return f"{rows * min(self.labels, self.longest):,} tokens with a label x the vocabulary, and the loss"


def assume_full(recipe: Recipe, config: Any) -> Lengths:
    """Every row as long as it may be, every token learned."""
    limit = _limit(recipe, config)
    labels = limit - 1 if recipe.data.loss_on == "all" or recipe.data.style == "text" else limit
    return Lengths(limit, labels, limit, labels, f"every row of {limit} tokens (data.max_length), all learned")


def measure_lengths(recipe: Recipe, config: Any, rows: RawRows) -> Lengths:
    """Tokenize the longest rows and some others; the upper bound where that cannot be."""
    try:
        return _measure(recipe, config, rows)
    except (DoraError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).debug(f"lengths of rows: {error}")
        return assume_full(recipe, config)


def _measure(recipe: Recipe, config: Any, rows: RawRows) -> Lengths:
    limit = _limit(recipe, config)
    settings = (rows.settings or recipe.data).model_copy(update={"max_length": limit, "bad_rows": "report"})
    total = len(rows.train)
    some = np.unique(np.linspace(0, total - 1, min(total, _LOOKED_AT)).astype(int)).tolist()
    longest = _find_longest(rows, recipe.training.get("per_device_train_batch_size", 8))
    tokenizer, numbers = load_tokenizer(recipe.model), list(range(1, total + 1))
    usual = tokenize_rows(rows.train.select(some), numbers, settings, tokenizer).rows
    most = tokenize_rows(rows.train.select(longest), numbers, settings, tokenizer).rows
    lengths = [*usual["length"], *most["length"]]
    learned = [sum(label != IGNORED for label in labels[1:]) for labels in (*usual["labels"], *most["labels"])]
    if is_packed(settings):
        share = sum(learned) / sum(lengths)
        told = f"rows packed into sequences of {limit} tokens, {share:.0%} learned"
        return Lengths(limit, round(limit * share), limit, limit * share, told)
    mean, batch = float(np.mean(usual["length"])), recipe.training.get("per_device_train_batch_size", 8)
    padding = measure_padding(usual["length"][:], batch)
    grouped = recipe.training.get("train_sampling_strategy", "group_by_length") == "group_by_length"
    padded = mean if grouped and padding > PADDING_WORTH_GROUPING else mean / (1 - padding)
    # of the rows that stand in one batch with the longest
    most_learned = max(learned) if len(learned) < 2 else float(np.mean(sorted(learned)[-batch:]))
    told = f"the longest row has {max(lengths)} tokens, a usual one {mean:.0f} ({len(some):,} of {total:,} rows read)"
    usual_learned = float(np.mean(learned[: len(usual)]))
    return Lengths(max(lengths), max(1, round(most_learned)), padded, max(1.0, usual_learned), told)


def _find_longest(rows: RawRows, batch: int) -> list[int]:
    """The rows with the most characters, about two batches of them."""
    places = np.unique(np.linspace(0, len(rows.train) - 1, min(len(rows.train), _SKIMMED)).astype(int))
    chosen = rows.train.select(places).with_format(None)
    sizes = np.array([sum(len(str(value)) for value in row.values()) for row in chosen])
    return places[np.argsort(-sizes)[: 2 * batch]].tolist()


def _limit(recipe: Recipe, config: Any) -> int:
    most = context_length(SimpleNamespace(config=config))
    return recipe.data.max_length if most is None else min(recipe.data.max_length, most)
