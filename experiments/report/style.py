"""Colours and settings that all figures share. Each thing has the same colour in every figure."""

import itertools
from collections.abc import Iterable
from typing import Any

from cycler import cycler

# Okabe and Ito's palette, which people with colour-vision deficiency can tell apart. It is for
# areas. Bars have an edge, since the light colours have a contrast below 3:1 to white.
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
# For lines and points: the light colours are darker here, with a contrast of at least 3:1 to white.
LINE = COLOUR | {"wrapped": "#7A5400", "joint": "#3F95CE"}
# The dashes of lines that are drawn together, so that they differ by more than their colour.
DASH: dict[str, Any] = {
    "base": ":",
    "off": "--",
    "on": "-",
    "wrapped": (0, (5, 2)),
    "full": "-.",
    "joint": (0, (4, 1, 1, 1, 1, 1)),
    "scrambled": (0, (1, 1)),
    "published": (0, (8, 2)),
}
# LoRA of several ranks or scales: the darker, the higher.
SHADES = (COLOUR["on"], "#B04C00", "#8A3A00", "#622900", "#381700")
MARKS = ("o", "s", "^", "v", "D")
EDGE: dict[str, Any] = {"edgecolor": "#333333", "linewidth": 0.5}  # of bars
# The groups of classes that accuracies are given for.
GROUP_COLOUR = {"tuned": COLOUR["on"], "other": COLOUR["off"], "all": COLOUR["base"]}
# Lines that are not named above take these in turn.
SERIES = ("on", "off", "scrambled", "published", "wrapped", "base")
STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[LINE[name] for name in SERIES]),
}


def shades(count: int) -> tuple[str, ...]:
    """Return so many of SHADES, as far apart as possible.

    >>> shades(3)
    ('#D55E00', '#8A3A00', '#381700')
    """
    last = len(SHADES) - 1
    return tuple(SHADES[i * last // max(1, count - 1)] for i in range(count))


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the colour and dashes of the line of each name, which all differ.

    A name of the palette has its own, such as "full". All others take those of SERIES in turn.

    >>> looks(["one", "full"])
    {'one': {'color': '#D55E00', 'linestyle': '-'}, 'full': {'color': '#009E73', 'linestyle': '-.'}}
    """
    others = itertools.cycle(SERIES)
    styles = {name: name if name in LINE else next(others) for name in names}
    return {name: {"color": LINE[one], "linestyle": DASH[one]} for name, one in styles.items()}
