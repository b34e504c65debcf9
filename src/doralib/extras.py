"""Packages that only some of what doralib does needs, and the extras that bring them."""

import importlib
from typing import Any

from .errors import UsageError

EXTRAS = {
    **dict.fromkeys(("transformers", "accelerate", "datasets", "pyarrow", "jinja2"), "train"),
    **dict.fromkeys(("prompt_toolkit", "requests", "tensorboard", "tokenizers", "huggingface_hub", "gguf"), "train"),
    **dict.fromkeys(("scipy", "optuna"), "compare"),
    "matplotlib": "plots",
    "lm_eval": "eval",
    **dict.fromkeys(("fastapi", "uvicorn", "openai"), "serve"),
    "bitsandbytes": "quant",
    "trl": "rl",
    "reasoning_gym": "problems",
    "pycocoevalcap": "caption",
    "h5py": "vlbart",
    **dict.fromkeys(("PIL", "av", "torchvision", "num2words", "openpyxl"), "vision"),
    **dict.fromkeys(("soundfile", "soxr", "jiwer"), "audio"),
    "sacrebleu": "translate",
    **dict.fromkeys(("pandas", "utilsforecast"), "forecast"),
    **dict.fromkeys(("diffusers", "prodigyopt"), "diffusion"),
}
"""The extra that brings a package."""


def import_extra(name: str, user: str) -> Any:
    """A package of an extra, or a module of it, imported.

    Args:
        name: Such as ``scipy.stats``.
        user: What needs it, as an error says it.

    Raises:
        UsageError: if it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(name)
    # a package that looks for a library of the system raises OSError
    except (ImportError, OSError) as error:
        package = name.partition(".")[0]
        told = explain_missing(package, user)
        if not (isinstance(error, ModuleNotFoundError) and error.name in (name, package)):
            told = f"{user} needs {package}, which cannot be loaded: {error}; 'doralib[{EXTRAS[package]}]' brings it"
        raise UsageError(told) from None


def explain_missing(package: str, user: str = "this") -> str:
    """What to install; empty if no extra brings the package."""
    if package not in EXTRAS:
        return ""
    return f"{user} needs {package}, which is not installed: pip install 'doralib[{EXTRAS[package]}]'"
