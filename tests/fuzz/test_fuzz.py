"""Some damaged files of each kind, the same ones each time; `make fuzz` tries thousands."""

from fuzz.harness import run_cases


def test_damaged_files_are_read_or_refused():
    counts, failures = run_cases(2, seed=1, minutes=0.5)
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) > 100
