"""What one step frees is there for the next one."""

import os
import platform
import subprocess
import sys

import pytest

from doralib import cli, heap
from doralib.recipes import demo, text

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
COUNT = """
import resource, sys, torch
from doralib.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
counted = []
for _ in range(8):
    before = faults()
    logits, gradient = (torch.empty(64 << 20, dtype=torch.uint8).fill_(1) for _ in range(2))
    del logits, gradient
    counted.append(faults() - before)
print(kept, sum(counted[4:]))
"""


def faults_of_later_steps(mode, **settings):
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)} | settings
    done = subprocess.run([sys.executable, "-c", COUNT, mode], env=env, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@glibc
def test_pages_are_taken_once():
    kept, faults = faults_of_later_steps("keep")
    assert kept
    assert faults < 100
    _, plain = faults_of_later_steps("plain")
    # of 4 KiB some 130,000; pages of 2 MiB everywhere: 4 x 64
    assert plain > 200


def test_what_the_environment_says_stays():
    kept, _ = faults_of_later_steps("keep", MALLOC_ARENA_MAX="8")
    assert not kept


def test_long_commands_ask_for_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(heap, "keep_freed_memory", lambda: asked.append("kept"))
    monkeypatch.setattr(demo, "run_demo", lambda **_: asked.append("demo"))
    monkeypatch.setattr(text, "train", lambda *_, **__: asked.append("train"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: d.jsonl, style: text}\nout: o\n")
    cli.train(str(recipe))
    cli.demo()
    assert asked == ["kept", "train", "kept", "demo"]
