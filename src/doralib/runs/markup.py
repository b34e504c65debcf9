"""HTML and SVG as values: whatever is not markup already is escaped, so data cannot become markup."""

import html


class Markup(str):
    """Text that is markup already and stands as it is."""

    __slots__ = ()


Child = str | int | float | None

_VOID = {"br", "meta", "hr", "img"}


def el(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """One element; children that are not Markup are escaped, and children and attributes that are None left out.

    Of attributes, ``class_`` stands for ``class`` and ``stroke_width`` for ``stroke-width``.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Pieces one after the other, escaped unless they are Markup; None is left out."""
    pieces = [
        child if isinstance(child, Markup) else html.escape(str(child)) for child in children if child is not None
    ]
    return Markup("".join(pieces))


def html_table(
    head: list[Child], rows: list[list[Child]], class_: str = "", numbers: frozenset[int] = frozenset()
) -> Markup:
    """A table that scrolls sideways by itself on a narrow screen.

    The first cell of a row is its heading; the columns in ``numbers`` are aligned to the right.
    """
    kinds = ["n" if column in numbers else None for column in range(len(head))]
    titles = [el("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds, strict=True)]
    lines = [
        el("tr", *(
            el("th", cell, scope="row", class_=kind) if column == 0 else el("td", cell, class_=kind)
            for column, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        ))
        for row in rows
    ]  # fmt: skip
    inner = el("table", el("thead", el("tr", *titles)), el("tbody", *lines), class_=class_ or None)
    return el("div", inner, class_="scroll")


# styles and sounds stand in the page, pictures in it or beside it; nothing else is fetched, and no script runs
NO_SCRIPT = el(
    "meta",
    http_equiv="Content-Security-Policy",
    content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; media-src data:; base-uri 'none'; "
    "form-action 'none'",
)
