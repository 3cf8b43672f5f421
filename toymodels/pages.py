"""Pages that stand alone: text that is escaped unless it was built here, and the pieces that sections are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from toymodels import palette


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Markup stays as it is; anything else is escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    """The parts one after the other."""
    return Html("\n".join(text(part) for part in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """One element; `class_` and `data_x` are written as class and data-x."""
    written = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{''.join(text(part) for part in content)}</{name}>")


def section(title: str, reading: object, *content: object) -> Html:
    """A titled part of the report with a sentence on how to read it."""
    return tag("section", tag("h2", title), tag("p", reading, class_="reading"), *content)


def folded(title: str, *content: object) -> Html:
    """A box that opens on a click."""
    return tag("details", tag("summary", title), *content)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], label: str) -> Html:
    """The first column names the row; numbers are set flush right, in a box that scrolls by itself."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def grid(*figures: object, columns: int) -> Html:
    """Figures side by side, one below the other where there is no room."""
    return tag("div", *figures, class_=f"grid columns-{columns}")


def page(title: str, body: Html, scripts: Sequence[str] = ()) -> str:
    """The whole file: nothing in it is loaded from elsewhere, and its policy forbids to try."""
    return Template(_read("page.html")).substitute(
        title=escape(title),
        policy="script-src 'unsafe-inline'; " if scripts else "",
        colours=palette.css(),
        style=_read("style.css"),
        body=body,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _read(name: str) -> str:
    return resources.files("toymodels").joinpath(name).read_text(encoding="utf-8")
