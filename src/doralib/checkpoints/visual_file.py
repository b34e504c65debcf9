"""What stands beside the adapter of a VL-BART: which features its model reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..recipe import VisualSettings

VISUAL_FILE = "doralib_visual.json"


def write_visual(folder: Path, settings: VisualSettings) -> None:
    """Keep the settings beside an adapter."""
    write_json(folder / VISUAL_FILE, settings.model_dump(mode="json"))


def read_visual(folder: Path) -> VisualSettings | None:
    """What stands beside an adapter; None: it is of no such model."""
    file = folder / VISUAL_FILE
    said: Mapping[str, Any] | None = read_json(file, dict) if file.is_file() else None
    return None if said is None else VisualSettings(**said)
