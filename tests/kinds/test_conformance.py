"""Every kind of adapter at every host agrees with a plain dense model, values and gradients."""

import copy
import functools
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

PAIRS = [
    pytest.param(kind, host, False, id=f"{kind_name}-{host_name}")
    for kind_name, kind in KINDS.items()
    for host_name, host in HOSTS.items()
    if any(map(kind.takes, host.make().parameters()))
]
# Blocks of tensors, and variants of kinds, in all the ways in which a forward gets at W'. Of hosts
# whose blocks have more than a few elements: the rounding of a gradient of two is chance, beside
# that of the reference, too.
PAIRS += [
    pytest.param(kind, HOSTS[host_name], False, id=f"{kind_name}-{host_name}")
    for kind_name, kind in (BLOCKS | VARIANTS).items()
    for host_name in (
        *("linear", "linear_wide", "linear_own_forward", "conv2d_groups", "conv_transpose1d"),
        *("embedding_padding", "bag_weighted", "lstm_packed", "attention", "bare_3d"),
    )
]
PAIRS += [
    pytest.param(kind, HOSTS[host_name], False, id=f"{kind_name}-{host_name}")
    for kind_name, kind in VARIANTS.items()
    for host_name in ("lstm_deep", "bare_listed")
]
PAIRS += [pytest.param(BLOCKS["lora_blocks"], HOSTS["linear"], True, id="lora_blocks-as_large")]
PAIRS += [
    pytest.param(TRANSPOSED, HOSTS[name], as_large, id=f"lora_transposed-{name}-{as_large}")
    for name, as_large in (
        *(("linear", False), ("linear", True), ("linear_wide", True), ("embedding_padding", False)),
        *(("conv2d_groups", False), ("bare_3d", False)),
    )
]
# A large Linear is computed by a Function of its own; here small ones are, too.
PAIRS += [
    pytest.param(KINDS["lora"], host, True, id=f"lora-{host_name}_as_large")
    for host_name, host in HOSTS.items()
    if host_name.startswith(("linear", "encoder"))
]
PAIRS_WITH_A_RANK = [p for p in PAIRS if isinstance(p.values[0], Kind) and p.values[0].rank]
# Half a million times the rounding of one operation at most: sums of some ten terms in float64.
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
    """Return a tensor, or the block of it, as any reader of the module's attribute gets it."""
    path, index = parted(path)
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    return value if index is ... else value[index]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.parametrize(("kind", "host", "large"), PAIRS)
class TestConformance:
    """What holds for every kind of adapter at every host; a new kind is one line in KINDS."""

    @pytest.fixture(autouse=True)
    def _as_large(self, large: bool, request: pytest.FixtureRequest) -> None:
        if large:
            request.getfixturevalue("as_large")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_new_adapter_changes_no_output(
        self, kind: Kind, host: Host, dtype: torch.dtype
    ) -> None:
        """Attached and not trained, an adapter leaves outputs and tensors bitwise the base's."""
        case = Case.of(host, dtype)
        pl.attach(case.model, kind.spec, targets=case.sites(kind))
        for path, parameter in case.plain.named_parameters():
            assert_bits(read(case.model, path).detach(), parameter.detach())
        found = floats(case.model(*case.inputs))
        # Where a product's input is strided, torch rounds by whether the weight requires a
        # gradient: the base has two outputs there, as it was and frozen.
        expected = floats(copy.deepcopy(case.plain)(*case.inputs))
        if not all(map(torch.equal, found, expected)):
            expected = case.base().outputs
        assert_bits(found, expected)

    def test_values_and_gradients(self, kind: Kind, host: Host) -> None:
        """Outputs, and gradients of factors and inputs, are those of the dense reference."""
        case = Case.of(host)
        case.attach(kind, strength=0.7)
        actual = case.actual()
        factors = {f"one {key}" for key in case.trained("one")}
        inputs = {f"input {i}" for i, x in enumerate(case.inputs) if x.is_floating_point()}
        assert actual.gradients.keys() == factors | inputs
        assert_conforms(actual, case.expected("one"))

    def test_several_adapters(self, kind: Kind, host: Host) -> None:
        """Several adapters at once, of other kinds, ranks and strengths, add up in order."""
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

    def test_each_tensor_alone(self, kind: Kind, host: Host) -> None:
        """Adapting one tensor of a host, whichever, gives what the dense reference gives."""
        for path in Case.of(host).sites(kind):
            case = Case.of(host)
            case.attach(kind, targets=path)
            assert_conforms(case.actual(), case.expected("one"))

    def test_base_is_trained_beside(self, kind: Kind, host: Host) -> None:
        """With freeze=False the base's tensors get the gradients that they get in the reference."""
        case = Case.of(host)
        case.attach(kind, freeze=False)
        actual = case.actual()
        assert actual.gradients.keys() >= dict(case.plain.named_parameters()).keys()
        assert_conforms(actual, case.expected("one"))

    def test_disabled(self, kind: Kind, host: Host) -> None:
        """Switched off, outputs and the gradients of inputs are bitwise those of the base."""
        case = Case.of(host)
        case.attach(kind)
        pl.disable(case.model)
        actual = case.actual()
        expected = case.base()
        assert_bits(actual.outputs, expected.outputs)
        for key, gradient in actual.gradients.items():
            assert_bits(gradient, expected.gradients.get(key, torch.zeros_like(gradient)))

    def test_merged(self, kind: Kind, host: Host) -> None:
        """Merged, the stored tensors are W' and the outputs stay; unmerged, the bits are back."""
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_low_precision(self, kind: Kind, host: Host, dtype: torch.dtype) -> None:
        """In float32 and bfloat16 the error is at most that of a dense model, give or take.

        Measured against the float64 reference, on ‖error‖ / ‖value‖ of each output and gradient:
        at most twice what the plain dense model makes in that dtype, and two roundings.
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

    def test_readers_get_a_plain_dense_tensor(self, kind: Kind, host: Host) -> None:
        """Whoever reads a tensor gets W', a plain tensor of the base's dtype, with its gradient."""
        for dtype in (torch.float64, torch.bfloat16):
            case = Case.of(host, dtype)
            case.attach(kind, strength=0.7)
            for path in case.sites(kind):
                value, W = read(case.model, path), read(case.plain, path)
                assert type(value) is Tensor
                assert (value.dtype, value.shape) == (W.dtype, W.shape)
                factors = {
                    key.rpartition(".")[2]: factor.double()
                    for key, factor in pl.state_dict(case.model, "one").items()
                    if key.rpartition(".")[0] == path
                }
                wanted = kind.formula(W.detach().double(), factors, 0.7).to(dtype)
                # In half precision W' is computed in float32, whose rounding is that of the largest
                # terms: it stays where they cancel.
                double = dtype == torch.float64
                rtol = 1e-12 if double else torch.finfo(dtype).eps
                atol = 1e-12 if double else torch.finfo(torch.float32).eps * float(W.abs().max())
                assert_close(value.detach(), wanted, rtol=rtol, atol=atol)

    def test_detach_gives_back(self, kind: Kind, host: Host) -> None:
        """After detach the classes, parameters, their order, flags and bits are as before."""
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

    def test_saved_and_loaded(self, kind: Kind, host: Host, tmp_path: Path) -> None:
        """Saved and loaded into a plain copy, an adapter has its bits, and the same outputs."""
        case = Case.of(host)
        case.attach(kind, strength=0.7)
        other = copy.deepcopy(case.plain)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        pl.load(other, tmp_path / "one.safetensors")
        assert_bits(pl.state_dict(other, "one"), pl.state_dict(case.model, "one"))
        # Not to the bit: a product may depend on where in memory its factors begin.
        assert_exact(floats(other(*case.inputs)), floats(case.model(*case.inputs)))

    def test_a_copy_is_independent(self, kind: Kind, host: Host) -> None:
        """A deep copy computes the same, and nothing done to it reaches the original."""
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


@pytest.mark.parametrize(("kind", "host", "large"), PAIRS_WITH_A_RANK)
def test_rank_of_the_update(kind: Kind, host: Host, large: bool) -> None:
    """The update of a low-rank kind, seen as (out, everything else), has rank r at most."""
    case = Case.of(host)
    case.attach(kind)
    for path in case.sites(kind):
        update = read(case.model, path).detach() - read(case.plain, path).detach()
        matrix = update.reshape(update.shape[0], -1)
        expected = min(kind.rank or 0, *matrix.shape)
        assert torch.linalg.matrix_rank(matrix, rtol=1e-9) == expected
