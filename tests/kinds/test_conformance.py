"""Every kind of adapter on every host layer agrees with a plain dense model.

Values and gradients are tested for every kind on every host. Every other claim is tested for every
kind on one host, and for every host with one kind. The dense reference is in `reference.py`.
"""

import copy
import functools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.reference import (
    BLOCKS,
    HOSTS,
    KINDS,
    TRANSPOSED,
    VARIANTS,
    Case,
    Host,
    Kind,
    Result,
    floats,
    parted,
    shake,
)

ALL_KINDS = KINDS | BLOCKS | VARIANTS | {"lora_transposed": TRANSPOSED}
# A large Linear is computed by a Function of its own. In these hosts small ones are, too.
LARGE = {
    f"{name}_as_large": host
    for name, host in HOSTS.items()
    if name.startswith(("linear", "encoder", "transformers"))
}
ALL_HOSTS = HOSTS | LARGE


def pairs(kinds: Iterable[str], hosts: Iterable[str]) -> list[tuple[str, str]]:
    """Return each kind with each host that has a tensor for it."""
    return [
        (kind, host)
        for host in hosts
        for kind in kinds
        if any(map(ALL_KINDS[kind].takes, ALL_HOSTS[host].make().parameters()))
    ]


# One host or more for each way in which a forward gets W'. Their blocks have more than a few
# elements: the rounding error of a gradient with two elements is chance, in the reference too.
FOR_BLOCKS = (
    *("linear", "linear_wide", "linear_own_forward", "conv2d_groups", "conv_transpose1d"),
    *("embedding_padding", "bag_weighted", "lstm_packed", "attention", "bare_3d"),
)
EVERY_PAIR = [
    *pairs(KINDS, HOSTS),
    *pairs(["lora"], LARGE),
    *pairs(BLOCKS, FOR_BLOCKS),
    *pairs(["lora_blocks"], ["linear_as_large"]),
    *pairs(VARIANTS, [*FOR_BLOCKS, "lstm_deep", "bare_listed"]),
    *pairs(["lora_transposed"], ["linear", "linear_as_large", "linear_wide_as_large"]),
    *pairs(["lora_transposed"], ["embedding_padding", "conv2d_groups", "bare_3d"]),
]

# All kinds run on one host, a Transformer's encoder layer. It has Linears, whose forward depends on
# the kind (factored, rescaled or dense), attention, which reads a dense W', and LayerNorms and
# biases, which are vectors. An Embedding goes with it: its forward depends on the kind as well, and
# shares no code with a Linear's.
# All hosts run with one kind, LoRA. A forward that can use its factors never builds W', and every
# other forward reads a dense W'. Hosts with vectors only run with Delta, for LoRA needs a matrix.
EACH_KIND = pairs(ALL_KINDS, ["encoder_layer", "embedding_padding"])
WITH_LORA = pairs(["lora"], ALL_HOSTS)
VECTORS_ONLY = [host for host in HOSTS if ("lora", host) not in WITH_LORA]
EACH_KIND_AND_HOST = [*dict.fromkeys(EACH_KIND + WITH_LORA + pairs(["delta"], VECTORS_ONLY))]
# For the claim about each tensor alone, all hosts run with Delta too, which takes biases as well.
EACH_TENSOR = [*dict.fromkeys(EACH_KIND_AND_HOST + pairs(["delta"], HOSTS))]
EACH_RANK = [pair for pair in EACH_KIND_AND_HOST if ALL_KINDS[pair[0]].rank]

every_pair = pytest.mark.parametrize(("kind", "host"), EVERY_PAIR, indirect=True)
each_kind_and_host = pytest.mark.parametrize(("kind", "host"), EACH_KIND_AND_HOST, indirect=True)
each_tensor = pytest.mark.parametrize(("kind", "host"), EACH_TENSOR, indirect=True)
each_rank = pytest.mark.parametrize(("kind", "host"), EACH_RANK, indirect=True)
each_kind = pytest.mark.parametrize("kind", ALL_KINDS, indirect=True)
half_too = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return ALL_KINDS[request.param]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Host:
    if request.param in LARGE:
        request.getfixturevalue("as_large")
    return ALL_HOSTS[request.param]


# About 500,000 float64 roundings; the sums here have some ten terms.
assert_exact = functools.partial(assert_close, rtol=1e-10, atol=1e-10)


def assert_conforms(actual: Result, expected: Result) -> None:
    assert_exact(actual.outputs, expected.outputs)
    ours = {key: expected.gradients[key] for key in actual.gradients}
    assert_exact(actual.gradients, ours)


