"""Problems that are made, not read: a task of the package reasoning-gym, drawn by a seed."""

import json
from typing import Any
from urllib.parse import parse_qsl

import datasets

from ..documents import decode_yaml
from ..errors import UsageError, did_you_mean

_SIZE = 500


def make_problems(source: str, setting: str) -> datasets.Dataset:
    """The problems as columns question, answer, and metadata as JSON; 500 with seed 0, unless size and seed say else.

    Raises:
        UsageError: if reasoning-gym is not installed, or has no such task or setting of it.
    """
    try:
        # an extra that takes seconds to import
        import reasoning_gym  # noqa: PLC0415
        from reasoning_gym.factory import DATASETS  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{setting}: {source} needs reasoning-gym ({error}): pip install 'doralib[problems]'"
        ) from None
    task, _, asked = source.partition(":")[2].partition("?")
    if task not in DATASETS:
        hint = did_you_mean(task, DATASETS) or f"; there are {len(DATASETS)}, such as chain_sum and gcd"
        raise UsageError(f"{setting}: reasoning-gym has no task {task!r}{hint}")
    given: dict[str, Any] = {key: decode_yaml(value) for key, value in parse_qsl(asked, keep_blank_values=True)}
    known = list(DATASETS[task][1].__dataclass_fields__)
    if wrong := [f"{key!r}{did_you_mean(key, known)}" for key in given if key not in known]:
        has = ", ".join(known)
        raise UsageError(f"{setting}: reasoning-gym's {task} has no setting {', '.join(wrong)}; it has {has}")
    try:
        made = reasoning_gym.create_dataset(task, **{"size": _SIZE, "seed": 0, **given})
        rows = [made[i] for i in range(len(made))]
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{setting}: reasoning-gym's {task} refuses these settings: {error}") from None
    return datasets.Dataset.from_dict(
        {
            "question": [str(row["question"]) for row in rows],
            "answer": [str(row["answer"]) for row in rows],
            "metadata": [json.dumps(row["metadata"], default=str) for row in rows],
        }
    )
