"""Labels: a model with a head says one for each text, or one for each word."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...checkpoints.heads import Head
from ...checkpoints.kind import HeadKind
from ...checkpoints.models import Loaded, load_classifier
from ...data.batches import Collator
from ...data.classes import (
    find_labels,
    label_texts,
    read_labels,
    read_text,
    read_words,
)
from ...data.columns import check_label_columns
from ...data.encoding import context_length, pad_token
from ...data.prepare import BadRow, Row, Sample
from ...data.rows import RawRows, read_both
from ...errors import UsageError
from ...evaluation.classifier import list_labels, predict_labels, predict_tags
from ...evaluation.result import TaskResult
from ...evaluation.validation import score_labels
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared

_SAMPLES = 5


@dataclass
class Classification:
    """The functions of a modality, for one kind of head; it knows the labels once it has seen the rows."""

    kind: HeadKind
    head: Head | None = None
    rows: RawRows | None = None

    @property
    def by_word(self) -> bool:
        """Whether words have labels."""
        return self.kind == "tokens"

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows, with the columns of texts and labels; the labels are those of all rows."""
        if settings.style in ("alpaca", "chat"):
            raise UsageError(f"data.style: a classifier reads data.prompt and data.target, not {settings.style}")
        rows = read_both(settings, seed)
        check_label_columns(settings, rows.train.column_names, "data.train")
        if rows.validation is not None:
            check_label_columns(settings, rows.validation.column_names, str(settings.validation))
        self.head, self.rows = Head(self.kind, find_labels(rows, settings, by_word=self.by_word)), rows
        return rows

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The model with a head for these labels, and its tokenizer."""
        model, tokenizer = load_classifier(settings, self.head, empty=empty)
        assert self.head is not None
        self.head = replace(self.head, pad_token_id=tokenizer.pad_token_id)
        return model, tokenizer

    def prepare(
        self,
        rows: RawRows,
        settings: DataSettings,
        model: nn.Module,
        processor: Any,
        tick: Tick | None = None,  # noqa: ARG002
    ) -> Prepared:
        """Tokens, and the numbers of labels."""
        limit = context_length(model)
        if limit is not None and settings.max_length > limit:
            settings = settings.model_copy(update={"max_length": limit})
        labels = list_labels(model)
        train = label_texts(rows.train, rows.train_numbers, settings, processor, labels, by_word=self.by_word)
        held = None
        if rows.validation is not None:
            numbers = rows.validation_numbers
            held = label_texts(rows.validation, numbers, settings, processor, labels, by_word=self.by_word)
        shown = self._read(rows.train if rows.validation is None else rows.validation, settings, _SAMPLES)
        samples = [Sample(" ".join(words) if self.by_word else words[0], " ".join(said)) for words, said in shown]
        return Prepared(train, held, samples)

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Rows padded with the tokenizer's own token, which a decoder's head looks for."""
        return Collator(pad_token(processor, model), most=context_length(model))

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, str]],
    ) -> list[str]:
        """The labels that the model gives."""
        labels, texts = list_labels(model), [sample["prompt"] for sample in asked]
        was_training = model.training
        model.eval()
        try:
            if self.by_word:
                found = predict_tags(model, processor, [text.split() for text in texts], _SAMPLES, lambda _: None)
                return [" ".join(labels[i] for i in row if i >= 0) for row in found]
            return [labels[i] for i in predict_labels(model, processor, texts, _SAMPLES, lambda _: None)]
        finally:
            model.train(was_training)

    def score(
        self, model: nn.Module, processor: Any, settings: DataSettings, *, batch_size: int, seed: int, tick: Tick | None
    ) -> dict[str, TaskResult]:
        """Accuracy and F1 on the validation rows; nothing where there are none."""
        if self.rows is None or self.rows.validation is None:
            return {}
        examples = self._read(self.rows.validation, settings, len(self.rows.validation))
        return {"validation": score_labels("validation", examples, model, processor, batch_size, seed, tick)}

    def _read(self, rows: Any, settings: DataSettings, count: int) -> list[tuple[list[str], list[str]]]:
        """Words, or a text, and labels of the first usable rows."""
        found: list[tuple[list[str], list[str]]] = []
        names = self.head.labels if self.head is not None else ()
        numbered = {str(i): label for i, label in enumerate(names)} if self._says_numbers(rows, settings) else {}
        for row in rows:
            if len(found) == count:
                break
            try:
                said = read_labels(row, settings, by_word=self.by_word)
                found.append((self._read_input(row, settings), [numbered.get(each, each) for each in said]))
            except BadRow:
                continue
        return found

    def _read_input(self, row: Row, settings: DataSettings) -> list[str]:
        return read_words(row, settings) if self.by_word else [read_text(row, settings)]

    def _says_numbers(self, rows: Any, settings: DataSettings) -> bool:
        feature = rows.features.get(settings.target)
        return hasattr(getattr(feature, "feature", feature), "names")
