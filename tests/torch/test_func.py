"""torch.func on an adapted model: functional_call, grad, vmap, jvp, and derivatives."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import EXACT, MLP, case_of, host_name
from tests.support.reference import Case, Host, floats, shake

# torch warns of its own slow operations.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::torch\..*"),
    pytest.mark.filterwarnings(r"ignore:The tensor attributes self\..*_flat_weights:UserWarning"),
]


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors by the names that `functional_call` takes, in the order of the verbs."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p.detach() for p in pl.parameters(model)}


def with_factors(case: Case) -> Callable[..., Tensor]:
    """Return the model's output as a function of its factors and inputs."""
    keys = list(factors_of(case.model))

    def call(*tensors: Tensor) -> Tensor:
        factors, inputs = tensors[: len(keys)], tensors[len(keys) :]
        weights = dict(zip(keys, factors, strict=True))
        return floats(functional_call(case.model, weights, inputs or case.inputs))[0]

    return call


SMOOTH = [
    (MLP, "lora"),
    ("embedding", "lora"),  # without padding_idx: torch leaves its gradient out on purpose
    ("conv1d_groups", "lora"),
    ("bare_3d", "lora"),
    ("attention", "lora"),
    ("layer_norm", "delta"),
]


def test_functional_call() -> None:
    """`functional_call` with other factors equals the dense model with those factors."""
    case = case_of("encoder_layer")
    other = case_of("encoder_layer")
    with torch.no_grad():
        for parameter in pl.parameters(other.model):
            parameter.mul_(-2)
    found = functional_call(case.model, factors_of(other.model), case.inputs)
    assert_close(floats(found), other.expected("one").outputs, **EXACT)
    assert_close(floats(case.model(*case.inputs)), case.expected("one").outputs, **EXACT)


@pytest.mark.parametrize("host", [MLP, "encoder_layer"], ids=host_name)
def test_grad(host: str | Host) -> None:
    """`grad` gives the gradients of the dense reference, and does not set `.grad`."""
    case = case_of(host)
    factors = factors_of(case.model)

    def loss(factors: dict[str, Tensor]) -> Tensor:
        (out,) = floats(functional_call(case.model, factors, case.inputs))
        # Weights as in reference.loss.
        weights = (torch.arange(out.numel()) % 7 - 2.5) / 2
        return (out * weights.view(out.shape)).sum()

    found = grad(loss)(factors)
    expected = case.expected("one").gradients
    names = [f"one {key}" for key in pl.state_dict(case.model, "one")]
    assert_close(list(found.values()), [expected[name] for name in names], **EXACT)
    assert all(parameter.grad is None for parameter in case.model.parameters())


@pytest.mark.parametrize(
    "host",
    ["linear", "embedding_padding", "bag_sum", "conv2d_groups", "bare_3d", "encoder_layer"],
)
def test_vmap_over_stacked_factors(host: str) -> None:
    """`vmap` over stacked factors gives each adapter the outputs that it has alone."""
    case = case_of(host)
    stacked = {key: torch.stack([v, -2 * v, v / 3]) for key, v in factors_of(case.model).items()}
    run = vmap(
        lambda factors: floats(functional_call(case.model, factors, case.inputs))[0],
        randomness="error",
    )
    found = run(stacked)
    for i, out in enumerate(found):
        with torch.no_grad():
            for parameter, values in zip(pl.parameters(case.model), stacked.values(), strict=True):
                parameter.copy_(values[i])
        assert_close([out], case.expected("one").outputs[:1], **EXACT)


