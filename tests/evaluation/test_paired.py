"""The interval of a change, over rows that both models answered."""

import numpy as np
import pytest

from doralib import progress
from doralib.evaluation.metrics import compare_answers


def test_the_interval_is_that_of_drawn_pairs():
    rng = np.random.default_rng(1)
    hard = rng.random(400)
    before = "".join("01"[bool(h < 0.5)] for h in hard)
    after = "".join("01"[bool(h < 0.56)] for h in hard)
    found = compare_answers(before, after, seed=0)
    change = np.array([*map(int, after)]) - np.array([*map(int, before)])
    drawn = [rng.choice(change, 400).mean() for _ in range(4000)]
    assert found.value == pytest.approx(change.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)
    # far narrower than what two samples of rows would give
    assert found.high - found.low < 0.06 < 2 * 1.96 * np.sqrt(2 * 0.25 / 400)
    assert compare_answers(after, before, seed=0).value == -found.value
    assert compare_answers("0101", "0101", seed=0).high == 0


def test_where_no_bar_can_move_lines_say_how_far_it_is(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tick = progress.log_progress()
    with caplog.at_level("INFO", logger="doralib"):
        for _ in range(10):
            now[0] += 6.0
            tick("movies", 0.1, 1.0)
    assert [record.getMessage().strip() for record in caplog.records] == [f"movies: {n}%" for n in (20, 40, 60, 80)]
