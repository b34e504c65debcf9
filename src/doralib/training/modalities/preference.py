"""Text again, for objectives other than likelihood: pairs, judged answers, or prompts that are answered in training."""

from dataclasses import dataclass, field
from typing import Any

import datasets
from torch import nn

from ...checkpoints.models import Loaded
from ...data.batches import OddsCollator
from ...data.detect import look_at
from ...data.encoding import check_ids, encode, leave_blanks, pad_token
from ...data.preferences import AnswerForm, find_form, prepare_answers
from ...data.prepare import PreparedRows, Sample
from ...data.prompt_form import make_form
from ...data.rows import RawRows, read_both
from ...data.survey import LEFT, RIGHT
from ...errors import DoraError, UsageError, collecting, raise_all
from ...evaluation.generation import GREEDY, answer_each, describe_ends, stop_at_turn_end
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings, ObjectiveSettings
from ..modality import Collate, Prepared
from ..rewards import check_reward_columns
from . import text

_SAMPLES = 5
_SAMPLE_TOKENS = 64
_COLUMNS = {"dpo": ("chosen_ids", "rejected_ids"), "orpo": ("chosen_ids", "rejected_ids"), "kto": ("completion_ids",)}


@dataclass
class Preference:
    """The functions of a modality, for one objective; it knows how rows are read once it has seen them."""

    objective: ObjectiveSettings
    form: AnswerForm = field(default=AnswerForm("completion", "prompt"))

    @property
    def _joined(self) -> bool:
        """Whether answers are tokenized with their prompts; where they are written in training, they are not."""
        return self.objective.kind != "grpo"

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows, with all columns that the objective and its reward functions read."""
        rows, kind = read_both(settings, seed), self.objective.kind
        problems: list[DoraError] = []
        parts = [(rows.validation, str(settings.validation)), (rows.train, settings.sources()[0].path)]
        for part, source in parts:
            if part is None:
                continue
            with collecting(problems):
                self.form = find_form(settings, kind, part.column_names, look_at(part), source)
            with collecting(problems):
                check_reward_columns(self.objective.rewards, part.column_names, source)
        raise_all(problems)
        return rows

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """A causal language model and its tokenizer."""
        return text.load(settings, empty=empty)

    def prepare(
        self,
        rows: RawRows,
        settings: DataSettings,
        model: nn.Module,
        processor: Any,
        tick: Tick | None = None,  # noqa: ARG002
    ) -> Prepared:
        """Tokens of the answers, and of the prompts."""
        if self.form.style == "chat" and not processor.chat_template:
            raise UsageError(
                "data.style: chat needs a chat template, and this model's tokenizer has none; use style completion, or "
                "a model tuned for chat"
            )
        settings = text.within(settings, model)
        train, samples = self._make(rows.train, rows.train_numbers, settings, model, processor)
        validation = None
        if rows.validation is not None:
            validation, samples = self._make(rows.validation, rows.validation_numbers, settings, model, processor)
        report, told = train.report, {"rows are read as": self.form.describe()}
        if self.objective.kind == "grpo":
            told |= {
                "tokens": f"{report.tokens:,} of prompts; the answers are made in training",
                **self._describe_rewards(),
            }
        told["an answer ends at"] = describe_ends(model, processor)
        asked = settings.model_copy(update={"style": self.form.style, "prompt": self.form.prompt})
        form = make_form(asked, joined=self._joined)
        return Prepared(train, validation, samples[:_SAMPLES], told, self._show(train.rows[0], processor), form=form)

    def _make(
        self, rows: datasets.Dataset, numbers: Any, settings: DataSettings, model: Any, processor: Any
    ) -> tuple[PreparedRows, list[Sample]]:
        made, samples = prepare_answers(self.objective.kind, rows, numbers, self.form, settings, processor)
        for column in ("prompt_ids", *_COLUMNS.get(self.objective.kind, ())):
            if column in made.rows.column_names:
                check_ids(model, processor, made.rows[column], "the rows")
        return made, samples

    def _describe_rewards(self) -> dict[str, str]:
        return {"rewards": ", ".join(self.objective.rewards)}

    def _show(self, row: Any, processor: Any) -> str:
        """The first row for a person: its prompt, and each answer."""
        if "prompt_ids" not in row:
            prompt = row["prompt"]
            return (
                prompt
                if isinstance(prompt, str)
                else "\n".join(f"{each['role']}: {each['content']}" for each in prompt)
            )
        words = {"chosen_ids": "chosen", "rejected_ids": "rejected", "completion_ids": "completion"}
        answers = [f"{words[name]}: {LEFT}{processor.decode(row[name])}{RIGHT}" for name in words if name in row]
        return "\n".join([processor.decode(row["prompt_ids"]), *answers])

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate | None:  # noqa: ARG002
        """TRL's own way to make a batch; for orpo, whose own goes with its own tokens, ours."""
        return OddsCollator(pad_token(processor, model)) if self.objective.kind == "orpo" else None

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, str]],
    ) -> list[str]:
        """What the model writes after each prompt."""
        closed = self.form.style == "chat"
        texts = [sample["prompt"] for sample in asked]
        if self._joined and not closed:
            texts = [leave_blanks(processor, text) for text in texts]
        prompts = [encode(processor, text, chat=closed) for text in texts]
        sampling = stop_at_turn_end(GREEDY, processor) if closed else GREEDY
        answers = answer_each(
            model, processor, prompts, max_new_tokens=_SAMPLE_TOKENS, batch_size=_SAMPLES, sampling=sampling
        )
        return [answer.text for answer in answers]
