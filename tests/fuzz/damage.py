"""Damage to files, drawn at random: bytes, values of JSON and YAML, tensors of safetensors."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

DEEP = "[" * 5000 + "]" * 5000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
# fmt: off
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e-45, 1e39, 1e300, float("inf"), float("nan"), 10**9, 10**20),
    *("", "x", "\x1b[2J", "\u202e", "a\0b", "../../etc/passwd", "/", "{x.__class__}", "{", "1e400", "(a+)+$"),
    *("[", "é" * 3000, [], {}, [[]], [None], [1], ["x", 1], {"": ""}, {"x": None}, {"a": {"b": []}}, [-1], [10**12]),
]
YAML_TEXTS = [
    *("2026-02-30", "!!timestamp x", "!!int x", "!!float x", "!!binary x", "!!bool x", "!!python/object:os.system x"),
    *("9" * 5000, "&a [*a]", "*missing", "{? [1]: 2}", "{? {}: 2}", "!!set {a, b}", "!!omap [a: 1]", "<<: 3"),
    *("[" * 3000, "{a: " * 300, "!!str [a]", "2026-01-01", ".inf", ".nan", "0x" + "f" * 400, "!!pairs 3", "!!map []"),
]
# fmt: on
DTYPES = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float64, torch.float16)


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, change, put in, take out or double some bytes."""
    content = bytes(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 2, 8, 64))
        same = bytes([draw.randrange(256)]) * length
        new = draw.choice((same, draw.randbytes(length), b"\0", b"\xff\xfe", b'"', b"}"))
        content = draw.choice((
            content[:at],
            content[:at] + new + content[at + length :],
            content[:at] + new + content[at:],
            content[:at] + content[at + length :],
            content[:at] + content[at // 2 : at] + content[at:],
            b"" if draw.random() < 0.1 else content[::-1] if draw.random() < 0.1 else content[at:],
        ))  # fmt: skip
    return content


def damage_value(value: Any, draw: random.Random) -> Any:
    """Put hostile values into some places of a tree, take some out, or take another root."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places or draw.random() < 0.04:
            return draw.choice(HOSTILE)
        inside, key = draw.choice(places)
        how = draw.random()
        if how < 0.12:
            del inside[key]
        elif how < 0.2:
            inside[key] = [inside[key]]
        elif how < 0.26 and isinstance(inside, dict):
            inside[draw.choice(("x", "\x1b[2J", "r ", "", "__class__", str(key).upper()))] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(draw.choice(HOSTILE))
    return value


def _places(value: Any):
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damage_json(path: Path, draw: random.Random) -> None:
    """Harm a JSON file as bytes or as values."""
    how = draw.random()
    if how < 0.3:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        return
    text = json.dumps(damage_value(json.loads(path.read_text()), draw))
    if how < 0.4:
        word = draw.choice((DEEP, "9" * 5000, '"\\ud800"', "1e999999", "-", '{"a":' * 2000 + "1" + "}" * 2000))
        at = text.find(":", draw.randrange(len(text))) + 1
        end = min((i for i in (text.find(",", at), text.find("}", at)) if i > 0), default=len(text))
        text = text[:at] + word + text[end:]
    path.write_text(text)


def damage_json_lines(path: Path, draw: random.Random) -> None:
    """Harm a file of one JSON value a line, as bytes or in some lines."""
    if draw.random() < 0.3:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        return
    lines = path.read_text().splitlines()
    for _ in range(draw.choice((1, 2, 3))):
        i = draw.randrange(len(lines))
        try:
            lines[i] = json.dumps(damage_value(json.loads(lines[i]), draw))
        except (ValueError, RecursionError):  # a line that was harmed before
            lines[i] = draw.choice(("", "null", DEEP, "{"))
        if draw.random() < 0.1:
            lines[i] = draw.choice((DEEP, "9" * 5000, '{"a": "\\ud800"}', "\x1b[2J"))
    path.write_text("\n".join(lines))


def damage_yaml(path: Path, draw: random.Random) -> None:
    """Harm a YAML file as bytes, as values or by what YAML alone can say."""
    how = draw.random()
    if how < 0.25:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
    elif how < 0.65:
        path.write_text(yaml.safe_dump(damage_value(yaml.safe_load(path.read_text()), draw), sort_keys=False))
    elif how < 0.7:
        path.write_text(LAUGHS + path.read_text())
    else:
        lines = path.read_text().splitlines()
        i = draw.randrange(len(lines))
        lines[i] = lines[i].partition(":")[0] + ": " + draw.choice(YAML_TEXTS)
        path.write_text("\n".join(lines))


def damage_tensors(path: Path, draw: random.Random) -> None:  # noqa: C901, PLR0912, PLR0915  a branch for each harm
    """Harm a file of tensors as bytes, in its header, or one of its tensors."""
    how = draw.random()
    if how < 0.25 or path.suffix != ".safetensors":
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        return
    if how < 0.45:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(damage_value(json.loads(content[8 : 8 + length]), draw)).encode()
        size = draw.choice((len(header), len(header), len(header), 2**62, 0, len(header) - 1))
        path.write_bytes(size.to_bytes(8, "little") + header + content[8 + length :])
        return
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not tensors:
            break
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        change = draw.randrange(9)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = tensor.flatten()
        elif change == 2:
            tensors[name] = tensor.to(draw.choice(DTYPES))
        elif change == 3 and tensor.numel():
            wrong = draw.choice((float("nan"), float("inf"), 3e38, 1e-45))
            tensors[name] = torch.full(tensor.shape, wrong if tensor.is_floating_point() else 0).to(tensor.dtype)
        elif change == 4:
            other = draw.choice((name + "x", "", "\x1b[2J", name.replace("0", "7"), name.rpartition(".")[2]))
            tensors[other] = tensors.pop(name)
        elif change == 5:
            tensors[name] = tensor[None] if tensor.dim() < 6 else tensor
        elif change == 6:
            shape = draw.choice(((), (0,), (0, 4), (4, 0), (1,), (1, 1), (2, 3, 4), (3, 1, 1, 1, 1, 1)))
            tensors[name] = torch.zeros(shape)
        elif change == 7 and tensor.dim():
            tensors[name] = tensor[: draw.randrange(len(tensor) + 1)]
        else:
            tensors[name] = tensor.t() if tensor.dim() == 2 else tensor
    if metadata and draw.random() < 0.2:
        metadata = {key: draw.choice(("", "null", "[1]", DEEP, '{"a": 1}', "\x1b[2J", '"x"')) for key in metadata}
    safetensors.torch.save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata)
