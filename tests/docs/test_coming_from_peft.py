"""docs/coming-from-peft.md: its tables of names, beside PEFT itself."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from paramlora import Delta, LoRA

peft = pytest.importorskip("peft")

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from-peft.md").read_text(encoding="utf-8")


def names(head: str) -> dict[str, str]:
    """Return the second cells of a table of the document, by the names in the first cells."""
    table = TEXT.split(f"| {head} | paramlora |\n")[1].split("\n\n")[0]
    rows = [row.strip("|").split(" | ") for row in table.splitlines()[1:]]
    found: dict[str, str] = {}
    for theirs, ours in rows:
        for name in re.findall(r"`(\w+)[`=]", theirs):
            found[name] = found.get(name, "") + ours
    return found


ARGUMENTS, METHODS = names("`LoraConfig`"), names("method of `PeftModel`")


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments(argument: str) -> None:
    """PEFT has each argument; given to paramlora, it raises with what to write instead."""
    assert argument in peft.LoraConfig.__dataclass_fields__
    model: Any = nn.Sequential(nn.Linear(2, 2))
    arguments: Any = {argument: 1}
    with pytest.raises(TypeError, match=rf"^attach\(\) has no argument '{argument}': \w") as error:
        pl.attach(model, LoRA(1), **arguments)
    hint = str(error.value).split(": ")[1]
    named = re.search(r"write (?:LoRA\()?(\w+)=", hint)
    if named:
        assert named[1] in ARGUMENTS[argument]
    with pytest.raises(TypeError, match=rf"^LoRA\(\) has no argument '{argument}': \w"):
        LoRA(**arguments)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    """PEFT's model has each method, and paramlora the functions beside it.

    Asked for PEFT's name, paramlora names one of them.
    """
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"])
    )
    assert callable(getattr(model, method))
    ours = re.findall(
        r"\b[a-z_]{3,}\b", METHODS[method].replace("print(pl.summary(model))", "summary")
    )
    assert all(hasattr(pl, name) for name in ours)
    with pytest.raises(AttributeError, match=rf"'{method}'; its name here is ({'|'.join(ours)})$"):
        getattr(pl, method)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class Model(nn.Module):
    """Three layers under `model.layers`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"attention": Attention()}) for _ in range(3)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.head = nn.Linear(4, 2)


def trained_by_peft(**settings: Any) -> set[str]:
    """Return the tensors that PEFT trains, by their paths in the plain model."""
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(r=2, **settings))
    found = set()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            path = path.replace(".modules_to_save.default", "")
            found.add(re.sub(r"\.lora_[AB]\.default\.weight", ".weight", path))
    return found


BOTH = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"target_modules": BOTH}, {"targets": BOTH}),
        ({"target_modules": r".*\.[qv]_proj"}, {"targets": "*.[qv]_proj"}),
        (
            {"target_modules": BOTH, "exclude_modules": ["v_proj"]},
            {"targets": BOTH, "exclude": "v_proj"},
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
            {"targets": "*.layers.[01].*.q_proj"},
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
            {"spec": {"q_proj": LoRA(2), "head": Delta()}},
        ),
        (
            {"target_modules": ["q_proj"], "bias": "all"},
            {"spec": {"q_proj": LoRA(2), "*.bias": Delta()}},
        ),
    ],
    ids=["list", "regular expression", "exclude", "layers", "modules to save", "bias"],
)
def test_same_tensors(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    """The targets that the table pairs select the same tensors in both libraries."""
    summary = pl.attach(Model(), **{"spec": LoRA(2), **arguments})
    assert {site.site for site in summary.sites} == trained_by_peft(**settings)


def test_gaussian_init() -> None:
    """PEFT's "gaussian" is N(0, 1/r²); the `init` of the table draws that."""
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(2000, 2)),
        peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian"),
    ).base_model.model[0]
    spec = LoRA(8, init=lambda A: A.normal_(std=1 / len(A)))
    for A in (layer.lora_A["default"].weight, spec.create(torch.zeros(2, 2000))["A"]):
        assert A.std().item() == pytest.approx(1 / 8, rel=0.03)  # of 16,000 numbers
    A = LoRA(8, init="gaussian").create(torch.zeros(2, 2000))["A"]
    assert A.std().item() == pytest.approx(1, rel=0.03)


def test_defaults() -> None:
    """PEFT's r and alpha are 8, ours 8 and the rank; its `set_adapter` trains, `activate` not."""
    config = peft.LoraConfig(target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, LoRA().rank, LoRA().scaling) == (8, 8, 8, 1.0)
    wrapped = peft.get_peft_model(Model(), config)
    wrapped.add_adapter("other", config)
    ours = Model()
    for name in ("default", "other"):
        pl.attach(ours, LoRA(), "q_proj", name=name)
    wrapped.set_adapter("default")
    pl.activate(ours, "default")
    assert all("other" not in n for n, p in wrapped.named_parameters() if p.requires_grad)
    assert all(".default." not in n for n, p in ours.named_parameters() if p.requires_grad)
