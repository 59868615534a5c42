"""The report page: the explorer's data, and the page in a headless browser."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paramlora as pl
from experiments.analysis.confusion import accuracy
from experiments.analysis.explore import explore, sprite
from experiments.analysis.insight import only_at, predict
from experiments.harness.settings import StudyError
from experiments.report.document import Picture, Sections
from experiments.report.figures import plt, png
from experiments.report.page import page, write_page
from experiments.report.table import Sample, Table
from tests.support.helpers import unchanged

CLASSES = ["ant", "bee", "cat", "a <long> name"]
STRENGTHS = (0.0, 0.5, 1.0, 2.0)


def made() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Return a model with adapters "one" and "two", a loader, and an image for each example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pl.attach(model, pl.LoRA(rank=2), name="one")
    pl.attach(model, pl.LoRA(rank=1), name="two", activate="also")
    for factor in pl.parameters(model):
        nn.init.normal_(factor)
    inputs, labels = torch.randn(60, 6), torch.randint(4, (60,))
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1).expand(60, 5, 5).contiguous()
    return model, [(inputs[:40], labels[:40]), (inputs[40:], labels[40:])], images


@pytest.fixture(scope="module")
def explored() -> dict[str, Any]:
    model, loader, images = made()
    return explore(
        model,
        loader,
        CLASSES,
        tuned=[1, 2],
        images=images,
        strengths=STRENGTHS,
        all_subsets=["one"],
        pictured=["one"],
        mean=True,
    )


def test_every_state_is_that_of_the_model(explored):
    """Each confusion matrix is the model's with that adapter, strength and set of layers."""
    model, loader, _ = made()
    assert explored["sites"] == ["0.weight", "2.weight"]
    assert set(explored["adapters"]["one"]) == {"1", "2", "3"}
    assert set(explored["adapters"]["two"]) == {"3"}
    for name, states in explored["adapters"].items():
        for mask, matrices in states.items():
            sites = [s for i, s in enumerate(explored["sites"]) if int(mask) >> i & 1]
            for strength, matrix in zip(STRENGTHS, matrices, strict=True):
                with only_at(model, sites, name, strength=strength):
                    assert predict(model, loader).confusion == matrix
    with unchanged(model):
        again = explore(model, loader, CLASSES, strengths=[1.0])
    assert again["strengths"] == [0.0, 1.0]
    with pl.using(model):
        assert explored["base"] == predict(model, loader).confusion


