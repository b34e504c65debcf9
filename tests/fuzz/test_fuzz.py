"""Some damaged files of each kind, the same ones each time; `make fuzz` tries thousands."""

from collections import Counter

import pytest
from tally import Tally

from fuzz.harness import run_cases, write_table


def test_damaged_files_are_read_or_refused():
    counts, failures = run_cases(2, seed=1, minutes=0.5)
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) > 100


def test_the_page_sums_the_seeds_and_counts_none_twice(tmp_path):
    tally = Tally(tmp_path / "counts.jsonl", tmp_path / "page.md", "fuzz")
    tally.page.write_text("above\n<!-- fuzz: begin -->\nold\n<!-- fuzz: end -->\nbelow\n")
    tally.add(3, Counter({("GGUF", "refused"): 1000, ("GGUF", "read"): 2, ("GGUF", "places"): 7}))
    total = tally.add(4, Counter({("GGUF", "refused"): 500, ("recipes", "hang"): 1, ("GGUF", "places"): 8}))
    assert total["GGUF", "places"] == 8  # how many there are, not how many were tried
    tally.write(write_table(total), "in a test")
    text = tally.page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("-->\nbelow\n")
    assert "old" not in text
    assert ", seeds 3, 4, in a test:" in text
    assert "| GGUF | 1,502 | 2 | 1,500 | 0 | 0 |" in text
    assert "| all | 1,503 | 2 | 1,500 | 0 | 1 |" in text
    with pytest.raises(SystemExit, match="has seed 3 already; take another, such as SEED=5"):
        tally.refuse_again(3)
    tally.refuse_again(5)
