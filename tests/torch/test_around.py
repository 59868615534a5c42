"""What people use around a model (copies, hooks, norms, optimizers and more) keeps working."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

import paramlora as pl
from tests.support.helpers import EXACT, MLP, case_of, host_name, unchanged
from tests.support.reference import HOSTS, KINDS, Case, Host, dense, floats, loss, shake


def assert_bits(actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


def outputs(case: Case, model: nn.Module | None = None) -> list[Tensor]:
    """Return what a model, the case's own where none is given, makes of the case's inputs."""
    with torch.no_grad():
        return floats((case.model if model is None else model)(*case.inputs))


def factors(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in pl.parameters(model)]


def written_out(case: Case) -> nn.Module:
    """Return a plain copy of the case's host whose stored tensors are W', by the formula."""
    plain = copy.deepcopy(case.plain)
    state = pl.state_dict(case.model, "one")
    with torch.no_grad():
        for path, tensor in plain.named_parameters():
            own = {
                key.rpartition(".")[2]: v for key, v in state.items() if key.startswith(path + ".")
            }
            if own:
                tensor.copy_(case.kinds["one"].formula(tensor, own, case.strengths["one"]))
    return plain


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all of them."""
    pairs = [(x.detach().double(), y.detach()) for x, y in zip(found, expected, strict=True)]
    difference = sum(float((one - two).square().sum()) for one, two in pairs)
    return (difference / sum(float(two.square().sum()) for _, two in pairs)) ** 0.5


class TestCopies:
    @pytest.mark.parametrize("state", ["on", "off", "merged"])
    @pytest.mark.parametrize("host", [MLP, "attention", "lstm"], ids=host_name)
    def test_deepcopy(self, host: str | Host, state: str) -> None:
        """A deep copy, after a backward, is equal and apart: neither feels what the other does."""
        case = case_of(host)
        case.actual()
        if state == "off":
            pl.disable(case.model)
        if state == "merged":
            pl.merge(case.model)
        other = copy.deepcopy(case.model)
        assert pl.summary(other) == pl.summary(case.model)
        assert_bits(outputs(case, other), outputs(case))
        for one, two in ((other, case.model), (case.model, copy.deepcopy(case.model))):
            with unchanged(two):
                pl.unmerge(one)
                pl.enable(one)
                pl.scale(one, 2.0)
                shake(one)
                loss(floats(one(*case.inputs))).backward()
                with pl.merged(one):
                    pass
                pl.attach(one, pl.LoRA(rank=1), "*weight*", name="two")
                pl.detach(one)
                one.half()
            types = [type(module) for module in case.plain.modules()]
            assert [type(module) for module in one.modules()] == types

    def test_pickle(self, tmp_path: Path) -> None:
        """torch pickles no parametrized model, and says so; a detached or baked one it does."""
        case = case_of(MLP)
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through"):
            torch.save(case.model, tmp_path / "model.pt")
        baked = copy.deepcopy(case.model)
        pl.bake(baked)
        pl.detach(case.model)
        for model in (baked, case.model):
            torch.save(model, tmp_path / "model.pt")
            again = torch.load(tmp_path / "model.pt", weights_only=False)
            assert_bits(outputs(case, again), outputs(case, model))

    def test_averaged_model(self) -> None:
        """AveragedModel averages the factors, on a base of the same bits, apart from the model."""
        case = case_of(MLP)
        averaged = AveragedModel(case.model)
        seen = []
        for _ in range(3):
            shake(case.model)
            averaged.update_parameters(case.model)
            seen.append(factors(case.model))
        mean = [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)]
        assert_close(factors(averaged), mean, **EXACT)
        assert pl.fingerprint(averaged.module) == pl.fingerprint(case.model)

        pl.load_state_dict(case.model, pl.state_dict(averaged.module, "one"), "one")
        expected = case.expected("one").outputs
        with unchanged(case.model):
            assert_close(outputs(case, averaged), expected, **EXACT)
            with pl.disabled(averaged):
                assert_bits(outputs(case, averaged), outputs(case, case.plain))
            with pl.merged(averaged):
                assert_close(outputs(case, averaged), expected, **EXACT)
            pl.detach(averaged)
        assert_bits(averaged.module.state_dict(), case.plain.state_dict())

    def test_exponential_average(self) -> None:
        """An exponential average is d·mean + (1 − d)·factor, and the base stays as it is."""
        case = case_of(MLP)
        averaged = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        averaged.update_parameters(case.model)  # the first one copies
        expected = factors(case.model)
        for _ in range(3):
            shake(case.model)
            averaged.update_parameters(case.model)
            pairs = zip(expected, factors(case.model), strict=True)
            expected = [0.75 * mean + 0.25 * new for mean, new in pairs]
        assert_close(factors(averaged), expected, **EXACT)
        assert_close(pl.base_state_dict(averaged.module), case.plain.state_dict(), **EXACT)


@pytest.mark.usefixtures("as_large")
class TestHooks:
    def test_values(self) -> None:
        """Forward, pre- and backward hooks, from before or after attach, see the dense values."""
        case = Case.of(MLP)
        seen: list[tuple[str, list[Tensor]]] = []

        def record(what: str) -> Callable[..., None]:
            return lambda module, *values: seen.append((what, floats(list(values))))

        def instrument(layer: nn.Module, when: str) -> None:
            layer.register_forward_pre_hook(record(f"{when}: forward pre"))
            layer.register_forward_hook(record(f"{when}: forward"))
            layer.register_full_backward_pre_hook(record(f"{when}: backward pre"))
            layer.register_full_backward_hook(record(f"{when}: backward"))

        def run(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
            seen.clear()
            x = case.inputs[0].detach().requires_grad_()
            loss([model(x)]).backward()
            return list(seen)

        instrument(case.model[0], "before")
        case.attach(KINDS["lora"])
        plain = written_out(case)
        instrument(plain[0], "before")
        for model in (case.model, plain):
            instrument(model[2], "after")
        ours, theirs = run(case.model), run(plain)
        assert [what for what, _ in ours] == [what for what, _ in theirs]
        assert len(ours) == 8
        assert_close([values for _, values in ours], [values for _, values in theirs], **EXACT)

        pl.detach(case.model)  # and they all stay
        ours, theirs = run(case.model), run(plain)
        assert [what for what, _ in ours] == [what for what, _ in theirs]

    def test_hooks_that_change_values(self) -> None:
        """What a hook returns replaces inputs, outputs and gradients, as on a dense model."""
        case = case_of(MLP)
        plain = written_out(case)
        for model in (case.model, plain):
            model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            model[2].register_forward_hook(lambda module, args, out: out.sin())
            model[2].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
        results = []
        for model in (case.model, plain):
            x = case.inputs[0].detach().requires_grad_()
            out = model(x)
            loss([out]).backward()
            results.append((out, x.grad))
        assert_close(results[0], results[1], **EXACT)

    def test_hooks_of_tensors(self) -> None:
        """A hook on a base weight that is trained beside gets its gradient, attached or not."""
        case = Case.of(MLP)
        seen: list[Tensor] = []
        case.model[0].weight.register_hook(seen.append)
        case.attach(KINDS["lora"], freeze=False)
        expected = [case.expected("one").gradients["0.weight"]]
        loss(floats(case.model(*case.inputs))).backward()
        pl.detach(case.model)
        case.kinds.clear()
        expected.append(case.expected().gradients["0.weight"])
        loss(floats(case.model(*case.inputs))).backward()
        assert_close(seen, expected, **EXACT)

    def test_optimizer_in_the_backward(self) -> None:
        """A hook that steps each factor once its gradient is there does what an optimizer does."""
        case = case_of(MLP)
        twin = copy.deepcopy(case.model)

        def step(parameter: Tensor) -> None:
            parameter.data -= 0.1 * parameter.grad

        for parameter in pl.parameters(case.model):
            parameter.register_post_accumulate_grad_hook(step)
        for model in (case.model, twin):
            loss(floats(model(*case.inputs))).backward()
        torch.optim.SGD(pl.parameters(twin), lr=0.1).step()
        assert_close(factors(case.model), factors(twin), **EXACT)


class Backward:
    """A forward that has run, and what its backward will find."""

    def __init__(self, case: Case, call: Callable[..., Any] | None = None) -> None:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in case.inputs]
        leaves = case.leaves() | {f"input {i}": x for i, x in enumerate(inputs)}
        self.leaves = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
        self.total = loss(floats((case.model if call is None else call)(*inputs)))

    def check(self, expected: dict[str, Tensor]) -> None:
        """Run the backward, and compare all gradients with the expected ones."""
        self.total.backward()
        found = {
            key: torch.zeros_like(leaf) if leaf.grad is None else dense(leaf.grad)
            for key, leaf in self.leaves.items()
        }
        assert_close(found, {key: expected[key] for key in found}, **EXACT)


EVERY_PATH = [
    MLP,
    # More rows than a factored product is for.
    Host(lambda: nn.Linear(4, 3), lambda: (torch.randn(40, 4),)),
    "embedding",
    "bag_sum",
    "conv2d_groups",
    "bare_3d",
    "lstm",
    "attention",
    "encoder_layer",
]


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize("host", EVERY_PATH, ids=["mlp", "many_rows", *map(str, EVERY_PATH[2:])])
class TestBackward:
    """What happens between a forward and its backward."""

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
    def test_checkpoint(self, host: str | Host, on: bool, reentrant: bool) -> None:
        """Recomputed by torch.utils.checkpoint, gradients are those of the dense reference."""
        case = case_of(host)
        if not on:
            pl.disable(case.model)
            case.model.requires_grad_()
        # torch's reentrant kind needs an input that requires a gradient, and passes over tensors
        # in nested tuples.
        key = torch.ones((), requires_grad=True)

        def call(_: Tensor, *inputs: Tensor) -> Any:
            return tuple(floats(case.model(*inputs)))

        ran = Backward(case, lambda *x: checkpoint(call, key, *x, use_reentrant=reentrant))
        ran.check((case.expected("one") if on else case.expected()).gradients)

    def test_checkpoint_of_what_was_toggled(self, host: str | Host) -> None:
        """Toggled before the backward, a recomputation would differ: checkpoint refuses it."""
        case = case_of(host)
        ran = Backward(case, lambda *x: checkpoint(case.model, *x, use_reentrant=False))
        pl.disable(case.model)
        with pytest.raises(CheckpointError, match="different"):
            ran.total.backward()

    @pytest.mark.parametrize("change", [pl.disable, lambda model: pl.scale(model, 5.0), pl.detach])
    def test_changed_before_the_backward(
        self, host: str | Host, change: Callable[[nn.Module], None]
    ) -> None:
        """The backward is that of the forward that ran, whatever is switched in between."""
        case = case_of(host)
        expected = case.expected("one").gradients
        ran = Backward(case)
        change(case.model)
        ran.check(expected)

    def test_off_in_the_forward_only(self, host: str | Host) -> None:
        """A forward that ran with adapters off has the gradients of the base, on by then or not."""
        case = case_of(host)
        case.model.requires_grad_()
        with pl.disabled(case.model):
            ran = Backward(case)
        ran.check(case.expected().gradients)

    @pytest.mark.parametrize("what", ["factors", "strength", "base", "merge"])
    def test_overwritten_before_the_backward(self, host: str | Host, what: str) -> None:
        """A tensor that the backward needs and that changed since is an error, as in all of torch.

        What it does not need may change: the gradients are then right all the same.
        """
        case = case_of(host)
        strength = torch.tensor(0.75, dtype=torch.float64)
        case.strengths["one"] = 0.75
        pl.scale(case.model, strength)
        expected = case.expected("one").gradients
        ran = Backward(case)
        with torch.no_grad():
            if what == "factors":
                shake(case.model)
            elif what == "strength":
                strength.fill_(5.0)
            elif what == "merge":
                pl.merge(case.model)
            else:
                for tensor in pl.base_state_dict(case.model).values():
                    tensor.mul_(2)
        try:
            ran.check(expected)
        except RuntimeError as error:
            assert re.search("changed in place|modified by an inplace operation", str(error))  # noqa: PT017


class TestAutocast:
    @pytest.mark.parametrize(
        "host",
        [MLP, "embedding", "conv2d_groups", "gru", "attention", "encoder_layer"],
        ids=host_name,
    )
    def test_autocast(self, host: str | Host) -> None:
        """Under bfloat16 autocast: the plain model's dtype, at most twice its error, off its bits.

        Gradients of the factors are float32, and as near as those of the plain model's weights.
        """
        case = case_of(host, dtype=torch.float32)
        plain = written_out(case)

        def run(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
            with torch.autocast("cpu", torch.bfloat16):
                out = floats(model(*case.inputs))
            loss(out).backward()
            return [x.detach() for x in out], [
                p.grad for p in model.parameters() if p.requires_grad
            ]

        ours, grads = run(case.model)
        theirs, weights = run(plain)
        expected = case.expected("one")
        assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        assert error(ours, expected.outputs) <= 2 * error(theirs, expected.outputs)
        names = [f"one {key}" for key in pl.state_dict(case.model, "one")]
        exact = [expected.gradients[key] for key, _ in plain.named_parameters()]
        grads = [p.grad for p in pl.parameters(case.model)]
        assert {grad.dtype for grad in grads} == {torch.float32}
        bound = error([dense(w) for w in weights], exact)
        assert (
            error(grads, [expected.gradients[name] for name in names])
            <= 4 * bound + 4 * torch.finfo(torch.float32).eps
        )

        pl.disable(case.model)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert_bits(floats(case.model(*case.inputs)), floats(case.plain(*case.inputs)))

    def test_reading_a_weight(self) -> None:
        """A weight that is read under autocast is float32, bit for bit what it is outside."""
        case = case_of(MLP, dtype=torch.float32)
        outside = case.model[0].weight
        with torch.autocast("cpu", torch.bfloat16):
            assert_bits(case.model[0].weight, outside)


def normed(foreign: Callable[..., nn.Module]) -> tuple[nn.Sequential, Tensor]:
    """Return a model in eval mode, its first layer normed, its base trained, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    foreign(model[0])
    return model.eval(), torch.randn(6, 5, dtype=torch.float64)


def norm_by_hand(model: nn.Sequential) -> Tensor:
    """Return the first layer's W as its norm's own paper has it, from what is stored."""
    stored = {key.rpartition(".")[2]: v for key, v in model[0].named_parameters()}
    stored |= {key.rpartition(".")[2]: v for key, v in model[0].named_buffers()}
    if "original1" in stored:  # g · v / ‖v‖, a norm a row
        v = stored["original1"]
        return stored["original0"] * v / v.norm(dim=1, keepdim=True)
    W = stored["original"]  # W / σ(W)
    return W / (stored["_u"] @ W @ stored["_v"])


class TestNorms:
    @pytest.mark.parametrize("foreign", [weight_norm, spectral_norm])
    def test_before(self, foreign: Callable[..., nn.Module]) -> None:
        """On a norm from before, W' = norm(W) + s·BA; keys, digest and bits of the base stay."""
        model, x = normed(foreign)
        keys, digest, before = model.state_dict().keys(), pl.fingerprint(model), model(x)
        with unchanged(model):
            pl.attach(model, pl.LoRA(rank=2, alpha=3), freeze=False)
            assert_bits(model(x), before)
            shake(model)
            assert pl.base_state_dict(model).keys() == keys
            assert pl.fingerprint(model) == digest

            leaves = [p for p in model.parameters() if p.requires_grad]
            A, B, A2, B2 = pl.parameters(model)
            assert {A, B, A2, B2} < set(leaves)
            first = norm_by_hand(model) + 1.5 * B @ A
            second = model[2].parametrizations.weight.original + 1.5 * B2 @ A2
            expected = F.linear(F.linear(x, first, model[0].bias).tanh(), second, model[2].bias)
            assert_close(model[0].weight, first, **EXACT)
            assert_close(model(x), expected, **EXACT)
            assert_close(
                torch.autograd.grad(loss([model(x)]), leaves),
                torch.autograd.grad(loss([expected]), leaves),
                **EXACT,
            )
            with pl.disabled(model):
                assert_bits(model(x), before)
            other = copy.deepcopy(model)
            pl.detach(other)
            assert_bits(other(x), before)
            assert_close(model(x), expected, **EXACT)
            pl.detach(model)
        for one in (model, other):
            parametrize.remove_parametrizations(one[0], "weight")
            assert type(one[0]) is nn.Linear
            assert_close(one(x), before, **EXACT)

    def test_merging_into_weight_norm(self) -> None:
        """Merging on a weight_norm stores g and v of W'; unmerging gives the bits back."""
        model, x = normed(weight_norm)
        pl.attach(model, pl.LoRA(rank=2, alpha=3))
        shake(model)
        expected, digest = model(x), pl.fingerprint(model)
        base = {key: value.clone() for key, value in pl.base_state_dict(model).items()}
        with unchanged(model):
            pl.merge(model)
            assert_close(model(x), expected, **EXACT)
            assert_close(norm_by_hand(model), model[0].weight, **EXACT)
            assert pl.fingerprint(model) == digest
            assert_bits(dict(pl.base_state_dict(model)), base)
            pl.unmerge(model)

    @pytest.mark.parametrize("foreign", [spectral_norm, nn.utils.parametrizations.orthogonal])
    def test_merging_is_refused(self, foreign: Callable[..., nn.Module]) -> None:
        """Where W' cannot be stored (its norm is not 1, say) nothing at all is merged."""
        model, _ = normed(foreign)
        pl.attach(model, pl.LoRA(rank=2, alpha=3))
        shake(model)
        with unchanged(model), pytest.raises(pl.StateError, match=r"cannot merge at '0\.weight'"):
            pl.merge(model)

    def test_weight_norm_after(self) -> None:
        """A weight_norm from after splits W, below the adapters: nothing changes but the keys."""
        model, x = normed(lambda layer: layer)
        base = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2, alpha=3), "0")
        shake(model)
        expected = model(x)
        weight_norm(model[0])
        norm = copy.deepcopy(base)
        weight_norm(norm[0])
        assert pl.base_state_dict(model).keys() == norm.state_dict().keys()
        assert_close(model(x), expected, **EXACT)
        A, B = pl.state_dict(model).values()
        assert_close(model[0].weight, norm_by_hand(model) + 1.5 * B @ A, **EXACT)
        with pl.disabled(model):
            assert_close(model(x), base(x), **EXACT)
        with pl.merged(model):
            assert_close(model(x), expected, **EXACT)
        pl.detach(model)
        assert_bits(model.state_dict(), norm.state_dict())
        assert all(parameter.requires_grad for parameter in model.parameters())
        parametrize.remove_parametrizations(model[0], "weight")
        assert_close(model.state_dict(), base.state_dict(), **EXACT)
        assert type(model[0]) is nn.Linear

    def test_spectral_norm_after(self) -> None:
        """A spectral_norm from after norms W' where adapters are on, and W where they are off."""
        model, _ = normed(lambda layer: layer)
        base = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2, alpha=3), "0")
        shake(model)
        adapted = model[0].weight.detach().clone()
        # Enough steps of the power iteration to find σ.
        spectral_norm(model[0], n_power_iterations=500)
        assert_close(model[0].weight, adapted / torch.linalg.matrix_norm(adapted, 2), **EXACT)
        with pl.merged(model):
            assert_close(model[0].weight, adapted / torch.linalg.matrix_norm(adapted, 2), **EXACT)
        model.train()  # the iteration runs in training
        with pl.disabled(model):
            W = base[0].weight
            assert_close(model[0].weight, W / torch.linalg.matrix_norm(W, 2), **EXACT)
        pl.detach(model)
        assert_close(model.eval()[0].weight, norm_by_hand(model), **EXACT)
        assert_bits(model[0].parametrizations.weight.original, base[0].weight)
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize(
        "old",
        [
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            lambda layer: prune.l1_unstructured(layer, "weight", 3),
        ],
        ids=["weight_norm", "spectral_norm", "prune"],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_hook_based(self, old: Callable[..., nn.Module]) -> None:
        """A weight that a hook computes, as in the old functions, is refused, and not passed over.

        The layers beside it can be adapted, and so can what the hook computes it from.
        """
        model, x = normed(old)
        before = model(x)
        for targets in (nn.Linear, "*.weight", "0", lambda path, module: path == "0"):
            refused = pytest.raises(pl.TargetError, match=r"cannot adapt '0\.weight': a hook")
            with unchanged(model), refused:
                pl.attach(model, pl.LoRA(rank=2), targets)
        with unchanged(model):
            assert [row.site for row in pl.attach(model, pl.LoRA(), exclude="0").sites] == [
                "2.weight"
            ]
            pl.detach(model)
        source = next(
            key for key, p in model[0].named_parameters() if p.dim() == 2 and p.shape[1] > 1
        )
        with unchanged(model[2]):
            pl.attach(model, pl.LoRA(rank=2, alpha=3), f"0.{source}")
            assert_bits(model(x), before)
            stored = model[0].get_parameter(f"parametrizations.{source}.original").detach().clone()
            shake(model)
            A, B = pl.state_dict(model).values()
            assert_close(getattr(model[0], source), stored + 1.5 * B @ A, **EXACT)
            assert not torch.allclose(model(x), before)
            pl.detach(model)
        assert_bits(model(x), before)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_hook_based_after(self) -> None:
        """torch's own old weight_norm takes no parametrized weight; the model is as it was."""
        model, _ = normed(lambda layer: layer)
        pl.attach(model, pl.LoRA(rank=2))
        with unchanged(model), pytest.raises(KeyError, match="weight"):
            nn.utils.weight_norm(model[0])


class Tied(nn.Module):
    """A model whose head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


TIED = Host(Tied, lambda: (torch.randint(11, (4, 3)),))


class TestTied:
    """What holds where an embedding and a head share a weight; see also invariant 8."""

    @pytest.mark.parametrize("merged", [False, True])
    def test_copied_and_cast(self, merged: bool) -> None:
        """Copied, cast and moved, both sides still share one stored weight and one adapter."""
        case = Case.of(TIED)
        case.attach(KINDS["lora"], targets="embed", strength=0.7)
        if merged:
            pl.merge(case.model)
        for model in (copy.deepcopy(case.model), case.model):
            model.float().double()
            lists = [layer.parametrizations.weight for layer in (model.embed, model.head)]
            assert lists[0].original is lists[1].original
            assert lists[0][0] is lists[1][0]
            shake(model)
            pl.unmerge(model)
            assert_bits(model.embed.weight, model.head.weight)
            pl.detach(model)
            assert model.embed.weight is model.head.weight

    def test_saved(self, tmp_path: Path) -> None:
        """One adapter is counted and saved, and loads onto both sides of another tied model."""
        case = Case.of(TIED)
        rows = pl.attach(case.model, pl.LoRA(rank=2), ["head", "embed"], name="one").sites
        assert [row.site for row in rows] == ["embed.weight"]
        assert len(pl.parameters(case.model)) == 2
        shake(case.model)
        pl.save(case.model, tmp_path / "tied.safetensors", "one")
        pl.load(case.plain, tmp_path / "tied.safetensors")
        assert_bits(outputs(case, case.plain), outputs(case))
        assert pl.base_state_dict(case.plain).keys() == Tied().state_dict().keys()

    def test_untied(self) -> None:
        """torch's `to_empty` unties; a merge, which would reach one side only, is then refused."""
        model = Tied().to("meta")
        assert model.to_empty(device="cpu").head.weight is not model.embed.weight
        model.head.weight = model.embed.weight
        pl.attach(model, pl.LoRA(rank=2), "embed")
        model.to("meta").to_empty(device="cpu")
        refused = pytest.raises(
            pl.StateError, match=r"'head\.weight' and 'embed\.weight' were tied"
        )
        with unchanged(model), refused:
            pl.merge(model)
        pl.detach(model)
        assert type(model.head) is nn.Linear


HALVES = [torch.bfloat16, torch.float16]


class TestDtypes:
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """In a half-precision model factors are float32, W' is rounded once, and both train."""
        case = case_of(MLP, dtype=dtype)
        assert {p.dtype for p in pl.parameters(case.model)} == {torch.float32}
        A, B = (pl.state_dict(case.model, "one")[f"0.weight.{f}"].double() for f in "AB")
        exact = case.plain[0].weight.double() + 0.7 * 1.5 * B @ A
        # Beside the one rounding to half there are those of float32, 2⁻¹³ of it and less.
        rounding = 1.01 * torch.finfo(dtype).eps / 2
        assert_close(case.model[0].weight.double(), exact, rtol=rounding, atol=1e-7)
        assert case.model[0].weight.dtype == dtype
        (out,) = outputs(case)
        assert out.dtype == dtype
        (plain,) = outputs(case, written_out(case))
        expected = case.expected("one").outputs
        assert error([out], expected) <= 2 * error([plain], expected)

        before = factors(case.model)
        loss(floats(case.model(*case.inputs))).backward()
        torch.optim.SGD(pl.parameters(case.model), lr=1e-4).step()
        steps = [p.grad * 1e-4 for p in pl.parameters(case.model)]
        expected_factors = [one - step for one, step in zip(before, steps, strict=True)]
        assert_close(factors(case.model), expected_factors)

    @pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
    def test_cast(self, dtype: torch.dtype, merged: bool) -> None:
        """Cast while attached or merged, all is cast, the base's kept bits as well."""
        case = case_of(MLP)
        state = pl.state_dict(case.model, "one")
        expected = {key: value.to(dtype) for key, value in state.items()}
        if merged:
            pl.merge(case.model)
        case.model.to(dtype)
        x = case.inputs[0].to(dtype)
        with torch.no_grad():
            out = case.model(x)
        assert out.dtype == dtype
        wanted = case.expected("one").outputs
        assert error([out], wanted) <= 16 * torch.finfo(dtype).eps
        pl.unmerge(case.model)
        assert_bits(pl.state_dict(case.model, "one"), expected)
        case.plain.to(dtype)
        assert_bits(dict(pl.base_state_dict(case.model)), dict(case.plain.state_dict()))
        pl.disable(case.model)
        with torch.no_grad():
            assert_bits(case.model(x), case.plain(x))
        pl.detach(case.model)
        assert_bits(dict(case.model.state_dict()), dict(case.plain.state_dict()))

    def test_mixed(self, tmp_path: Path) -> None:
        """Layers of several dtypes and devices in a model each have factors of their own kind."""
        torch.manual_seed(0)
        kinds: list[tuple[torch.dtype, str]] = [
            (torch.float32, "cpu"),
            (torch.float64, "cpu"),
            (torch.bfloat16, "cpu"),
            (torch.float32, "meta"),
        ]
        model = nn.ModuleList(nn.Linear(4, 3, dtype=d, device=where) for d, where in kinds)
        plain = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2))
        shake(model)
        found = [(p.dtype, p.device.type) for p in pl.parameters(model)[::2]]
        wide = [torch.promote_types(dtype, torch.float32) for dtype, _ in kinds]
        assert found == list(zip(wide, ["cpu", "cpu", "cpu", "meta"], strict=True))
        x = torch.randn(5, 4, dtype=torch.float64)
        state = pl.state_dict(model)
        for i, (dtype, where) in enumerate(kinds):
            out = model[i](x.to(where, dtype))
            assert (out.dtype, out.device.type) == (dtype, where)
            if where == "cpu":
                A, B = (state[f"{i}.weight.{f}"].double() for f in "AB")
                weight = plain[i].weight.double() + B @ A
                expected = F.linear(x, weight, plain[i].bias.double())
                assert error([out], [expected]) <= 4 * torch.finfo(dtype).eps
        pl.merge(model)
        assert [layer.weight.dtype for layer in model] == [dtype for dtype, _ in kinds]
        pl.unmerge(model)

        held = model[:3]
        pl.save(held, tmp_path / "mixed.safetensors")
        pl.detach(model)
        pl.load(held, tmp_path / "mixed.safetensors")
        assert_bits(pl.state_dict(held), {key: state[key] for key in pl.state_dict(held)})


META = [MLP, *(n for n in HOSTS if n in ("embedding", "bag_sum", "conv2d", "conv_transpose1d"))]
META += ["lstm", "gru", "attention", "encoder_layer", "bilinear", "bare_3d", "batch_norm"]


class TestMeta:
    @pytest.mark.parametrize("host", META, ids=host_name)
    def test_shapes(self, host: str | Host) -> None:
        """A model on the meta device gets adapters, draws nothing, and gives the right shapes."""
        case = Case.of(HOSTS[host] if isinstance(host, str) else host)
        expected = [out.shape for out in outputs(case)]
        model, kind = case.plain.to("meta"), KINDS["delta" if host == "batch_norm" else "lora"]
        state = torch.get_rng_state()
        pl.attach(model, kind.spec, case.sites(kind))
        assert_bits(torch.get_rng_state(), state)
        case.inputs = tuple(x.to("meta") for x in case.inputs)
        for context in (pl.enabled, pl.disabled, pl.merged):
            if context is not pl.merged:
                assert all(p.is_meta for p in model.parameters())
            with context(model):
                found = outputs(case, model)
            assert all(out.is_meta for out in found)
            assert [out.shape for out in found] == expected
        loss(floats(model(*case.inputs))).backward()
        assert all(p.grad.shape == p.shape for p in pl.parameters(model))
        pl.detach(model)

    @pytest.mark.parametrize("merged", [False, True])
    def test_materialised(self, merged: bool, tmp_path: Path) -> None:
        """`to_empty`, `load_base_state_dict` and `load` make of it the model that was saved."""
        case = case_of(MLP)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        model = copy.deepcopy(case.plain).to("meta")
        pl.attach(model, pl.LoRA(rank=2, alpha=3), "*weight", name="one")
        if merged:
            pl.merge(model)
        model.to_empty(device="cpu")
        pl.unmerge(model)
        pl.load_base_state_dict(model, case.plain.state_dict())
        pl.load(model, tmp_path / "one.safetensors")
        assert pl.fingerprint(model) == pl.fingerprint(case.plain)
        assert_bits(outputs(case, model), outputs(case))
        assert_close(outputs(case, model), case.expected("one").outputs, **EXACT)
        pl.detach(model)
        assert_bits(outputs(case, model), outputs(case, case.plain))

    def test_what_needs_bytes(self, tmp_path: Path) -> None:
        """A digest and a file of tensors without bytes are refused, and no file is left."""
        model = MLP.make().to("meta")
        pl.attach(model, pl.LoRA(rank=2))
        with pytest.raises(ValueError, match=r"'0\.bias' is on the meta device"):
            pl.fingerprint(model)
        with pytest.raises(
            pl.StateError, match=r"'0\.weight\.A' is on the meta device and holds no"
        ):
            pl.save(model, tmp_path / "one.safetensors")
        assert not list(tmp_path.iterdir())


class TestOptimizer:
    @pytest.mark.parametrize(
        "host", [MLP, "lstm", "attention", "conv2d_groups", "encoder_layer"], ids=host_name
    )
    def test_of_the_base(self, host: str | Host) -> None:
        """An optimizer from before attach, and its state, go on after detach as if nothing was."""
        case = Case.of(HOSTS[host] if isinstance(host, str) else host)
        twin = copy.deepcopy(case.model)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            loss(floats(model(*case.inputs))).backward()
            optimizer.step()

        ours = torch.optim.Adam(case.model.parameters(), lr=0.01)
        theirs = torch.optim.Adam(twin.parameters(), lr=0.01)
        for _ in range(2):
            step(case.model, ours)
            step(twin, theirs)
        before = [id(p) for p in case.model.parameters()]
        case.attach(KINDS["lora"])
        step(case.model, torch.optim.Adam(pl.parameters(case.model), lr=0.01))
        pl.merge(case.model)
        pl.unmerge(case.model)
        pl.detach(case.model)
        assert [id(p) for p in case.model.parameters()] == before

        step(case.model, ours)
        step(twin, theirs)
        assert_bits(dict(case.model.state_dict()), dict(twin.state_dict()))
        # Loaded by a new one, each moment comes to its own parameter: shapes alone could not tell.
        again = torch.optim.Adam(case.model.parameters(), lr=0.01)
        again.load_state_dict(copy.deepcopy(theirs.state_dict()))
        step(case.model, again)
        step(twin, theirs)
        assert_bits(dict(case.model.state_dict()), dict(twin.state_dict()))

    def test_of_the_base_while_attached(self) -> None:
        """Loaded or stepped while attached, it does not touch what is frozen."""
        case = Case.of(MLP)
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
        digest = pl.fingerprint(case.model)
        case.attach(KINDS["lora"])
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert pl.fingerprint(case.model) == digest

    def test_of_the_factors(self, tmp_path: Path) -> None:
        """Training goes on bit for bit from a saved adapter and its optimizer's state."""
        case = case_of("encoder_layer")
        pl.scale(case.model, 1.0)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                loss(floats(model(*case.inputs))).backward()
                optimizer.step()

        optimizer = torch.optim.Adam(pl.parameters(case.model), lr=0.01)
        train(case.model, optimizer)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        saved = copy.deepcopy(optimizer.state_dict())

        pl.load(case.plain, tmp_path / "one.safetensors")
        again = torch.optim.Adam(pl.parameters(case.plain), lr=0.01)
        again.load_state_dict(saved)
        train(case.model, optimizer)
        train(case.plain, again)
        assert_bits(pl.state_dict(case.plain, "one"), pl.state_dict(case.model, "one"))

    def test_of_one_adapter_among_others(self) -> None:
        """Detaching one adapter leaves the factors of another to the optimizer that holds them."""
        case = case_of(MLP)
        case.attach(KINDS["lora_stabilized"], "two")
        optimizer = torch.optim.Adam(pl.parameters(case.model, "two"), lr=0.01)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        pl.detach(case.model, "one")
        assert [id(p) for p in pl.parameters(case.model)] == held
        before = factors(case.model)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        assert all(not torch.equal(*pair) for pair in zip(factors(case.model), before, strict=True))
