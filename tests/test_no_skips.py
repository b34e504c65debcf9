"""`--no-skips`, with which `make interop` runs: what would be skipped fails and says why, and nothing else changes."""

import shutil
from pathlib import Path

import pytest

CONFTEST = next(folder / "conftest.py" for folder in Path(__file__).parents if (folder / "conftest.py").is_file())
CALLED = "import pytest\ndef test_it():\n    pytest.importorskip('nosuch', reason='nosuch is absent: called')"
MARKED = "import pytest\n@pytest.mark.skip(reason='nosuch is absent: marked')\ndef test_it():\n    pass"
WHOLE = "import pytest\npytest.importorskip('nosuch', reason='nosuch is absent: whole')\ndef test_it():\n    pass"
OTHERS = "import pytest\ndef test_good():\n    pass\n@pytest.mark.xfail\ndef test_known():\n    assert False"

pytest_plugins = ["pytester"]


def test_a_skip_fails_and_says_why(pytester):
    shutil.copy(CONFTEST, pytester.path)
    pytester.makepyfile(test_called=CALLED, test_marked=MARKED, test_whole=WHOLE, test_others=OTHERS)
    pytester.runpytest_inprocess().assert_outcomes(passed=1, xfailed=1, skipped=3)
    strict = pytester.runpytest_inprocess("--no-skips", "--continue-on-collection-errors")
    strict.assert_outcomes(passed=1, xfailed=1, failed=1, errors=2)
    assert strict.ret == pytest.ExitCode.TESTS_FAILED
    strict.stdout.fnmatch_lines_random([f"*--no-skips: *nosuch is absent: {w}" for w in ("called", "marked", "whole")])
