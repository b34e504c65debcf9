"""Tokens and seconds of training."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Meter:
    """Counts tokens without padding, and the time inside optimizer steps: evaluation and saving are not training."""

    unit = "tokens"
    """What is counted, in a word."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        """Of this session; `seconds` and `tokens` include those before a resume."""
        self._tokens = 0
        self._pending: Tensor | None = None
        self._started = 0.0
        self._marked = (0, 0.0)

    @property
    def tokens(self) -> int:
        """All that went through the model so far."""
        if self._pending is not None:
            self._tokens += int(self._pending.item())
            self._pending = None
        return self._tokens

    def add_tokens(self, count: Tensor) -> None:
        """Count a batch; the number stays on its device until somebody asks."""
        self._pending = count if self._pending is None else self._pending + count

    def start(self) -> None:
        """An optimizer step begins."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """An optimizer step is done."""
        self.seconds += time.perf_counter() - self._started
        self.steps += 1

    def rate(self) -> float:
        """Tokens a second since the last call."""
        tokens, seconds = self.tokens - self._marked[0], self.seconds - self._marked[1]
        self._marked = (self.tokens, self.seconds)
        return tokens / seconds if seconds else 0.0

    def state(self, loss_since_log: float, last_logged: int) -> dict[str, Any]:
        """What a checkpoint must keep for a resumed run to log the same lines."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loss_since_log": loss_since_log,
            "last_logged": last_logged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._tokens, self.seconds, self._pending = state["tokens"], state["seconds"], None
        self._marked = (self._tokens, self.seconds)
