"""Assertions and small functions that several test files share."""

import copy
import gc
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.stack.stack import Stack
from tests.support.models import attached, plain
from tests.support.reference import HOSTS, KINDS, Case, Host, Result, floats

# The relative error, ‖found − reference‖ / ‖reference‖, that rounding in a dtype explains.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def error(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖, with the reference in float64."""
    found, reference = found.detach().double(), reference.detach()
    return float((found - reference).norm() / reference.norm())


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """Yield a list to which autograd's saved tensors are appended inside the block."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@contextmanager
def new_garbage_only() -> Iterator[None]:
    """Let gc.collect visit only objects created in the block: visiting all takes a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bits(tensor: Tensor) -> object:
    """Return the bits of a tensor, its dtype, layout, shape and flag, to compare with `==`."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return type(tensor), tensor.dtype, tensor.requires_grad
    properties = (tensor.dtype, tensor.layout, tuple(tensor.shape), tensor.requires_grad)
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return properties, tensor.to_dense().contiguous().flatten().view(torch.uint8).tolist()


def _settings(module: nn.Module) -> dict[str, object]:
    """Return a module's attributes that are numbers or strings, `training` among them."""
    return {key: v for key, v in vars(module).items() if isinstance(v, int | float | str)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the state of a model and its adapters; equal snapshots mean bit-identical models."""
    tensors = [*model.parameters(), *model.buffers()]
    no_values = any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in tensors)
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    return {
        "fingerprint": None if no_values else pl.fingerprint(model),
        "modules": [
            (path, id(module), type(module), list(vars(module)), _settings(module))
            for path, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [
            (path, id(parameter), id(parameter.grad), bits(parameter))
            for path, parameter in model.named_parameters(remove_duplicate=False)
        ],
        "tensors' hooks": [list(tensor._backward_hooks or ()) for tensor in tensors],
        "buffers": [(path, id(b), bits(b)) for path, b in model.named_buffers()],
        "hooks": [
            {key: list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")}
            for module in model.modules()
        ],
        "state": [
            (key, bits(value) if isinstance(value, Tensor) else repr(value))
            for key, value in model.state_dict().items()
        ],
        "adapters": [
            (
                stack.active,
                stack.merged,
                stack.tied,
                [bits(tensor) for tensor in stack.stored],
                stack.written,
                (stack.own, stack.numbers.copy(), stack.paused, stack.open, stack.key),
                copy.copy(stack.before_merge),
                [
                    (name, part.block, part.spec, part.strength)
                    for name in stack.factors
                    for part in stack.parts(name)
                ],
            )
            for stack in stacks
        ],
        "frozen": [copy.deepcopy(vars(m).get("_paramlora_before")) for m in model.modules()],
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model is bit-identical after the block."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    for part, found in before.items():
        assert after[part] == found, f"changed: the {part} of the model"


@contextmanager
def nothing_drawn(*generators: torch.Generator) -> Iterator[None]:
    """Assert that the block draws no random number from a global generator or one of these."""
    generators = (torch.default_generator, *generators)
    before = [generator.get_state() for generator in generators], random.getstate()
    yield
    for generator, state in zip(generators, before[0], strict=True):
        assert torch.equal(generator.get_state(), state), "changed: torch's random state"
    assert random.getstate() == before[1], "changed: Python's random state"


def pattern(message: str) -> str:
    """Return the regular expression of a whole message in which `[...]` matches any text."""
    return r"(?s)\A" + ".*".join(map(re.escape, message.split("[...]"))) + r"\Z"


def refuses(
    model: nn.Module, call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    """Assert that a call raises exactly this error with this message, and changes nothing."""
    with unchanged(model):
        with pytest.raises(error, match=pattern(message)) as caught:
            call(model)
        assert caught.type is error


LEAVE_OUT = "(leave it out with narrower targets or with exclude=)"

A_NAME = (
    "cannot be an adapter's name: it must be a string, not empty, without a dot, and not an "
    "attribute of nn.ModuleDict"
)

# At most half a million times the rounding of one operation: sums of about ten terms in float64.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}

MLP = Host(
    lambda: nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
    lambda: (torch.randn(4, 7),),
)


def case_of(host: str | Host, kind: str = "lora", dtype: torch.dtype = torch.float64) -> Case:
    """Return a host with adapter "one" on all its tensors, at strength 0.7, its factors random."""
    case = Case.of(HOSTS[host] if isinstance(host, str) else host, dtype)
    case.attach(KINDS[kind], strength=0.7)
    return case


def host_name(value: object) -> object:
    """Return the test id of a host."""
    return "mlp" if value is MLP else value


def assert_agrees(actual: Result, expected: Result, **tolerance: Any) -> None:
    """Assert that outputs, and the gradients that `actual` has, equal those of the reference."""
    gradients = {key: expected.gradients[key] for key in actual.gradients}
    tolerance = tolerance or EXACT
    assert_close(actual.outputs, expected.outputs, check_dtype=False, **tolerance)
    assert_close(actual.gradients, gradients, check_dtype=False, **tolerance)


def outputs(case: Case, model: nn.Module | None = None) -> list[Tensor]:
    """Return the outputs of a model, by default the adapted one, for the inputs of the case."""
    with torch.no_grad():
        return floats((case.model if model is None else model)(*case.inputs))


def factors(model: nn.Module) -> list[Tensor]:
    """Return copies of all factors of a model."""
    return [parameter.detach().clone() for parameter in pl.parameters(model)]


def dense_copy(case: Case) -> nn.Module:
    """Return a plain copy of the host that stores W', computed by the formula of the kind."""
    plain = copy.deepcopy(case.plain)
    state = pl.state_dict(case.model, "one")
    with torch.no_grad():
        for path, tensor in plain.named_parameters():
            site_factors = {
                key.rpartition(".")[2]: v for key, v in state.items() if key.startswith(path + ".")
            }
            if site_factors:
                tensor.copy_(case.kinds["one"].formula(tensor, site_factors, case.strengths["one"]))
    return plain


# A row of a table of errors: a function that makes a model, a call, its error and message.
Row = tuple[Callable[[], nn.Module], Callable[[Any], Any], type[Exception], str]


def enter(context: Any) -> None:
    """Enter a context manager, which must raise."""
    with context:
        raise AssertionError("the context was entered")


def leaves(n: int, k: int, m: int, dtype: torch.dtype, rank: int = 3) -> list[Tensor]:
    """Return x (n, k), W (m, k), b (m,), A (rank, k) and B (m, rank), all requiring gradients."""
    torch.manual_seed(0)
    half = dtype in (torch.bfloat16, torch.float16)
    factor = torch.float32 if half else dtype
    shapes = [(n, k), (m, k), (m,)]
    plain = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    factors = [torch.randn(s, dtype=torch.float64).to(factor) for s in ((rank, k), (m, rank))]
    return [tensor.requires_grad_() for tensor in (*plain, *factors)]


def refuses_file(path: Path, message: str, error: type[Exception] = pl.CheckpointError) -> None:
    """Assert that loading a file is refused, as a new adapter and into an attached one."""
    for make in (attached, plain):
        refuses(make(), lambda m: pl.load(m, path, name="digits"), error, message.format(path=path))
