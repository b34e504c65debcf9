"""One HTML page that opens anywhere and needs nothing: its style is in it."""

import datetime
import re
from pathlib import Path

from ..disk import replacing
from .markup import NO_SCRIPT, Child, Markup, el


def write_page(path: Path, title: str, *content: Child, source: str = "doralib", style: str = "") -> Path:
    """Write a page of this content, with a footer that says when and by what it was written; returns its path.

    The home folder is shown as ``~``: it is not for everybody whom the page is sent to.

    Args:
        source: What the page is from, after "Written by".
        style: More CSS.
    """
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        NO_SCRIPT,
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} - doralib"),
        el("style", Markup(css + style)),
    )
    now = datetime.datetime.now().astimezone()
    main = el("main", *content, el("footer", f"Written by {source}, {now:%Y-%m-%d at %H:%M}"))
    text = "<!DOCTYPE html>\n" + _hide_home(el("html", head, el("body", main), lang="en")) + "\n"
    with replacing(path) as part:
        # a text may hold half a surrogate pair, which no file can
        part.write_text(text, encoding="utf-8", errors="replace")
    return path


def _hide_home(page: str) -> str:
    home = str(Path.home()).rstrip("/")
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", page) if home else page