def assert_bits(actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖."""
    difference = (actual.double() - expected).norm()
    return float(difference / expected.norm().clamp_min(1e-300))


def read(model: nn.Module, path: str) -> Tensor:
    """Return a tensor, or a block of it, read as an attribute of its module."""
    path, index = parted(path)
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    return value if index is ... else value[index]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters()}


class TestConformance:
    """Claims about every kind on every host. To test a new kind, add one line to `KINDS`."""

    @every_pair
    def test_values_and_gradients(self, kind: Kind, host: Host) -> None:
        """Outputs and gradients of factors and inputs equal those of the dense reference."""
        case = Case.of(host)
        case.attach(kind, strength=0.7)
        actual = case.actual()
        factors = {f"one {key}" for key in case.trained("one")}
        inputs = {f"input {i}" for i, x in enumerate(case.inputs) if x.is_floating_point()}
        assert actual.gradients.keys() == factors | inputs
        assert_conforms(actual, case.expected("one"))

    @half_too
    @each_kind_and_host
    def test_a_new_adapter_changes_no_output(
        self, kind: Kind, host: Host, dtype: torch.dtype
    ) -> None:
        """Attaching an adapter leaves the outputs and tensors bitwise unchanged."""
        case = Case.of(host, dtype)
        pl.attach(case.model, kind.spec, targets=case.sites(kind))
        for path, parameter in case.plain.named_parameters():
            assert_bits(read(case.model, path).detach(), parameter.detach())
        found = floats(case.model(*case.inputs))
        # If the input of a product is strided, torch rounds differently for a frozen weight. The
        # base then has two outputs: as it was, and frozen as attaching freezes it.
        expected = floats(copy.deepcopy(case.plain)(*case.inputs))
        if not all(map(torch.equal, found, expected)):
            expected = case.base().outputs
        assert_bits(found, expected)

    @each_kind_and_host
    def test_several_adapters(self, kind: Kind, host: Host) -> None:
        """Several adapters of different kinds, ranks and strengths apply in attaching order."""
        case = Case.of(host)
        case.attach(kind, "one", strength=0.5)
        for name, other, strength in (
            ("two", "lora_stabilized", -2.0),
            ("three", "delta", 0.3),
            ("off", "delta", 1.0),
            ("four", "lora", 1.0),
        ):
            if case.sites(KINDS[other]):
                case.attach(KINDS[other], name, strength)
        pl.disable(case.model, "off")
        assert_conforms(case.actual(), case.expected("one", "two", "three", "four"))
        with pl.using(case.model, "off", one=2.0):
            case.strengths["one"] = 2.0
            assert_conforms(case.actual(), case.expected("one", "off"))

    @each_tensor
    def test_each_tensor_alone(self, kind: Kind, host: Host) -> None:
        """A host with one tensor adapted, for each of its tensors, equals the dense reference."""
        for path in Case.of(host).sites(kind):
            case = Case.of(host)
            case.attach(kind, targets=path)
            assert_conforms(case.actual(), case.expected("one"))

    @each_kind_and_host
    def test_tensor_strength(self, kind: Kind, host: Host) -> None:
        """A tensor as strength gives the outputs of its value, and gets its gradient."""
        case = Case.of(host)
        case.attach(kind, strength=torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
        actual = case.actual()
        assert "one strength" in actual.gradients
        assert_conforms(actual, case.expected("one"))

    @each_kind_and_host
    def test_base_is_trained_beside(self, kind: Kind, host: Host) -> None:
        """With freeze=False the gradients of the base's tensors equal those of the reference."""
        case = Case.of(host)
        case.attach(kind, freeze=False)
        actual = case.actual()
        assert actual.gradients.keys() >= dict(case.plain.named_parameters()).keys()
        assert_conforms(actual, case.expected("one"))

    @each_kind_and_host
    def test_disabled(self, kind: Kind, host: Host) -> None:
        """With the adapter off, outputs and gradients of inputs are bitwise the base's."""
        case = Case.of(host)
        case.attach(kind)
        pl.disable(case.model)
        actual = case.actual()
        expected = case.base()
        assert_bits(actual.outputs, expected.outputs)
        for key, gradient in actual.gradients.items():
            assert_bits(gradient, expected.gradients.get(key, torch.zeros_like(gradient)))

    @each_kind_and_host
    def test_merged(self, kind: Kind, host: Host) -> None:
        """Merging stores W' and keeps the outputs; unmerging restores the stored bits."""
        case = Case.of(host)
        case.attach(kind, strength=0.7)
        before = bits(case.model)
        expected = case.expected("one")
        wanted = {path: read(case.model, path).detach().clone() for path in case.sites(kind)}
        with pl.merged(case.model):
            for path, value in wanted.items():
                assert isinstance(read(case.model, parted(path)[0]), nn.Parameter)
                assert_bits(read(case.model, path).detach(), value)
            actual = case.actual()
        assert_exact(actual.outputs, expected.outputs)
        for key, gradient in actual.gradients.items():
            if key.startswith("input"):
                assert_exact(gradient, expected.gradients[key])
            else:
                assert not gradient.any()
        assert_bits(bits(case.model), before)

    @half_too
    @each_kind_and_host
    def test_low_precision(self, kind: Kind, host: Host, dtype: torch.dtype) -> None:
        """In float32 and bfloat16 the error is at most about that of the dense model.

        The error is ‖error‖ / ‖value‖ of each output and gradient against the float64 reference.
        The bound is twice the error of the plain dense model in that dtype, plus two roundings.
        """
        case = Case.of(host, dtype)
        case.attach(kind)
        assert all(p.dtype == torch.float32 for p in pl.parameters(case.model))
        actual, exact, plain = (
            {**dict(enumerate(result.outputs)), **result.gradients}
            for result in (case.actual(), case.expected("one"), case.expected("one", dtype=dtype))
        )
        for key, value in actual.items():
            bound = 2 * (distance(plain[key], exact[key]) + torch.finfo(dtype).eps)
            assert distance(value, exact[key]) <= bound, key

    @each_kind_and_host
    def test_readers_get_a_plain_dense_tensor(self, kind: Kind, host: Host) -> None:
        """Reading an adapted tensor returns W', a plain tensor of the base's dtype."""
        for dtype in (torch.float64, torch.bfloat16):
            case = Case.of(host, dtype)
            case.attach(kind, strength=0.7)
            for path in case.sites(kind):
                value, W = read(case.model, path), read(case.plain, path).detach()
                assert type(value) is Tensor
                assert (value.dtype, value.shape) == (W.dtype, W.shape)
                factors = {
                    key.rpartition(".")[2]: factor.double()
                    for key, factor in pl.state_dict(case.model, "one").items()
                    if key.rpartition(".")[0] == path
                }
                wanted = kind.formula(W.double(), factors, 0.7).to(dtype)
                # For a half-precision base W' is computed in float32. If the largest terms cancel,
                # their rounding error remains.
                double = dtype == torch.float64
                rtol = 1e-12 if double else torch.finfo(dtype).eps
                atol = 1e-12 if double else torch.finfo(torch.float32).eps * float(W.abs().max())
                assert_close(value.detach(), wanted, rtol=rtol, atol=atol)

    @each_kind_and_host
    def test_detach_gives_back(self, kind: Kind, host: Host) -> None:
        """Detaching restores classes, parameters, their order, requires_grad and bits."""
        case = Case.of(host)
        model = case.model
        next(model.parameters()).requires_grad_(False)
        classes = [type(module) for module in model.modules()]
        flags = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
        content = [sorted(vars(module)) for module in model.modules()]
        case.attach(kind, "one")
        case.attach(kind, "two")
        model(*case.inputs)
        pl.detach(model, "one")
        pl.detach(model)
        assert [type(module) for module in model.modules()] == classes
        assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == flags
        assert [sorted(vars(module)) for module in model.modules()] == content
        assert_bits(dict(model.named_parameters()), dict(case.plain.named_parameters()))

    @each_kind_and_host
    def test_saved_and_loaded(self, kind: Kind, host: Host, tmp_path: Path) -> None:
        """An adapter loaded into a plain copy has the saved bits and gives the same outputs."""
        case = Case.of(host)
        case.attach(kind, strength=0.7)
        other = copy.deepcopy(case.plain)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        pl.load(other, tmp_path / "one.safetensors")
        assert_bits(pl.state_dict(other, "one"), pl.state_dict(case.model, "one"))
        # Not bitwise: a product may depend on the memory alignment of its factors.
        assert_exact(floats(other(*case.inputs)), floats(case.model(*case.inputs)))

    @each_kind_and_host
    def test_a_copy_is_independent(self, kind: Kind, host: Host) -> None:
        """A deep copy gives the same outputs, and changing it leaves the original unchanged."""
        case = Case.of(host)
        case.attach(kind)
        case.model(*case.inputs)
        other = copy.deepcopy(case.model)
        before = case.actual()
        assert_bits(floats(other(*case.inputs)), before.outputs)
        shake(other)
        pl.merge(other)
        pl.bake(other)
        after = case.actual()
        assert_bits(after.outputs, before.outputs)
        assert_bits(after.gradients, before.gradients)

    @each_rank
    def test_rank_of_the_update(self, kind: Kind, host: Host) -> None:
        """The update of a low-rank kind, seen as (out, everything else), has the kind's rank."""
        case = Case.of(host)
        case.attach(kind)
        for path in case.sites(kind):
            update = read(case.model, path).detach() - read(case.plain, path).detach()
            matrix = update.reshape(update.shape[0], -1)
            expected = min(kind.rank or 0, *matrix.shape)
            assert torch.linalg.matrix_rank(matrix, rtol=1e-9) == expected

    @each_kind
    def test_strength_is_one_by_default(self, kind: Kind) -> None:
        """Without a strength, the methods of a spec return what they return at strength 1."""
        W = torch.randn(6, 6, dtype=torch.float64)
        factors = {key: f + torch.randn_like(f) for key, f in kind.spec.create(W).items()}
        assert_bits(kind.spec.apply(W, factors), kind.spec.apply(W, factors, 1.0))
        assert_bits(kind.spec.low_rank(factors), kind.spec.low_rank(factors, 1.0))
        assert_bits(kind.spec.rescaled(W, factors), kind.spec.rescaled(W, factors, 1.0))
