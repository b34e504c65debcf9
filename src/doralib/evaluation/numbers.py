"""The number that an answer ends with: currency, separators, fractions, ratios and LaTeX, as one text for one value."""

import re
import unicodedata
from fractions import Fraction

_GROUPED = r"\d{1,3}(?P<gap>[,'_\u00a0\u2009\u202f])\d{3}(?:(?P=gap)\d{3})*|\d{1,2}(?:,\d{2})+,\d{3}"
# a sign belongs to a number unless it may take the number off from what stands before; after ^ stands an exponent
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-+]\s?\$?\s?)?(?<![\w^])(?<!\d\.)
    (?:(?P<european>\d{{1,3}}(?:\.\d{{3}})+,\d+|\d{{1,3}}(?:\.\d{{3}}){{2,}})(?![\d,])
      |(?P<plain>(?:(?:{_GROUPED})(?!\d)|\d+)(?:\.\d+)?|\.\d+))
    (?:\s*(?:[*x\u00d7·]|\\times|\\cdot)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,3}})\s*\}}?
      |[eE](?P<exponent>[-+]?\d{{1,3}})(?![\w.]))?
    (?P<tens>(?<=\b10)\^\{{?(?P<ten>[-+]?\d{{1,3}})\}}?)?""",
    re.VERBOSE,
)
_CURRENCY = re.compile(r"(?i)(?<![a-z])(?:rs\.?|us\$|r\$|usd|eur|gbp|inr|cad|aud)\s*(?=[-+]?\.?\d)|[€£¥₹₽₩¢]")
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{\s*([^{}]+?)\s*\}|(\d))\s*(?:\{\s*([^{}]+?)\s*\}|(\d))")
_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# minus signs and dashes, fraction and division slashes, ratio and wide colons
_SIGNS = str.maketrans("\u2212\u2013\u2012\ufe63\uff0d\u2044\u2215\u2236\uff1a", "-----//::")
_LONGEST = 200


def read_number(text: str) -> str:
    """The last number in a text, or the last in its last ``\\boxed``; "" where there is none.

    Equal values give equal texts: 1,200.50 and 1200.5, 3/4 and .75 and ``\\frac{3}{4}``. A ratio keeps its sides
    (4:6 is not 2:3). A percent sign and a currency count for nothing. Exponents of units, numbers in names (x2, H2O)
    and number words are no numbers.
    """
    box = _find_box(text)
    if box is not None and (found := _last(box)):
        return found
    return _last(text)


def _last(text: str) -> str:
    text = _plain(text)
    found = [match for match in _NUMBER.finditer(text) if len(match[0]) <= _LONGEST]
    if not found:
        return ""
    parts, between = [found[-1]], ""
    for match in reversed(found[:-1]):
        joint = text[match.end() : parts[0].start()]
        kind = "/" if re.fullmatch(r"\s?/\s?", joint) else ":" if re.fullmatch(r":| : ", joint) else ""
        if not kind or (between and kind != between):
            break
        parts, between = [match, *parts], kind
    values = [_value(match) for match in parts]
    if between == ":":
        return ":".join(map(_write, values))
    if between == "/" and len(values) == 2 and values[1]:
        return _write(_mixed(text, found, parts[0], values[0] / values[1], parts[1]))
    return _write(values[-1])


def _mixed(
    text: str, found: list[re.Match[str]], top: re.Match[str], value: Fraction, below: re.Match[str]
) -> Fraction:
    """With the whole number before a fraction, as in 1 1/2."""
    before = next((match for match in reversed(found) if match.end() < top.start()), None)
    whole = before is not None and text[before.end() : top.start()] == " " and before[0].lstrip("-+").isdigit()
    if before is None or not whole or top["sign"] or not top[0].isdigit() or not 0 < _value(top) < _value(below):
        return value
    first = _value(before)
    return first - value if before[0].startswith("-") else first + value


def _value(match: re.Match[str]) -> Fraction:
    if match["european"]:
        digits = match["european"].replace(".", "").replace(",", ".")
    else:
        digits = re.sub(r"[^\d.]", "", match["plain"])
    value = Fraction(digits)
    if match["ten"]:
        value = Fraction(10) ** int(match["ten"])
    value *= Fraction(10) ** int(match["power"] or match["exponent"] or 0)
    return -value if (match["sign"] or "").startswith("-") else value


def _write(value: Fraction) -> str:
    """As a decimal where that ends, else as a fraction."""
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest > 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return "-" * (value < 0) + f"{digits[:-places]}.{digits[-places:]}"


def _plain(text: str) -> str:
    """Without what only decorates: LaTeX, currency, other alphabets' digits."""
    text = re.sub(r"\\(?:[,;:! ]|quad)|\{,\}", lambda m: "," if m[0] in ("\\,", "{,}") else " ", text)
    text = re.sub(r"\\([$%#&])", r"\1", text)
    text = "".join(map(_plain_character, text)).translate(_SIGNS)
    text = re.sub(r"(?<=\d) ?(\d)/(\d+)\x00", r" \1/\2", text).replace("\x00", "")
    for _ in range(2):  # one in another
        text = _FRAC.sub(_write_frac, text)
    return _CURRENCY.sub("", text.replace("\\text", " ").replace("\\mathrm", " "))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺":
        return "^" + character.translate(_SUPERSCRIPT)
    kind = unicodedata.decomposition(character)
    if kind.startswith("<fraction>"):
        return unicodedata.normalize("NFKC", character).replace("\u2044", "/") + "\x00"
    digit = unicodedata.digit(character, None) if unicodedata.category(character) == "Nd" else None
    return character if digit is None else str(digit)


def _write_frac(match: re.Match[str]) -> str:
    gap = " " * match.string[: match.start()].endswith(tuple("0123456789"))
    return f"{gap}{match[1] or match[2]}/{match[3] or match[4]}"


def _find_box(text: str) -> str | None:
    """What stands in the last box, to its own closing brace."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for i, character in enumerate(text[start:], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:i]
    return text[start:]
