"""The palette of the figures: its contrast, and what people with colour-vision deficiency see."""

import itertools
import re
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest

from experiments.report.style import COLOUR, DASH, EDGE, LINE, SERIES, SHADES, looks

ROOT = Path(__file__).parents[3]
# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color
# vision deficiency", table 1, severity 1.0; for linear RGB.
SEEN_BY = {
    "everybody else": np.eye(3),
    "deuteranopes": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopes": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
# CIE XYZ of linear sRGB, relative to the white point D65.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ.sum(1)
# Greys of axes, grids and edges, which carry no meaning.
NEUTRAL = {"#333333", "#BBBBBB", "#EEEEEE", "#F0E9D2"}


def linear(colour: str) -> np.ndarray:
    """Return a colour as linear RGB."""
    values = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, back: str = "#FFFFFF") -> float:
    """Return the contrast ratio of WCAG 2."""
    dark, light = sorted(XYZ[1] @ linear(one) + 0.05 for one in (colour, back))
    return light / dark


def distance(colours: tuple[str, str], people: str) -> float:
    """Return the distance of two colours in CIELAB (1976), as these people see them."""
    places = []
    for colour in colours:
        seen = np.clip(SEEN_BY[people] @ linear(colour), 0, 1)
        x, y, z = np.cbrt(np.maximum(XYZ @ seen / WHITE, 1e-6))
        places.append(np.array([116 * y, 500 * (x - y), 200 * (y - z)]))
    return float(np.linalg.norm(places[0] - places[1]))


def test_lines_stand_out_from_the_background():
    """Each line, and the edge of each bar, has a contrast of at least 3:1 to white."""
    for colour in (*LINE.values(), *SHADES, EDGE["edgecolor"]):
        assert contrast(colour) >= 3, colour


@pytest.mark.parametrize("people", SEEN_BY)
def test_colours_that_are_drawn_together_are_told_apart(people):
    """Areas are 17 apart or more, lines 13 with other dashes, and neighbouring shades 10."""
    for pair in itertools.combinations(COLOUR.values(), 2):
        assert distance(pair, people) > 17, pair
    for one, other in itertools.combinations(LINE, 2):
        assert distance((LINE[one], LINE[other]), people) > 13, (one, other)
    assert len(set(map(str, DASH.values()))) == len(LINE)
    for pair in itertools.pairwise(SHADES):
        assert distance(pair, people) > 10, pair
    for shade in SHADES:
        assert distance((shade, LINE["full"]), people) > 30


def test_the_palette_is_defined_once():
    """No other file has a colour of its own: studies import the palette, notebooks repeat it."""
    known = {*COLOUR.values(), *LINE.values(), *SHADES} | NEUTRAL
    for folder, ending in (("experiments", "py"), ("benchmarks", "py"), ("notebooks", "ipynb")):
        for path in (ROOT / folder).rglob(f"*.{ending}"):
            text = re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8"))
            found = set(re.findall(r'(?<=["\'])#[0-9A-Fa-f]{6}(?=\\?["\'])', text))
            if ending == "py" and path.name != "style.py":
                assert {colour.upper() for colour in found} <= NEUTRAL, path
            else:
                assert found <= known, path


def test_lines_without_a_colour_of_their_own_take_others():
    """Names of the palette keep their look; other names get looks that differ from these."""
    drawn = looks(["a", "full", "b", "joint"])
    assert drawn["full"]["color"] == LINE["full"]
    assert len({str(look) for look in drawn.values()}) == 4
    assert not {"full", "joint"} & set(SERIES)
