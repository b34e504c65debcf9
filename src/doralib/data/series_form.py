"""How a model of series was asked in its training: kept beside what was trained, so that it is asked so again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..recipe import SERIES_FILE, SeriesSettings


@dataclass
class SeriesForm:
    """What stands beside a model of series where others have a tokenizer."""

    settings: SeriesSettings = field(default_factory=SeriesSettings)
    """Those of the run, with its context and horizon once they are known."""

    @property
    def model_input_names(self) -> list[str]:
        """What transformers' Trainer asks a tokenizer for."""
        return ["past_values"]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write it into a folder, as a tokenizer is written there."""
        write_json(Path(folder) / SERIES_FILE, self.settings.model_dump(mode="json"))


def read_series_form(folder: Path) -> SeriesForm:
    """The form of what lies in a folder, or in the model of a run; one that says nothing where there is none.

    Raises:
        DoraError: if the file is damaged.
    """
    places = (folder / SERIES_FILE, folder / "model" / SERIES_FILE)
    file = next((place for place in places if place.is_file()), None)
    return SeriesForm() if file is None else SeriesForm(SeriesSettings(**read_json(file)))
