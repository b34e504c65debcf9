"""JSON and YAML from files of other people: bounded, so that no document can fill the memory or end the process."""

import json
import re
from typing import Any

import yaml

_DEEPEST = 100
_MOST_DIGITS = 100
"""The largest whole number in files that are right is transformers' `model_max_length` of 31 digits."""
_LONGEST_YAML = 4 << 20
_MOST_NODES = 20_000
"""Of a YAML document once each alias is replaced by what it stands for; a second or two of reading."""
_SURROGATE = re.compile("[\ud800-\udfff]")
# what PyYAML lets through of a scalar that its tag does not fit: a date that does not exist, a number of 5,000 digits
_MISFITS = (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError)


def decode_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, nested deeper than 100 levels, holds a whole number of more than 100 digits, or
            half of a pair of surrogates, which no file can hold.
    """
    try:
        value = json.loads(text, parse_int=_read_whole)
    except RecursionError:
        raise ValueError(explain_depth()) from None
    _check_values(value)
    return value


def decode_yaml(text: str) -> Any:
    """The value of a YAML text of plain values.

    Raises:
        ValueError: if it is not YAML, longer than 4 MiB, nested deeper than 100 levels, if it holds more than 20,000
            values, also by its aliases, if an alias stands for itself, or a value is not what its tag says.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"it has {len(text):,} characters, and at most {_LONGEST_YAML:,} are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, 0)
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(explain_depth()) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except _MISFITS as error:
        raise ValueError(f"a value is not what it is written as ({error})") from None
    _check_values(value)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's, which stops where a document becomes too large for it to read soon."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node."""
        self.composed += 1
        if self.composed > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        return super().compose_node(parent, index)


def check_depth(text: str, value: Any) -> None:
    """Check that a value is nested no deeper than 100 levels.

    Args:
        text: the JSON that it was read from, whose brackets clear most values at once.

    Raises:
        ValueError: if it is.
    """
    if text.count("[") + text.count("{") <= _DEEPEST:
        return
    level = [value]
    for _ in range(_DEEPEST + 1):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for one in inside for each in one]
    if level:
        raise ValueError(explain_depth())


def _read_whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, and at most {_MOST_DIGITS} are read")
    return int(digits)


def _check_values(value: Any) -> None:
    """Check depth, numbers and texts, level by level, as recursion would end where the depth does."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        if not level:
            return
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += [*each.keys(), *each.values()]
            elif isinstance(each, list | tuple | set):
                below += each
            elif isinstance(each, str) and (half := _SURROGATE.search(each)):
                raise ValueError(f"a text holds half of a pair of surrogates ({half[0]!r})")
            elif isinstance(each, int) and each.bit_length() > 4 * _MOST_DIGITS:
                raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
        level = below
    raise ValueError(explain_depth())


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """The number of values that a node stands for, its aliases written out."""
    if depth > _DEEPEST:
        raise ValueError(explain_depth())
    if not isinstance(node.value, list):
        return 1
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise yaml.YAMLError(f"an alias stands for what it is in itself (line {node.start_mark.line + 1})")
        return known
    counts[id(node)] = 0
    inside = [each for item in node.value for each in (item if isinstance(item, tuple) else (item,))]
    total = 1
    for each in inside:
        total += _count_nodes(each, counts, depth + 1)
        if total > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
    counts[id(node)] = total
    return total


def explain_depth() -> str:
    """Why a document is not read."""
    return f"it is nested deeper than {_DEEPEST} levels"
