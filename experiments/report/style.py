"""Colours and settings that all figures share. One thing has one colour everywhere."""

from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOUR = {
    "base": "#555555",
    "off": "#0072B2",
    "on": "#D55E00",
    "wrapped": "#009E73",
    "scrambled": "#CC79A7",
    "published": "#000000",
}
STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
