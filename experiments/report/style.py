"""Colours and settings that all figures share. Each thing has the same colour in every figure."""

from typing import Any

# Okabe and Ito's palette, which people with colour-vision deficiency can tell apart.
COLOUR = {
    "base": "#555555",
    "off": "#0072B2",
    "on": "#D55E00",
    "wrapped": "#E69F00",
    "full": "#009E73",
    "joint": "#56B4E9",
    "scrambled": "#CC79A7",
    "published": "#000000",
}
# The groups of classes that accuracies are given for.
GROUP_COLOUR = {"tuned": COLOUR["on"], "other": COLOUR["off"], "all": COLOUR["base"]}
STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