def test_training_several_adapters_at_once() -> None:
    """Three adapters trained at once by `vmap` equal those trained one by one."""
    torch.manual_seed(0)
    base, x = MLP.make().double(), torch.randn(4, 7, dtype=torch.float64)
    target, rate, steps = torch.randn(4, 3, dtype=torch.float64), 0.1, 5
    models = [copy.deepcopy(base) for _ in range(3)]
    for model in models:
        pl.attach(model, pl.LoRA(rank=2))
    stacked = {
        key: torch.stack([factors_of(model)[key] for model in models])
        for key in factors_of(models[0])
    }

    def loss(factors: dict[str, Tensor]) -> Tensor:
        return (functional_call(models[0], factors, (x,)) - target).square().mean()

    for _ in range(steps):
        slopes = vmap(grad(loss))(stacked)
        stacked = {key: value - rate * slopes[key] for key, value in stacked.items()}

    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(pl.parameters(model), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        alone = factors_of(model)
        assert not torch.equal(alone["0.parametrizations.weight.0.factors.default.B"][0], x[0])
        assert_close({key: value[i] for key, value in stacked.items()}, alone, **EXACT)


def test_ensemble() -> None:
    """`stack_module_state` stacks adapted models, and a copy on meta runs them all."""
    torch.manual_seed(0)
    models = [MLP.make().double() for _ in range(3)]
    for model in models:
        pl.attach(model, pl.LoRA(rank=2))
        shake(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    parameters, buffers = stack_module_state(models)
    blank = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda p, b: functional_call(blank, (p, b), (x,)))(parameters, buffers)
    for out, model in zip(found, models, strict=True):
        weights = {
            key: pl.base_state_dict(model)[key]
            + pl.state_dict(model)[f"{key}.B"] @ pl.state_dict(model)[f"{key}.A"]
            for key in ("0.weight", "2.weight", "4.weight")
        }
        assert_close(
            out,
            functional_call(MLP.make().double(), pl.base_state_dict(model) | weights, (x,)),
            **EXACT,
        )


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_gradients_per_sample(large: bool, request: pytest.FixtureRequest) -> None:
    """`vmap(grad)` over the rows of a batch gives the gradients of each row."""
    if large:
        request.getfixturevalue("as_large")
    case = case_of(MLP)
    factors, (x,) = factors_of(case.model), case.inputs

    def loss(factors: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(case.model, factors, (row,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(factors, x)
    for i, row in enumerate(x):
        alone = torch.autograd.grad(case.model(row).square().sum(), pl.parameters(case.model))
        assert_close([value[i] for value in found.values()], list(alone), **EXACT)


def test_jvp() -> None:
    """A tangent of the factors moves the output as ΔW's tangent, s·(dB A + B dA), does."""
    case = case_of(MLP)
    factors = factors_of(case.model)
    tangents = {key: torch.randn_like(value) for key, value in factors.items()}
    found = jvp(lambda f: functional_call(case.model, f, case.inputs), (factors,), (tangents,))
    values, moves = list(factors.values()), list(tangents.values())
    weights, slopes = {}, {}
    for i, key in enumerate(("0.weight", "2.weight", "4.weight")):
        A, B, dA, dB = values[2 * i], values[2 * i + 1], moves[2 * i], moves[2 * i + 1]
        scale = 0.7 * 3 / 2
        weights[key] = case.plain.get_parameter(key).detach() + scale * B @ A
        slopes[key] = scale * (dB @ A + B @ dA)
    expected = jvp(lambda w: functional_call(case.plain, w, case.inputs), (weights,), (slopes,))
    assert_close(found, expected, **EXACT)


def test_jacobian() -> None:
    """`jacrev` equals the backward of each output alone."""
    case = case_of("linear")
    factors = factors_of(case.model)
    found = jacrev(lambda f: functional_call(case.model, f, case.inputs).sum(0))(factors)
    for i, out in enumerate(case.model(*case.inputs).sum(0)):
        alone = torch.autograd.grad(out, pl.parameters(case.model), retain_graph=True)
        assert_close([value[i] for value in found.values()], list(alone), **EXACT)


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize(("host", "kind"), SMOOTH, ids=host_name)
def test_derivatives(host: str | Host, kind: str) -> None:
    """First derivatives (backward, forward, batched) and second ones equal finite differences."""
    case = case_of(host, kind)
    inputs = [x.clone() for x in case.inputs if x.is_floating_point()]
    leaves = [*factors_of(case.model).values(), *inputs]
    for leaf in leaves:
        leaf.requires_grad_()
    call = with_factors(case)
    assert torch.autograd.gradcheck(
        call, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
