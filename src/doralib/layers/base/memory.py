"""Whether a frozen tensor is in the memory that it was in, also where FSDP2 takes that anew for every pass."""

import weakref
from typing import Any

import torch
from torch import Tensor


class Memory:
    """Numbers the memories that a tensor has been in."""

    def __init__(self) -> None:
        self._number = 0
        self._address: int | None = None
        self._storage: weakref.ref[Any] | None = None
        self._some: Tensor | None = None

    def number(self, t: Tensor) -> int:
        """Another one once the tensor is in another memory; the same where its storage has got its memory back.

        FSDP2 frees a weight after each pass and gathers it for the next, into the same storage. A few values tell
        whether it is still the same weight; on a GPU, where to ask would be to wait, a load of weights says so.
        """
        address = 0 if t.is_meta else t.data_ptr()
        if address == self._address:
            return self._number
        storage = t.untyped_storage()
        some = _take_some(t) if t.is_cpu else None
        known = None if self._storage is None else self._storage()
        same = known is storage and (some is None or (self._some is not None and torch.equal(some, self._some)))
        if not same:
            self._number += 1
        self._address, self._storage, self._some = address, weakref.ref(storage), some
        return self._number

    def __reduce__(self) -> Any:
        """A copy begins anew: it is of another tensor."""
        return Memory, ()


def _take_some(t: Tensor) -> Tensor:
    """Up to 256 values, from all over the tensor."""
    rows = t.detach()
    rows = rows.reshape(-1, 1) if rows.dim() < 2 else rows.flatten(1)
    O, I = rows.shape
    return rows[:: max(1, O // 16), :: max(1, I // 16)].clone()