def test_images_have_their_own_predictions(explored):
    """The sprite's images have their labels, and the model's predictions for each state.

    Only the adapters that are named have images; by default, all have.
    """
    from PIL import Image

    model, loader, _ = made()
    pictures = explored["images"]
    sheet = Image.open(io.BytesIO(base64.b64decode(pictures["sprite"].split(",")[1])))
    rows = [
        sheet.getpixel((5 * (i % 32) + 2, 5 * (i // 32) + 2))
        for i in range(len(pictures["labels"]))
    ]
    labels = torch.cat([y for _, y in loader])
    assert labels[rows].tolist() == pictures["labels"]
    assert list(pictures["answers"]) == ["one"]
    with pl.using(model, one=2.0):
        predicted = predict(model, loader).predicted
    assert predicted[rows].tolist() == pictures["answers"]["one"]["3"][3]
    both = explore(model, loader, CLASSES, images=made()[2], strengths=[1.0])
    assert list(both["images"]["answers"]) == ["one", "two"]
    for states in pictures["answers"].values():
        for predictions in states.values():
            assert all(len(row) == len(rows) for row in predictions)


def test_a_sprite_is_the_images_side_by_side():
    """The PNG has the pixels of each image, in colour too."""
    from PIL import Image

    images = torch.randint(256, (5, 3, 4, 3), dtype=torch.uint8)
    sheet = Image.open(io.BytesIO(base64.b64decode(sprite(images, 2).split(",")[1])))
    assert sheet.size == (8, 9)
    pixels = torch.tensor(list(sheet.tobytes())).view(9, 8, 3)
    assert torch.equal(pixels[3:6, 4:8].to(torch.uint8), images[3])


def test_the_base_is_the_state_at_strength_0():
    """The base's confusion matrix is that at λ = 0, also if there are negative strengths."""
    model, loader, _ = made()
    data = explore(model, loader, CLASSES, strengths=[-1.0, 1.0])
    assert data["strengths"] == [-1.0, 0.0, 1.0]
    with pl.using(model):
        assert data["base"] == predict(model, loader).confusion


def test_a_model_or_class_names_that_do_not_fit_raise():
    """A model without adapters, and a wrong number of class names, raise."""
    model, loader, _ = made()
    with pytest.raises(StudyError, match="3 class names, but 4 outputs"):
        explore(model, loader, CLASSES[:3])
    pl.detach(model)
    with pytest.raises(StudyError, match="has no adapter"):
        explore(model, loader, CLASSES)


def test_a_page_is_one_file_with_the_given_content(explored):
    """The page fetches nothing, escapes all text, and has the data unchanged."""
    table = Table(["a\nb", "c"], [["<x>", "1 ± 2"]])
    blocks = [table, "p < `q`", ["r & s"], Picture(b"png", "the <caption>")]
    text = page("A & B", "lead @DATA@ </script>", {"T": blocks}, explored)
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", text)
    assert not re.search(r"@(?:TITLE|LEAD|EXPLORER|BODY)@", text)
    assert "http" not in text
    assert "A &amp; B" in text
    assert "lead @DATA@ &lt;/script&gt;" in text
    assert '<th scope="col">a<br>b</th>' in text
    assert "<td>&lt;x&gt;</td><td>1 ± 2</td>" in text
    assert "<p>p &lt; <code>q</code></p>" in text
    assert "<ul><li>r &amp; s</li></ul>" in text
    assert 'src="data:image/png;base64,' in text
    assert "<figcaption>the &lt;caption&gt;</figcaption>" in text
    inside = re.search(r'type="application/json">(.*?)</script>', text, re.S)
    assert inside is not None
    assert json.loads(inside[1]) == explored
    assert 'id="explorer"' not in page("t", "l", {})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium on this machine")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=path, args=["--headless", "--no-sandbox", "--disable-gpu", *quiet]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(explored: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with an explorer, a wide table, a figure and folded settings."""
    table = Table(["what", *map(str, range(30))], [["wide", *["123.45"] * 30]])
    figure, axes = plt.subplots()
    axes.set_title("a figure")
    sections: Sections = {
        "T": [table, "text", ["a list"], Picture(png(figure), "a figure")],
        "Settings": [Table(["name", "value"], [["rank", "2"]])],
    }
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "A page", "Its lead.", sections, explored)
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, written: str) -> Iterator[Any]:
    """The page at a phone's width; an error of its script or a request fails the test."""
    tab, errors = browser.new_page(viewport={"width": 390, "height": 844}), []
    tab.on("pageerror", lambda error: errors.append(str(error)))

    def on_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            errors.append(request.url)

    tab.on("request", on_request)
    tab.goto(written)
    yield tab
    tab.close()
    assert errors == []


def choose(tab: Any, adapter: str) -> None:
    """Click on an adapter's name."""
    tab.locator(".choice", has_text=adapter).click()


def shown(tab: Any) -> list[list[int]]:
    """Return the confusion matrix on the page."""
    cells = tab.locator("#cells button").all_text_contents()
    values = [int(cell or 0) for cell in cells]
    return [values[i : i + 4] for i in range(0, 16, 4)]


def percent(matrix: list[list[int]], classes: list[int]) -> str:
    """Return the accuracy on these classes as the page shows it."""
    right = sum(matrix[c][c] for c in classes)
    return f"{100 * right / sum(sum(matrix[c]) for c in classes):.2f} %"


def test_the_page_opens_on_the_mean_over_the_adapters(opened, explored):
    """It shows the mean matrix and the mean accuracy ± sd, all layers active with λ = 1."""
    one, two = (np.array(explored["adapters"][name]["3"][2]) for name in ("one", "two"))
    shown_mean = opened.locator("#cells button").evaluate_all(
        "cells => cells.map(cell => Number(cell.ariaLabel.split(': ')[1]))"
    )
    assert shown_mean == ((one + two) / 2).flatten().tolist()
    assert opened.locator("#shown-strength").text_content() == "1"
    for number, classes in enumerate(([0, 1, 2, 3], [1, 2], [0, 3])):
        both = Sample(tuple(100 * accuracy(each, classes) for each in (one.tolist(), two.tolist())))
        total = opened.locator("#totals b").nth(number).text_content()
        assert total == f"{both.mean_sd(2)} %"
        text = opened.locator("#totals small").nth(number).text_content()
        assert "n = 2" in text
    opened.locator("#strength").fill("0")  # the base, where nothing spreads
    assert "±" not in opened.locator("#totals b").first.text_content()
    assert "n = 2" in opened.locator("#totals small").first.text_content()
    opened.locator("#strength").fill("2")
    opened.locator("#cells button").first.click()
    assert "choose one adapter" in opened.locator("#pictures").text_content()


def test_the_slider_moves_bars_and_matrix(opened, explored):
    """Each strength has its own matrix, bars and tick; at λ = 0 they are the base's."""
    choose(opened, "one")
    for step, strength in enumerate(STRENGTHS):
        opened.locator("#strength").fill(str(step))
        matrix = explored["adapters"]["one"]["3"][step]
        assert shown(opened) == matrix
        assert float(opened.locator("#shown-strength").text_content()) == strength
        said = opened.locator("#strength").get_attribute("aria-valuetext")
        assert said.startswith(f"strength {strength:g}")
        widths = [
            float(opened.evaluate("e => parseFloat(e.style.width)", bar))
            for bar in opened.locator(".fill").element_handles()
        ]
        expected = [100 * matrix[c][c] / sum(matrix[c]) for c in range(4)]
        assert widths == pytest.approx(expected, abs=0.01)
    totals = opened.locator("#totals b").all_text_contents()
    assert totals == [percent(matrix, its) for its in ([0, 1, 2, 3], [1, 2], [0, 3])]
    opened.locator("#strength").fill("0")
    assert shown(opened) == explored["base"]
    ticks = opened.locator("#ticks span").all_text_contents()
    assert [float(tick) for tick in ticks] == list(STRENGTHS)


def test_layers_and_adapters_are_switched(opened, explored):
    """Buttons switch layers off and on and select the adapter; without layers it is the base.

    An adapter without data for the chosen layers says so, and the choice comes back with the next.
    """
    choose(opened, "one")
    first, second = (opened.get_by_role("button", name=name) for name in explored["sites"])
    note = opened.locator("#note")
    first.click()
    assert shown(opened) == explored["adapters"]["one"]["2"][2]
    second.click()
    assert shown(opened) == explored["base"]
    first.click()
    assert shown(opened) == explored["adapters"]["one"]["1"][2]
    assert note.text_content() == ""
    choose(opened, "two")
    assert shown(opened) == explored["adapters"]["two"]["3"][2]
    assert opened.get_by_role("radio", name="two").is_checked()
    assert first.is_disabled()
    assert "two was evaluated with all layers only" in note.text_content()
    assert "(0.weight) comes back" in note.text_content()
    choose(opened, "mean of 2")
    assert note.text_content() == "Only these were evaluated with this set of layers: one."
    assert shown(opened) == explored["adapters"]["one"]["1"][2]


def test_a_cell_shows_its_images(opened, explored):
    """A click on a cell shows its kept images and the number of all its images."""
    choose(opened, "one")
    matrix, pictures = explored["adapters"]["one"]["3"][2], explored["images"]
    predicted = pictures["answers"]["one"]["3"][2]
    for label, answer in ((0, 0), (1, 3), (2, 0)):
        opened.locator(f'[data-cell="{label}-{answer}"]').click()
        kept = sum(
            (one, other) == (label, answer)
            for one, other in zip(pictures["labels"], predicted, strict=True)
        )
        assert opened.locator("#pictures .grid > div").count() == kept
        title = opened.locator("#pictures p").first.text_content()
        names = f"{CLASSES[label]} predicted as {CLASSES[answer]}"
        assert title == f"{names}: {matrix[label][answer]} images"
    opened.locator("#strength").fill("0")
    assert f"{explored['base'][2][0]} images" in opened.locator("#pictures p").first.text_content()
    choose(opened, "two")
    assert opened.locator("#pictures .grid").count() == 0
    assert "it has those of one only" in opened.locator("#pictures p").last.text_content()


def test_the_keyboard_reaches_everything_in_few_stops(opened):
    """The tab key stops once at the adapters, the matrix and each other control; arrows move on."""
    stops = []
    for _ in range(21):
        opened.keyboard.press("Tab")
        stop = opened.evaluate(
            "(e => e.id || e.name || e.dataset.cell || e.className || e.tagName)"
            "(document.activeElement)"
        )
        stops += [stop]
        if stop == "0-0":
            opened.keyboard.press("ArrowDown")
            opened.keyboard.press("ArrowRight")
            opened.keyboard.press("Enter")
            assert opened.locator(".chosen").get_attribute("data-cell") == "1-1"
        if stop == "SUMMARY":
            opened.keyboard.press("Enter")
            assert opened.locator("details").evaluate("e => e.open")
            break
    assert len(stops) <= 20
    layers = ["BUTTON", "BUTTON"]
    assert stops == ["adapter", *layers, "strength", "0-0", "wide", "wide", "SUMMARY"]


def test_axe_finds_nothing(opened):
    """The page has no wrong role or name, and no contrast below 4.5:1, light or dark."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
    opened.evaluate(axe.AXE_SCRIPT)
    opened.locator("summary").click()
    opened.locator("#cells button").nth(1).click()
    choose(opened, "two")
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        opened.emulate_media(color_scheme=scheme)
        back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        found = opened.evaluate("rules => axe.run(document, rules)", rules)["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def test_the_page_fits_a_phone(opened):
    """At 390 pixels the page does not scroll sideways; a wide table scrolls on its own."""
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.evaluate("document.querySelector('.wide').scrollWidth") > 390
