"""Adapters of a live model written to files; the model's own `save_pretrained` writes them too."""

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UsageError
from ..formats import FORMATS
from ..formats.base import Hints
from ..formats.files import write_raw_adapter
from .fsdp import gather, is_writer
from .registry import config_of, find_record, state_of
from .scan import Scan


def save_adapter(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> None:
    """Write an adapter into a folder that PEFT reads as it is; each file is replaced whole or not at all.

    An adapter that started as a part of the weight is written as a change of the weight as it is, of rank 2r.
    Where parameters are shared out over processes (FSDP2), every process calls this and the first one writes.
    Besides PEFT's two files, ``doralib_config.json`` keeps what PEFT has no word for (dropout_mode, detach_norm).

    Args:
        adapter_name: None: the active one.
    """
    config, folder = config_of(model, adapter_name).in_files(), Path(path)
    if config.method == "full":
        raise UsageError("full fine-tuning has no adapter: save the model itself with model.save_pretrained(path)")
    peft = FORMATS["peft"]
    assert peft.write is not None
    state = gather(state_of(model, adapter_name))
    if is_writer(model):
        hints = Hints(modules=tuple(Scan(model).modules))
        write_raw_adapter(peft.write(config, state, hints), peft, folder, overwrite=True)


class AdapterSaver:
    """`save_pretrained` of an adapted model: its adapters, where transformers would write layers that no tool knows.

    A Trainer, TRL's too, saves its checkpoints by it. The active adapter goes into the folder itself, every other into
    a folder of its name in it, as PEFT has it. Once the adapter is merged it writes the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **others: Any
    ) -> None:
        """Write the adapters, or the model if it is one that transformers can load.

        Args:
            others: Of transformers' own; an adapter needs none of them.

        Raises:
            UsageError: if it is to be pushed: a model that is adapted is none that the hub's users could load.
        """
        record = find_record(self.model)
        if record is None or record.merged is not None:
            type(self.model).save_pretrained(
                self.model, save_directory, is_main_process, push_to_hub=push_to_hub, **others
            )
            return
        if push_to_hub:
            raise UsageError("save_pretrained(push_to_hub=True): save the adapter into a folder, and upload that")
        if not is_main_process:
            return
        active = record.active or next(iter(record.adapters))
        for name in record.adapters:
            folder = Path(save_directory) if name == active else Path(save_directory) / name
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, folder, name)
