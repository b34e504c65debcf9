"""Where runs run: a process here, a job of Slurm (submitit), a task of an existing Ray cluster."""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, did_you_mean

_POLL_SECONDS = 0.2
_SLURM_POLL_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    """Its exit status; negative: killed by this signal."""
    peak_bytes: int | None
    """Most main memory that its process held; None where that cannot be known."""


Launch = Callable[[Sequence[str], Path, Callable[[], bool]], Outcome]
"""Run a command to its end: (command, file for what it prints, function that says whether to stop it now)."""


def own_command(*words: str) -> list[str]:
    """A command of doralib, by the Python that runs now."""
    return [sys.executable, "-m", "doralib", *words]


def launch_here(command: Sequence[str], log: Path, unwanted: Callable[[], bool]) -> Outcome:
    """Run in a process of its own; asked to stop, it saves a checkpoint first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    asked, peak = False, None
    try:
        while (status := process.poll()) is None:
            peak = _read_peak(process.pid) or peak
            if not asked and unwanted():
                process.terminate()
                asked = True
            time.sleep(_POLL_SECONDS)
    except BaseException:
        # Ctrl-C: no run is left behind that nobody watches
        process.terminate()
        process.wait()
        raise
    return Outcome(status, peak)


def _read_peak(pid: int) -> int | None:
    """Most memory that a process has held so far, where the system says; wait4 would count what stood before exec."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def launch_on_slurm(command: Sequence[str], log: Path, unwanted: Callable[[], bool]) -> Outcome:
    """Run as a job of Slurm; its partition and time are what submitit and the environment (SBATCH_...) say."""
    import submitit  # noqa: PLC0415  wanted with --launcher slurm alone

    executor = submitit.AutoExecutor(folder=log.parent)
    job = executor.submit(submitit.helpers.CommandFunction(list(command)))
    try:
        while not job.done():
            if unwanted():
                job.cancel(check=False)
                return Outcome(-15, None)
            time.sleep(_SLURM_POLL_SECONDS if executor.cluster == "slurm" else _POLL_SECONDS)
    except BaseException:
        job.cancel(check=False)
        raise
    log.write_text((job.stdout() or "") + (job.stderr() or ""), encoding="utf-8")
    return Outcome(0 if job.exception() is None else 1, None)


def launch_on_ray(command: Sequence[str], log: Path, unwanted: Callable[[], bool]) -> Outcome:
    """Run as a task of the Ray cluster that the environment names, on a GPU where the cluster has some."""
    import ray  # noqa: PLC0415  wanted with --launcher ray alone

    if not ray.is_initialized():
        ray.init(address="auto")
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # a task that is cancelled kills its process: the run goes on from its newest checkpoint another time
    task = ray.remote(num_gpus=gpus)(_run_there).remote(list(command))
    while not ray.wait([task], timeout=_SLURM_POLL_SECONDS)[0]:
        if unwanted():
            ray.cancel(task)
            return Outcome(-15, None)
    status, printed = ray.get(task)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(printed, encoding="utf-8")
    return Outcome(status, None)


def _run_there(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


LAUNCHERS: Mapping[str, tuple[str | None, Launch]] = {
    "local": (None, launch_here),
    "slurm": ("submitit", launch_on_slurm),
    "ray": ("ray", launch_on_ray),
}
"""By name, with the package that each needs."""


def find_launcher(name: str) -> Launch:
    """The launcher of this name.

    Raises:
        UsageError: if there is none, or its package is not installed.
    """
    if name not in LAUNCHERS:
        raise UsageError(
            f"--launcher {name}: there is none{did_you_mean(name, LAUNCHERS)}; known: {', '.join(LAUNCHERS)}"
        )
    package, launch = LAUNCHERS[name]
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"--launcher {name} needs {package}, which is not installed: pip install {package}; or leave --launcher "
            "out, or run the commands that --commands prints where you like, and then compare again"
        )
    return launch


def tail(log: Path, lines: int = 12) -> str:
    """The end of what a command printed."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
