"""Templates with {column}: what they name, and what a row makes of them."""

import math
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from ..errors import UsageError


def columns_in(template: str, setting: str = "template") -> list[str]:
    """The columns a template names; text without braces is a column's name itself.

    Raises:
        UsageError: if a brace has no partner or holds more than a name; `setting` says where the template stands.
    """
    if not template:
        return []
    if not {"{", "}"} & set(template):
        return [template]
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(
            f"{setting} {template!r}: {error}; a brace in the text is written {{{{ or }}}}{_suggest(template)}"
        ) from None
    if any(not name or spec or conversion for name, spec, conversion in parts):
        raise UsageError(
            f"{setting} {template!r}: a pair of braces holds a column's name alone, like {{text}}; "
            f"a brace in the text is written {{{{ or }}}}{_suggest(template)}"
        )
    return [name for name, _, _ in parts if name]


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """The template with these texts in its braces, as they are; without braces the text of that name."""
    if not {"{", "}"} & set(template):
        return values[template] if template else ""
    parts = Formatter().parse(template)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def value_text(value: Any) -> str:
    """A row's value as text, as JSON writes it: true and false, a number as it stands; a missing value is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _suggest(template: str) -> str:
    """The template with every brace doubled that does not hold a name; empty where some are already."""
    if "{{" in template:
        return ""
    parts = re.split(r"(\{\w[\w .-]*\})", template)
    doubled = [part if i % 2 else part.replace("{", "{{").replace("}", "}}") for i, part in enumerate(parts)]
    return f": {''.join(doubled)!r}"
