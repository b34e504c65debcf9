"""What is kept for a layer follows from parameters that an optimiser changes in all layers at once.

So it is made anew for all of them at once, when the first is asked for it: a few operators over all rows, where each
layer by itself would run as many between two large products that have emptied the caches.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..functional import ALIGNMENT


class Member(Protocol):
    """One layer's share."""

    def has_changed(self) -> bool:
        """Whether what it was made from last has changed, as far as it can know by itself."""


M = TypeVar("M", bound=Member)


class Together:
    """The layers of one model that are in use: one that was taken along and then not asked is left out from there on.

    Nothing relies on it: a member that was left out, or changes again, finds out when it is asked itself.
    """

    def __init__(self) -> None:
        self._members: dict[int, weakref.ref[Any]] = {}
        self._not_asked: set[int] = set()

    def remember(self, member: Member) -> None:
        """That it was asked."""
        self._members[id(member)] = weakref.ref(member)
        self._not_asked.discard(id(member))

    def changed(self, asking: M) -> list[M]:
        """Those beside the one that is asking that have changed; the caller makes them anew."""
        # a list at once, and no error for a key that is gone: another thread may be asking too
        known = [(key, ref()) for key, ref in list(self._members.items())]
        others = [
            (key, member) for key, member in known if member is not asking and (not member or member.has_changed())
        ]
        for key, member in others:
            if member is None or key in self._not_asked:
                self._members.pop(key, None)
                self._not_asked.discard(key)
        taken = [(key, member) for key, member in others if key in self._members]
        self._not_asked |= {key for key, _ in taken}
        return [member for _, member in taken if member is not None]

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model's layers meet again under a copy of their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def at_hand(refs: Sequence[weakref.ref[Tensor]]) -> tuple[Tensor, ...] | None:
    """The tensors, where all of them live and hold values: FSDP2 frees the memory of a layer that is not computing."""
    found = tuple(t for ref in refs if (t := ref()) is not None and (t.data_ptr() or not t.numel()))
    return found if len(found) == len(refs) else None


def split_rows(t: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Each layer's rows of what was made for all, aligned as a tensor of its own would be.

    A product's last bits may follow from the alignment of its operands. They must not follow from which layers were
    made together.
    """
    return [own.clone() if own.is_cpu and own.data_ptr() % ALIGNMENT else own for own in t.split(list(rows))]
