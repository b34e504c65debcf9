"""What is said in sounds, written down by a model that hears."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .console import console, show_controls


def write_down(model: Any, processor: Any, sounds: Sequence[Path], out: Path | None, batch_size: int) -> bool:
    """Write what is said in each sound; False if the model is one of text, and there is no sound.

    Raises:
        UsageError: if the model hears nothing, there is no sound, or one of them cannot be heard.
    """
    from ..data.prepare import BadRow
    from ..evaluation.transcripts import transcribe
    from .prompt_file import write_answers

    if model.main_input_name == "input_ids" or not hasattr(processor, "feature_extractor"):
        if sounds:
            raise UsageError("--audio: this model reads text; give a --prompt")
        return False
    if not sounds:
        raise UsageError("this model writes what it hears: give a sound with --audio FILE")
    try:
        texts = transcribe(model, processor, [str(sound.expanduser()) for sound in sounds], batch_size=batch_size)
    except BadRow as bad:
        raise UsageError(f"--audio: {bad}") from None
    if out is not None:
        write_answers(out, [{"audio": str(sound)} for sound in sounds], texts)
        console.print(f"{len(texts)} answers written: {out}")
        return True
    for sound, text in zip(sounds, texts, strict=True):
        shown = show_controls(text) if sys.stdout.isatty() else text
        print(f"{sound}: {shown}" if len(sounds) > 1 else shown)
    return True
