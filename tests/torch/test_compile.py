"""torch.compile on an adapted model: the number of graphs, values and gradients."""

import copy
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import EXACT, MLP, assert_agrees, case_of, host_name
from tests.support.mixed import small
from tests.support.reference import HOSTS, KINDS, Case, Host, floats, loss, shake

# torch warns of its own slow operations, and of attributes it sets while it traces an LSTM.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::torch\..*"),
    pytest.mark.filterwarnings(r"ignore:The tensor attributes self\..*_flat_weights:UserWarning"),
]


SMALL = Host(
    lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)),
    lambda: (torch.randn(4, 7),),
)


CAN_BUILD = (
    any(map(shutil.which, ("c++", "g++", "clang++")))
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    """Return the model compiled as one graph, and a counter of the compiled graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        (MLP, "lora"),
        (MLP, "delta"),
        ("embedding_padding", "lora"),
        ("bag_sum", "lora"),
        ("conv2d_groups", "lora"),
        ("bare_4d", "lora"),
        ("attention", "lora"),
        ("encoder_layer", "lora"),
    ],
    ids=host_name,
)
def test_one_graph_for_on_and_one_for_off(host: str | Host, kind: str) -> None:
    """Toggling uses one graph for on and one for off, with the right values and gradients.

    Gradients are compared too: a graph can have right outputs and miss a part of them.
    """
    case = case_of(host, kind)
    call, counter = compiled(case.model)
    for on in (True, False, True, False):
        (pl.enable if on else pl.disable)(case.model)
        actual = case.actual(call)
        assert_agrees(actual, case.expected("one") if on else case.expected())
        assert_agrees(actual, case.actual())
    assert counter.frame_count == 2


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize("needs_dx", [True, False])
def test_gradients_of_a_large_layer(needs_dx: bool) -> None:
    """A compiled large layer has the gradients of the dense reference, with and without dx."""
    model, x = small(), torch.randn(4, 6)
    state, factors = pl.base_state_dict(model), pl.state_dict(model)
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    ours, theirs = (x.clone().requires_grad_(needs_dx) for _ in range(2))
    hidden = theirs
    for i in (0, 2):
        weight = state[f"{i}.weight"]
        weight = weight + 1.5 * leaves[f"{i}.weight.B"] @ leaves[f"{i}.weight.A"]
        hidden = F.linear(torch.tanh(hidden) if i else hidden, weight, state[f"{i}.bias"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = [ours] if needs_dx else []
    actual = torch.autograd.grad(loss([compiled(ours)]), [*pl.parameters(model), *inputs])
    inputs = [theirs] if needs_dx else []
    assert_close(actual, torch.autograd.grad(loss([hidden]), [*leaves.values(), *inputs]))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BUILD, reason="needs a C++ compiler and Python's headers")
def test_inductor() -> None:
    """The default backend, in float32, gives the values and gradients of the float64 model."""
    case = case_of(SMALL, dtype=torch.float32)
    call, counter = compiled(case.model, "inductor")
    for on in (True, False, True):
        (pl.enable if on else pl.disable)(case.model)
        expected = case.expected("one") if on else case.expected()
        # Sums of about ten terms of size 1 to 10 in float32, through three layers.
        assert_agrees(case.actual(call), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_inference() -> None:
    """In eval mode under no_grad, on attention's fast path, on and off take one graph each."""
    case = case_of("encoder_layer")
    case.model.eval()
    call, counter = compiled(case.model)
    with torch.no_grad():
        for on in (True, False, True, False):
            (pl.enable if on else pl.disable)(case.model)
            expected = case.expected("one") if on else case.expected()
            assert_close(floats(call(*case.inputs)), expected.outputs, **EXACT)
    assert counter.frame_count == 2


def test_recurrent() -> None:
    """torch breaks the graph at an LSTM, but the values and gradients are right.

    After on and off have run twice, nothing more is compiled.
    """
    case = case_of("lstm")
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(case.model, backend=counter)
    pieces = []
    for on in (True, False) * 4:
        (pl.enable if on else pl.disable)(case.model)
        expected = case.expected("one") if on else case.expected()
        assert_agrees(case.actual(call), expected)
        pieces.append(counter.frame_count)
    assert 0 < pieces[3] == pieces[-1]


def test_one_graph_for_each_set_of_adapters() -> None:
    """With several adapters, each set that is used is compiled once."""
    case = case_of(MLP)
    case.attach(KINDS["delta"], "two")
    call, counter = compiled(case.model)
    for _ in range(3):
        for names in ((), ("one",), ("two",), ("one", "two")):
            with pl.using(case.model, *names):
                assert_agrees(case.actual(call), case.expected(*names))
    assert counter.frame_count == 4


def test_tensor_strength() -> None:
    """A strength that is a tensor changes without a new graph, and gets its gradient."""
    case = case_of(MLP)
    call, counter = compiled(case.model)
    for value in (0.75, -1.5, 0.0, 3.0):
        pl.scale(case.model, torch.tensor(value))
        case.strengths["one"] = value
        assert_agrees(case.actual(call), case.expected("one"))
    assert counter.frame_count == 1

    strength = torch.zeros((), requires_grad=True)
    pl.scale(case.model, strength)
    (x,) = case.inputs
    for value in (0.75, -1.5):
        with torch.no_grad():
            strength.fill_(value)
        (found,) = torch.autograd.grad(call(x).square().sum(), strength)
        # The derivative of the dense model by λ, as a difference quotient.
        step, ends = 1e-6, []
        for end in (value + step, value - step):
            case.strengths["one"] = end
            (out,) = case.expected("one").outputs
            ends.append(out.square().sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert_close(found, slope, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert counter.frame_count == 2  # one more for a strength that requires a gradient


@pytest.mark.parametrize("save", ["save", "save_peft"])
def test_loading_into_a_slot(tmp_path: Path, save: str) -> None:
    """Files of several ranks and scales load into a compiled slot without a new graph."""
    model = SMALL.make().double().eval()
    x = torch.randn(4, 7, dtype=torch.float64)
    pl.attach(model, pl.LoRA(rank=16), name="slot")
    call, counter = compiled(model)
    call(x)
    for rank in (2, 8, 16, 4):
        alone = SMALL.make().double().eval()
        alone.load_state_dict(pl.base_state_dict(model))
        pl.attach(alone, pl.LoRA(rank, alpha=3), name="file")
        shake(alone)
        pl.scale(alone, rank / 10)
        getattr(pl, save)(alone, tmp_path / str(rank))
        getattr(pl, save.replace("save", "load"))(model, tmp_path / str(rank), into="slot")
        assert_close(call(x), alone(x), **EXACT)
    assert counter.frame_count == 1


def test_merging() -> None:
    """A merged model uses the graph of the base, on the merged weights."""
    case = case_of(MLP)
    expected = case.expected("one").outputs
    call, counter = compiled(case.model)
    for _ in range(3):
        assert_close(floats(call(*case.inputs)), expected, **EXACT)
        with pl.merged(case.model):
            assert_close(floats(call(*case.inputs)), expected, **EXACT)
        with pl.disabled(case.model):
            assert_close(floats(call(*case.inputs)), case.expected().outputs, **EXACT)
    assert counter.frame_count == 2


def test_freezing_factors() -> None:
    """Frozen and trained factors take at most one graph each, and have the right gradients."""
    case = case_of(MLP)
    call, counter = compiled(case.model)
    for _ in range(3):
        assert_agrees(case.actual(call), case.expected("one"))
        pl.freeze(case.model)
        actual = case.actual(call)
        assert actual.gradients.keys() == {"input 0"}
        assert_agrees(actual, case.expected("one"))
        pl.unfreeze(case.model)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("host", [MLP, "linear"], ids=["child", "root"])
def test_attaching_after_compiling(host: str | Host) -> None:
    """A model that was compiled before follows attach and detach."""
    case = Case.of(HOSTS[host] if isinstance(host, str) else host)
    call, counter = compiled(case.model)
    base = case.expected().outputs
    assert_close(floats(call(*case.inputs)), base, **EXACT)
    case.attach(KINDS["lora"])
    assert_agrees(case.actual(call), case.expected("one"))
    pl.detach(case.model)
    case.kinds.clear()
    assert_close(floats(call(*case.inputs)), base, **EXACT)
    assert counter.frame_count == 2


def test_attaching_through_the_compiled_model() -> None:
    """The verbs accept the compiled model, and act on the model inside."""
    model = MLP.make().double()
    call, _ = compiled(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    base = model(x)
    pl.attach(call, pl.LoRA(rank=2))
    shake(call)
    on = model(x)
    assert not torch.allclose(on, base)
    assert_close(call(x), on, **EXACT)
    with pl.disabled(call):
        assert_close(call(x), base, **EXACT)
    pl.detach(call)
    assert_close(call(x), base, **EXACT)
    assert type(model[0]) is nn.Linear


def test_training() -> None:
    """Compiled training steps give the factors that the same steps give a dense model."""
    case = case_of(MLP)
    factors = pl.parameters(case.model)
    (x,) = case.inputs
    target = torch.randn(4, 3, dtype=torch.float64)

    dense = copy.deepcopy(case.plain)
    expected = [p.detach().clone().requires_grad_() for p in factors]
    weights = [key for key in dense.state_dict() if key.endswith("weight")]
    call, counter = compiled(case.model)
    ours = torch.optim.Adam(factors, lr=0.1)
    theirs = torch.optim.Adam(expected, lr=0.1)
    for _ in range(3):
        ours.zero_grad()
        loss = (call(x) - target).square().mean()
        loss.backward()
        ours.step()

        theirs.zero_grad()
        pairs = zip(weights, expected[::2], expected[1::2], strict=True)
        # s = alpha / rank = 3/2 and λ = 0.7, as case_of has it.
        update = {k: dense.get_parameter(k) + 0.7 * 1.5 * B @ A for k, A, B in pairs}
        reference = (functional_call(dense, update, x) - target).square().mean()
        reference.backward()
        theirs.step()
        assert_close(loss, reference, **EXACT)
    assert_close([p.detach() for p in factors], [p.detach() for p in expected], **EXACT)
    assert counter.frame_count == 1
