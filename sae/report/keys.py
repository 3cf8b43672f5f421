"""Legends: which line, and which marker, is whose. They look as plotly draws them."""

from __future__ import annotations

from collections.abc import Sequence

from sae.report.drawing import series, symbol
from toymodels.pages import Html, tag

# Of lines as SVG has them.
DASHES = {"solid": "none", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 4"}
# Of markers as paths in a box of 10: what drawing.SYMBOLS are in plotly.
SHAPES = {
    "circle": "M9 5A4 4 0 1 1 1 5A4 4 0 1 1 9 5Z",
    "square": "M1.3 1.3H8.7V8.7H1.3Z",
    "diamond": "M5 .3L9.7 5L5 9.7L.3 5Z",
    "triangle-up": "M5 .8L9.8 8.8H.2Z",
    "cross": "M3.4 .6H6.6V3.4H9.4V6.6H6.6V9.4H3.4V6.6H.6V3.4H3.4Z",
    "star": "M5 .2L6.3 3.6L9.9 3.8L7.1 6L8.1 9.6L5 7.5L1.9 9.6L2.9 6L.1 3.8L3.7 3.6Z",
    "pentagon": "M5 .6L9.5 3.9L7.8 9.2H2.2L.5 3.9Z",
    "hexagon2": "M2.6 .8H7.4L9.8 5L7.4 9.2H2.6L.2 5Z",
}


def lines(names: Sequence[str]) -> Html:
    """A line in front of each name; the dash tells what the colour may not."""
    pictures = []
    for colour, dash in map(series, range(len(names))):
        line = tag("line", x1=0, y1=5, x2=30, y2=5, stroke_dasharray=DASHES[dash], style=f"stroke:{colour}")
        pictures.append(tag("svg", line, viewBox="0 0 30 10", aria_hidden="true"))
    return _key(pictures, names)


def dots(names: Sequence[str]) -> Html:
    """A marker in front of each name; the shape tells what the colour may not."""
    return _key([dot(place) for place in range(len(names))], names)


def dot(place: int) -> Html:
    """The marker of the series at a place."""
    path = tag("path", d=SHAPES[symbol(place)], style=f"fill:{series(place)[0]}")
    return tag("svg", path, viewBox="0 0 10 10", class_="dot", aria_hidden="true")


def _key(pictures: Sequence[Html], names: Sequence[str]) -> Html:
    items = [tag("li", picture, name) for picture, name in zip(pictures, names, strict=True)]
    return tag("ul", *items, class_="key")
