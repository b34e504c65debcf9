"""One run in several processes (torchrun, accelerate launch): each trains, the main one writes and talks."""

import torch
from accelerate import PartialState
from torch import distributed


def is_distributed() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_main() -> bool:
    """Whether this is the process that writes the run folder, and tells about it."""
    return not is_distributed() or distributed.get_rank() == 0


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process cannot be reached."""
    said = str(error).lower()
    return is_distributed() and any(word in said for word in ("connection", "peer", "nccl", "socket", "timed out"))


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if is_distributed():
        PartialState().wait_for_everyone()


def is_set_anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all ask at the same time."""
    if not is_distributed():
        return flag
    counted = torch.tensor(int(flag), device=PartialState().device)
    distributed.all_reduce(counted, distributed.ReduceOp.MAX)
    return bool(counted.item())
