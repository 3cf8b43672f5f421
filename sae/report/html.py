"""What the report's page has beyond a page: figures that plotly draws in the reader's colours."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from sae.extras import require
from toymodels import pages
from toymodels.pages import Html, tag

Figure = dict[str, Any]
"""A plotly figure as plotly.js reads it: `data` and `layout`. Colours are named as in CSS: `var(--ink)`."""


def plot(figure: Figure, title: str, label: str, shape: str = "wide") -> Html:
    """A figure that page.js draws; `label` says in words what it shows, `shape` is its class in style.css."""
    data = json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", class_=f"plot {shape}", role="img", aria_label=label),
        Html(f'<script type="application/json">{data}</script>'),
    )


def page(title: str, body: Html) -> str:
    """The whole file."""
    return pages.page(title, body, [plotly_js(), resources.files("sae.report").joinpath("page.js").read_text("utf-8")])


@cache
def plotly_js() -> str:
    """The plotting library itself.

    Raises:
        UsageError: plotly is not installed.
    """
    require("plotly", "report", "a report")
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra

    return get_plotlyjs()
