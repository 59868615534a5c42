"""What a user sees: a printed model, and the summary of a large one, as text and as HTML."""

from html.parser import HTMLParser
from typing import Any

import torch
from torch import nn

import paramlora as pl
from paramlora import Delta, LoRA


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(4, 4, bias=False) for _ in range(3))


def tall(layers: int = 32) -> Any:
    return nn.ModuleDict({"layers": nn.ModuleList(Attention() for _ in range(layers))})


def test_print_of_a_layer() -> None:
    """`print(layer)` has one line, with names, ranks, strengths and states; detach undoes it."""
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    before = repr(model)
    pl.attach(model, LoRA(2, 8), name="digits")
    pl.attach(model, {"weight[:2]": LoRA(1), "bias": Delta()}, name="letters")
    pl.scale(model, 0.5, "digits")
    settings = "in_features=4, out_features=3, bias=True"
    assert repr(model[0]) == (
        f"ParametrizedLinear({settings}, weight: digits (LoRA rank 2, strength 0.5, off), "
        "weight[:2]: letters (LoRA rank 1, strength 1, active), "
        "bias: letters (Delta, strength 1, active))"
    )
    assert repr(model).splitlines()[1] == f"  (0): {model[0]!r}"
    with pl.using(model, digits=0.25):
        assert "digits (LoRA rank 2, strength 0.25, active)" in repr(model[0])
        assert "bias: letters (Delta, strength 1, off)" in repr(model[0])
    pl.merge(model)
    assert "weight[:2]: letters (LoRA rank 1, strength 1, merged)" in repr(model[0])
    pl.unmerge(model)
    pl.detach(model)
    assert repr(model) == before


def test_print_of_a_layer_with_children() -> None:
    """The children of an adapted module are printed below its adapters."""
    model = nn.MultiheadAttention(4, 2)
    pl.attach(model, LoRA(1), ["in_proj_weight", "out_proj"])
    lines = repr(model).splitlines()
    assert lines[1] == "  in_proj_weight: default (LoRA rank 1, strength 1, active)"
    assert lines[2].startswith("  (out_proj): ParametrizedNonDynamicallyQuantizableLinear(in_")
    assert len(lines) == 4


def test_print_beside_another_parametrization() -> None:
    """Another parametrization of the tensor is named, and a module's own repr is kept."""

    class Named(nn.Linear):
        def __repr__(self) -> str:
            return "mine"

    model: Any = nn.Sequential(nn.Linear(4, 3), Named(3, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    pl.attach(model, LoRA(1))
    assert "weight: _WeightNorm, weight: default (LoRA rank 1, " in repr(model[0])
    assert repr(model[1]) == "mine"


def test_alike_sites_are_grouped() -> None:
    """224 layers are a dozen lines; the data have a row for each."""
    model = tall()
    summary = pl.attach(model, LoRA(2), name="chat")
    lines = str(summary).splitlines()
    assert len(summary.sites) == 224
    assert len(lines) == 1 + 7 + 1
    assert lines[1].split() == [
        *("layers.*.q.weight", "(32)", "chat", "4×4", "LoRA", "2", "1"),
        *("yes", "yes", "no", "512", "100.00%"),
    ]
    assert summary.trainable == 7 * 512


def test_sites_that_differ_are_not_grouped() -> None:
    """A site with another rank, strength or state has a row of its own, in model order."""
    model = tall(5)
    pl.attach(model, {"layers.1.q": LoRA(1), "q": LoRA(2), "down": LoRA(2)})
    pl.scale(model["layers"][3].q, 0.5)
    pl.disable(model["layers"][4].down)
    sites = [line.split()[0] for line in str(pl.summary(model)).splitlines()[1:-2]]
    assert sites == [
        "layers.*.q.weight",
        "layers.*.down.weight",
        "layers.1.q.weight",
        "layers.3.q.weight",
        "layers.4.down.weight",
    ]
    pl.detach(model)
    pl.attach(tall(2), LoRA(2), ["q", "down"])
    few = str(pl.attach(model, LoRA(2), "layers.[01].q")).splitlines()[1:3]
    assert [line.split()[0] for line in few] == ["layers.0.q.weight", "layers.1.q.weight"]


class Cells(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_summary_in_a_notebook() -> None:
    """`_repr_html_` has the cells and notes of the text, and escapes the names in the model."""
    model: Any = nn.ModuleDict({"<b>&": nn.Linear(4, 3), "z": nn.Linear(3, 2)})
    summary: Any = pl.attach(model, LoRA(2), name="<script>")
    pl.attach(model, Delta(), "z.bias", name="other", activate="also")
    found = Cells(summary._repr_html_())
    assert found.tags.count("tr") == 3
    assert set(found.tags) <= {"div", "table", "tr", "th", "td", "br"}
    assert {"<b>&.weight", "<script>", "3×4", "116.67%"} <= set(found.texts)
    assert found.texts[-1] == str(summary).splitlines()[-1]
    plain: Any = pl.summary(nn.Linear(2, 2))
    assert plain._repr_html_() == f"<div>{plain}</div>".replace("'", "&#x27;")


def test_a_tied_layer_is_printed_once_at_each_path() -> None:
    """Both layers of a tie show the adapter that they share."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    pl.attach(model, LoRA(1), "head")
    for layer in model.values():
        assert "weight: default (LoRA rank 1, strength 1, active)" in repr(layer)
    assert torch.equal(model["head"].weight, model["embed"].weight)
