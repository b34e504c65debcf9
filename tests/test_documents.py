"""JSON and YAML of other people: bounded, and never a traceback."""

import pytest

from doralib.documents import decode_json, decode_yaml
from doralib.errors import DoraError, UsageError
from doralib.files import read_json, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 150 + "]" * 150, "nested deeper"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested deeper"),
        ("9" * 5000, "5,000 digits"),
        ('{"a": "\\ud800"}', "half of a pair"),
        ('{"\\ud800": 1}', "half of a pair"),
    ],
)
def test_json_beyond_the_bounds(text, why):
    with pytest.raises(ValueError, match=why):
        decode_json(text)


def test_what_right_files_hold_is_read():
    # transformers' largest model_max_length
    assert decode_json("1000000000000000019884624838656") == 1000000000000000019884624838656
    assert decode_json('["\\ud83d\\ude00"]') == ["😀"]
    assert decode_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    assert decode_yaml("") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "more than 20,000 values"),
        ("a: [" + "1," * 20_001 + "]", "it holds more than 20,000 values"),
        ("a: &a [*a]", "stands for what it is in"),
        ("[" * 3000, "nested deeper|expected"),
        ("[" * 150 + "]" * 150, "nested deeper"),
        ("9" * 5000, "not what it is written as"),
        ("0x" + "f" * 400, "more than 100 digits"),
        ("a: 2026-02-30", "not what it is written as"),
        ("a: !!timestamp x", "not what it is written as"),
        ("a: !!int x", "not what it is written as"),
        ("a: !!bool x", "not what it is written as"),
        ("a: " + "x" * (5 << 20), "at most"),
        ("a: 'x", "found unexpected end|while scanning"),
    ],
)
def test_yaml_beyond_the_bounds(text, why):
    with pytest.raises(ValueError, match=why):
        decode_yaml(text)


def test_another_root_is_named(tmp_path):
    path = tmp_path / "a.json"
    for text, found in {"[1]": "a list", "3": r"a number \(3\)", "null": "nothing", '"x"': "a text"}.items():
        path.write_text(text)
        with pytest.raises(DoraError, match=rf"a\.json should hold an object, .*{found}"):
            read_json(path)
    path.write_text("[" * 5000)
    with pytest.raises(DoraError, match=r"a\.json is not whole JSON \(it is nested"):
        read_json(path)
    (tmp_path / "a.yaml").write_text(LAUGHS)
    with pytest.raises(UsageError, match=r"a\.yaml is not YAML: its aliases"):
        read_yaml(tmp_path / "a.yaml")
