"""What a person sees of a training run, what its file of metrics keeps, and how it stops when told to."""

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .. import disk
from ..documents import decode_json
from ..progress import Tick
from .distributed import is_set_anywhere
from .meter import Meter

log = logging.getLogger(__name__)

_STEPS_BEFORE_ESTIMATE = 3
# of an objective's own measurements, by what they are called in a line for a person
_TOLD = {"reward": "reward", "rewards/margins": "margin"}
_UNTOLD = ("num_tokens", "step_time", "total_flos")


class MetricsFile(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """One JSON object a line for every log of the Trainer; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path, self.meter = path, meter

    def cut_after(self, step: int) -> None:
        """Leave out the lines of steps that a resumed run will do again, and a last line cut short."""
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        with disk.replacing(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, _: Any, state: TrainerState, __: Any, logs: Mapping[str, float], **___: Any) -> None:
        line = self._line(logs, state.global_step)
        if line and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _line(self, logs: Mapping[str, float], step: int) -> dict[str, Any]:
        if "loss" in logs:
            names = ("epoch", "loss", "learning_rate", "grad_norm", *(name for name in logs if _is_measured(name)))
            speed = {"tokens_per_second": self.meter.rate(), "seconds": self.meter.seconds}
            return {"kind": "train", "step": step, **{name: logs[name] for name in names if name in logs}, **speed}
        if any(name.startswith("eval_") for name in logs):
            shown = {
                name: value for name, value in logs.items() if name.startswith("eval_") and name != "eval_num_tokens"
            }
            return {"kind": "eval", "step": step, "epoch": logs.get("epoch"), **shown}
        return {}


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Steps, losses, tokens a second and time to go: ticks for whoever draws them, else lines."""

    def __init__(self, meter: Meter, tick: Tick | None) -> None:
        self.meter, self.tick = meter, tick
        self.tokens_before, self.seconds_before = 0, 0.0

    def on_train_begin(self, _: Any, state: TrainerState, __: Any, **___: Any) -> None:
        self.tokens_before, self.seconds_before = self.meter.tokens, self.meter.seconds
        self._tick(state, state.global_step)

    def on_step_end(self, _: Any, state: TrainerState, __: Any, **___: Any) -> None:
        self._tick(state, 1)
        if self.meter.steps == _STEPS_BEFORE_ESTIMATE:
            log.info(f"expected time: {self._to_go(state)}, at {self._tell_speed()} {self.meter.unit} a second")

    def on_log(self, _: Any, state: TrainerState, __: Any, logs: Mapping[str, float], **___: Any) -> None:
        text = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            loss, speed = f"loss {logs['loss']:.4f}{_tell(logs)}", f"{self._tell_speed()} {self.meter.unit}/s"
            if self.tick is not None:
                self._tick(state, 0, f"{loss}, {speed}")
            else:
                log.info(f"{text}  {loss}  lr {logs['learning_rate']:.2e}  {speed}  {self._to_go(state)} to go")
        elif "eval_loss" in logs:
            log.info(f"{text}  validation loss {logs['eval_loss']:.4f}{_tell(logs, 'eval_')}")

    def on_train_end(self, _: Any, state: TrainerState, __: Any, **___: Any) -> None:
        # stopped early there are no more steps to come
        self._tick(state, state.max_steps - state.global_step)

    def _tick(self, state: TrainerState, steps: int, note: str = "") -> None:
        if self.tick is not None:
            self.tick("step", steps, state.max_steps, note)

    def _speed(self) -> float:
        seconds = self.meter.seconds - self.seconds_before
        return (self.meter.tokens - self.tokens_before) / seconds if seconds else 0.0

    def _tell_speed(self) -> str:
        speed = self._speed()
        return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"

    def _to_go(self, state: TrainerState) -> str:
        each = (self.meter.seconds - self.seconds_before) / max(self.meter.steps, 1)
        return _estimate(each * (state.max_steps - state.global_step))


class AtCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Calls a function with the step of each checkpoint that was saved, but for the last, which is the end."""

    def __init__(self, do: Callable[[int], None]) -> None:
        self.do = do

    def on_save(self, _: Any, state: TrainerState, __: Any, **___: Any) -> None:
        if state.global_step < state.max_steps:
            self.do(state.global_step)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C (or SIGTERM) ends the run after the step it is in, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.caught: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch the signals inside the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        # all stop after the same step, whichever process the signal reached first
        if is_set_anywhere(self.caught is not None):
            self.caught = signal.SIGTERM if self.caught is None else self.caught
            control.should_save = control.should_training_stop = True

    def _catch(self, number: int, _: Any) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        log.info("stopping after this step, with a checkpoint; once more to stop at once")


def _is_measured(name: str) -> bool:
    """Whether an objective measured it, and no clock did."""
    return name not in _UNTOLD and ("/" in name or name in ("reward", "reward_std", "kl", "entropy", "nll_loss"))


def _tell(logs: Mapping[str, Any], prefix: str = "") -> str:
    found = {word: logs.get(prefix + name) for name, word in _TOLD.items()}
    return "".join(f"  {word} {value:.3f}" for word, value in found.items() if value is not None)


def _estimate(seconds: float) -> str:
    """A time rounded up to what matters: ``45 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # a killed run leaves its last line half written; a damaged one is left out
        with suppress(ValueError):
            line = decode_json(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines
