"""torch.compile, torch.func and torch.export see an adapted model as they see any other."""

import copy
import inspect
import io
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import EXACT, MLP, assert_agrees, case_of, host_name
from tests.support.mixed import small
from tests.support.reference import HOSTS, KINDS, Case, Host, floats, loss, shake

# torch says of itself what it does not do fast, and what it writes down while it traces an LSTM.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::torch\..*"),
    pytest.mark.filterwarnings(r"ignore:The tensor attributes self\..*_flat_weights:UserWarning"),
]

SMALL = Host(
    lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)),
    lambda: (torch.randn(4, 7),),
)
# In a module, as torch 2.6 exports no LSTM alone.
LSTM = Host(lambda: nn.Sequential(nn.LSTM(5, 4)), lambda: (torch.randn(3, 2, 5),))
CAN_BUILD = (
    any(map(shutil.which, ("c++", "g++", "clang++")))
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    """Return the model as one compiled graph, and a counter of the graphs that this has taken."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestCompile:
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
    def test_two_graphs_with_the_right_gradients(self, host: str | Host, kind: str) -> None:
        """One graph for on, one for off, however often it is toggled; values and gradients right.

        Gradients on their own: a graph can give right outputs and leave out a part of them.
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
    def test_gradients_of_a_large_layer(self, needs_dx: bool) -> None:
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
    def test_inductor(self) -> None:
        """The default backend, in float32, gives the values and gradients of the dense float64."""
        case = case_of(SMALL, dtype=torch.float32)
        call, counter = compiled(case.model, "inductor")
        for on in (True, False, True):
            (pl.enable if on else pl.disable)(case.model)
            expected = case.expected("one") if on else case.expected()
            # Sums of about ten terms of size 1 to 10 in float32, through three layers.
            assert_agrees(case.actual(call), expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 2

    def test_inference(self) -> None:
        """In eval mode under no_grad (attention's fast path), on and off take a graph each."""
        case = case_of("encoder_layer")
        case.model.eval()
        call, counter = compiled(case.model)
        with torch.no_grad():
            for on in (True, False, True, False):
                (pl.enable if on else pl.disable)(case.model)
                expected = case.expected("one") if on else case.expected()
                assert_close(floats(call(*case.inputs)), expected.outputs, **EXACT)
        assert counter.frame_count == 2

    def test_recurrent(self) -> None:
        """torch breaks the graph at an LSTM, adapted or not; what it computes stays right.

        Once on and off were both seen twice, nothing more is compiled.
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

    def test_graph_for_each_set_of_adapters(self) -> None:
        """With several adapters each set that is used is compiled once."""
        case = case_of(MLP)
        case.attach(KINDS["delta"], "two")
        call, counter = compiled(case.model)
        for _ in range(3):
            for names in ((), ("one",), ("two",), ("one", "two")):
                with pl.using(case.model, *names):
                    assert_agrees(case.actual(call), case.expected(*names))
        assert counter.frame_count == 4

    def test_tensor_strength(self) -> None:
        """A strength that is a tensor changes without another graph, and gets its gradient."""
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
            # The slope along λ of the dense model, as a difference quotient.
            step, ends = 1e-6, []
            for end in (value + step, value - step):
                case.strengths["one"] = end
                (out,) = case.expected("one").outputs
                ends.append(out.square().sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert_close(found, slope, rtol=1e-5, atol=1e-5, check_dtype=False)
        assert counter.frame_count == 2  # one more, for a strength that requires a gradient

    def test_merging_takes_no_graph_of_its_own(self) -> None:
        """Merged, the model runs the graph of the base, on the merged weights."""
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

    def test_freezing_factors(self) -> None:
        """Frozen and unfrozen factors take a graph each at most, and get the right gradients."""
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
    def test_attaching_after_compiling(self, host: str | Host) -> None:
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

    def test_attaching_through_the_compiled_model(self) -> None:
        """The verbs take the compiled model as well, and act on the model inside."""
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

    def test_training(self) -> None:
        """A compiled training step gives the factors that the same steps give a dense model."""
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


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors by the names that `functional_call` wants, in the order of the verbs."""
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


class TestFunc:
    def test_functional_call(self) -> None:
        """`functional_call` with other factors computes what the dense model has with those."""
        case = case_of("encoder_layer")
        other = case_of("encoder_layer")
        with torch.no_grad():
            for parameter in pl.parameters(other.model):
                parameter.mul_(-2)
        found = functional_call(case.model, factors_of(other.model), case.inputs)
        assert_close(floats(found), other.expected("one").outputs, **EXACT)
        assert_close(floats(case.model(*case.inputs)), case.expected("one").outputs, **EXACT)

    @pytest.mark.parametrize("host", [MLP, "encoder_layer"], ids=host_name)
    def test_grad(self, host: str | Host) -> None:
        """`grad` gives the gradients of the dense reference, and leaves `.grad` alone."""
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
    def test_vmap_over_stacked_factors(self, host: str) -> None:
        """`vmap` over a dimension in front of the factors runs each adapter as it runs alone."""
        case = case_of(host)
        stacked = {
            key: torch.stack([v, -2 * v, v / 3]) for key, v in factors_of(case.model).items()
        }
        run = vmap(
            lambda factors: floats(functional_call(case.model, factors, case.inputs))[0],
            randomness="error",
        )
        found = run(stacked)
        for i, out in enumerate(found):
            with torch.no_grad():
                for parameter, values in zip(
                    pl.parameters(case.model), stacked.values(), strict=True
                ):
                    parameter.copy_(values[i])
            assert_close([out], case.expected("one").outputs[:1], **EXACT)

    def test_adapters_trained_at_once(self) -> None:
        """Three adapters trained at once by `vmap` are those that are trained one by one."""
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

    def test_ensemble(self) -> None:
        """`stack_module_state` stacks adapted models, and a meta copy of one runs them all."""
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
    def test_gradients_per_sample(self, large: bool, request: pytest.FixtureRequest) -> None:
        """`vmap(grad)` over the rows of a batch gives each row's own gradients."""
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

    def test_jvp(self) -> None:
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

    def test_jacobian(self) -> None:
        """`jacrev` agrees with the backward of each output alone."""
        case = case_of("linear")
        factors = factors_of(case.model)
        found = jacrev(lambda f: functional_call(case.model, f, case.inputs).sum(0))(factors)
        for i, out in enumerate(case.model(*case.inputs).sum(0)):
            alone = torch.autograd.grad(out, pl.parameters(case.model), retain_graph=True)
            assert_close([value[i] for value in found.values()], list(alone), **EXACT)

    @pytest.mark.usefixtures("as_large")
    @pytest.mark.parametrize(("host", "kind"), SMOOTH, ids=host_name)
    def test_derivatives(self, host: str | Host, kind: str) -> None:
        """First derivatives (backward, forward, batched) and second ones are the numeric ones."""
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


class TestExport:
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    @pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
    @pytest.mark.parametrize(
        "host",
        [MLP, "conv2d_groups", pytest.param(LSTM, id="lstm"), "encoder_layer"],
        ids=host_name,
    )
    def test_export(self, host: str | Host, on: bool, strict: bool) -> None:
        """An exported program computes what the dense reference does, adapters on or off."""
        case = case_of(host)
        case.model.eval()
        (pl.enable if on else pl.disable)(case.model)
        expected = case.expected("one") if on else case.expected()
        with torch.no_grad():
            program = torch.export.export(case.model, case.inputs, strict=strict)
            # What is exported is what was on at that time.
            (pl.disable if on else pl.enable)(case.model)
            found = program.module()(*case.inputs)
        assert_close(floats(found), expected.outputs, **EXACT)

    def test_off_is_the_graph_of_the_base(self) -> None:
        """Switched off, an adapted model is exported as the very operations of its base."""
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

    def test_saved_program(self) -> None:
        """A program with a dynamic batch survives saving and loading, without paramlora in it."""
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
    def test_signatures(self, module: nn.Module) -> None:
        """A layer keeps the signature of its forward, by which export and fx name its inputs."""
        expected = inspect.signature(module.forward)
        pl.attach(module, pl.LoRA(rank=1), "*weight*")
        assert inspect.signature(module.forward) == expected
