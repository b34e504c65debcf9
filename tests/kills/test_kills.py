"""The short form of `make kills`: a few places of each kind of write, drawn by a seed; nothing may be lost at any."""

import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")
ONLY = "train best model|merge over|to mlx|to torchtune|--out"
SCENARIOS, TRIES = 11, 2


@pytest.mark.long
def test_kills_and_full_disks_lose_nothing():
    command = [sys.executable, HARNESS, f"--only={ONLY}", "--tries", str(TRIES), "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" | {SCENARIOS * TRIES} | 0 | {SCENARIOS * TRIES} | 0 |" in done.stdout.splitlines()[-1]
