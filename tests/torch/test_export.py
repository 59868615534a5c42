"""torch.export of an adapted model."""

import copy
import inspect
import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import EXACT, MLP, case_of, host_name
from tests.support.reference import Host, floats
from tests.support.versions import torch_before

# torch warns of its own slow operations, and of attributes it sets while it traces an LSTM.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::torch\..*"),
    pytest.mark.filterwarnings(r"ignore:The tensor attributes self\..*_flat_weights:UserWarning"),
]


# Inside a module: torch 2.6 cannot export an LSTM by itself.
LSTM = Host(lambda: nn.Sequential(nn.LSTM(5, 4)), lambda: (torch.randn(3, 2, 5),))
# Nor can versions before 2.11 strictly export a module by itself that is adapted and not a Linear:
# they raise an error.
INSIDE = torch_before("2.11")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(
    "host",
    [MLP, "conv2d_groups", pytest.param(LSTM, id="lstm"), "encoder_layer"],
    ids=host_name,
)
def test_export(host: str | Host, on: bool, strict: bool) -> None:
    """An exported program has the outputs of the dense reference, adapters on or off."""
    case = case_of(host)
    case.model.eval()
    (pl.enable if on else pl.disable)(case.model)
    expected = case.expected("one") if on else case.expected()
    with torch.no_grad():
        model = nn.Sequential(case.model) if strict and INSIDE else case.model
        program = torch.export.export(model, case.inputs, strict=strict)
        # The program keeps the state in which it was exported.
        (pl.disable if on else pl.enable)(case.model)
        found = program.module()(*case.inputs)
    assert_close(floats(found), expected.outputs, **EXACT)


def test_graph_with_adapters_off() -> None:
    """With adapters off, the exported operations are exactly those of the base."""
    case = case_of(MLP)
    pl.disable(case.model)
    graphs = [
        [
            node.target
            for node in torch.export.export(model, case.inputs).graph.nodes
            if node.op == "call_function"
        ]
        for model in (case.model, case.plain)
    ]
    assert graphs[0] == graphs[1]


def test_saved_program() -> None:
    """A program with a dynamic batch can be saved and loaded, and does not need paramlora."""
    case = case_of(MLP)
    (x,) = case.inputs
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(case.model, (x,), dynamic_shapes=({0: rows},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    case.inputs = (torch.randn(9, 7, dtype=torch.float64),)
    assert_close([loaded(*case.inputs)], case.expected("one").outputs, **EXACT)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_verbs_after_an_export(strict: bool) -> None:
    """After an export a model can be copied, merged, unmerged and detached, as before it.

    torch.export rebuilds the tuples and dictionaries in the attributes of modules, with fake
    tensors where those had parameters.
    """
    case = case_of(MLP)
    model, expected = case.model, case.expected("one").outputs
    before = copy.deepcopy(model.state_dict())

    def export() -> None:
        with torch.no_grad():
            torch.export.export(nn.Sequential(model), case.inputs, strict=strict)

    export()
    copied = copy.deepcopy(model)
    for one in (model, copied):
        pl.merge(one)
        assert_close([one(*case.inputs)], expected, **EXACT)
    export()
    pl.unmerge(model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close([model(*case.inputs)], expected, **EXACT)
    pl.detach(model)
    assert_close(model(*case.inputs), case.plain(*case.inputs), **EXACT)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 3),
        nn.Embedding(5, 4),
        nn.EmbeddingBag(5, 4),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(4, 3),
        nn.GRU(4, 3),
        nn.Conv1d(4, 3, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_signatures(module: nn.Module) -> None:
    """A layer keeps the signature of its forward, from which export and fx name its inputs."""
    expected = inspect.signature(module.forward)
    pl.attach(module, pl.LoRA(rank=1), "*weight*")
    assert inspect.signature(module.forward) == expected
