"""Colours, once: for pages in light and dark, and for pictures.

Series are Okabe & Ito's colours, moved until each has a contrast of 3 : 1 to the page. Signed cosines have
diverging maps from orange (-) to blue (+) in equal steps of Oklab, in which zero is the page itself: what is
not there is not seen.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5b6570",
    "rule": "#dde2e7",
    "wash": "#f5f7f9",
    "accent": "#0063a3",
}
DARK = {
    "paper": "#101418",
    "ink": "#e4e8ec",
    "muted": "#9ba6b1",
    "rule": "#2c343c",
    "wash": "#181e24",
    "accent": "#6bb8f0",
}
SERIES_LIGHT = ("#0072b2", "#d55e00", "#00805c", "#b0508f", "#8c6d00", "#2f8fc4", "#6b6b6b", "#8a1c3b")
SERIES_DARK = ("#56b4e9", "#f58a3c", "#2cc295", "#e08fc2", "#e6c34a", "#a5d4f2", "#b0b0b0", "#ef7c97")
"""Methods in order of appearance; a ninth begins again, with the dashes shifted."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

DIVERGING_LIGHT = (
    *("#6e1c00", "#9e3c1b", "#bc6d54", "#d69c8a", "#eecdc2"),
    "#ffffff",
    *("#c5d6f0", "#8faedb", "#5b86c5", "#275ead", "#003882"),
)
DIVERGING_DARK = (
    *("#ffcba9", "#e7955c", "#ad7147", "#764f35", "#433023"),
    "#101418",
    *("#253746", "#385d7c", "#4d87b6", "#63b3f4", "#b6ddff"),
)


def css() -> str:
    """Every colour as a custom property: `--ink`, `--series-0`, `--map-0`, ..., under both colour schemes."""
    light = LIGHT | _numbered("series", SERIES_LIGHT) | _numbered("map", DIVERGING_LIGHT)
    dark = DARK | _numbered("series", SERIES_DARK) | _numbered("map", DIVERGING_DARK)
    return (
        f":root {{ color-scheme: light dark; {_properties(light)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_properties(dark)} }} }}"
    )


def _numbered(name: str, colours: tuple[str, ...]) -> dict[str, str]:
    return {f"{name}-{number}": colour for number, colour in enumerate(colours)}


def _properties(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
