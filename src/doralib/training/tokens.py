"""New tokens of a recipe: into the tokenizer, into the vocabulary, and into what is trained."""

import logging
from typing import Any

from torch import nn

from ..adapters.vocabulary import find_embeddings
from ..config import DoraConfig
from ..errors import UsageError
from ..recipe import Recipe

log = logging.getLogger(__name__)


def add_new_tokens(model: Any, tokenizer: Any, recipe: Recipe) -> DoraConfig:
    """Give tokenizer and model the recipe's new tokens; the adapter's settings that train their rows.

    The vocabulary grows only where the model has no room left. A head of its own trains the same rows.

    Raises:
        UsageError: if the model has no embedding of tokens, or a token is nothing to its tokenizer.
    """
    config, tokens = recipe.adapter, list(recipe.model.new_tokens)
    if not tokens:
        return config
    if not hasattr(tokenizer, "add_tokens") or not find_embeddings(model):
        raise UsageError("model.new_tokens: this model has no vocabulary of tokens")
    tokenizer.add_tokens(tokens)
    ids = tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)
    if lost := [token for token, i in zip(tokens, ids, strict=True) if i in (-1, tokenizer.unk_token_id)]:
        raise UsageError(f"model.new_tokens: the tokenizer cannot hold {', '.join(map(repr, lost))}")
    before = len(model.get_input_embeddings().weight)
    if max(ids) >= before:
        model.resize_token_embeddings(len(tokenizer))
    names = _name_places(model)
    log.info(f"{len(tokens)} new tokens, ids {', '.join(map(str, ids))}, in {' and '.join(names)}")
    asked = config.trainable_token_indices
    asked = asked if isinstance(asked, dict) else {names[0]: asked} if asked else {}
    rows = {name: (*asked.get(name, ()), *(i for i in ids if i not in asked.get(name, ()))) for name in names}
    return config.model_copy(update={"trainable_token_indices": {**asked, **rows}})


def _name_places(model: nn.Module) -> list[str]:
    """The embedding, and the head where it has a weight of its own."""
    places: dict[int, str] = {}
    for name, weight in find_embeddings(model).items():
        places.setdefault(id(weight), name.removesuffix(".weight"))
    return list(places.values())
