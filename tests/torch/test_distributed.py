"""Data parallel and sharded training of adapters on two CPU processes is that of one process.

Each process gets every other row of a batch, so the mean of their losses, and of their gradients,
is that of the whole batch. A scenario runs in both processes and leaves in a file what it found;
what is expected comes from a plain dense model, in the one process of the test.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import paramlora as pl
from tests.support.processes import STEPS, WORLD, drawn, run

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


# Half a million times the rounding of one operation at most: sums of some ten terms in float64.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
Factors = list[Tensor]
# Which adapters are on in each step.
ALWAYS, IN_TURN = [("one",)] * STEPS, [("one",), ("two",)] * (STEPS // 2)


def base() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model.load_state_dict(
        {k: drawn(i, *v.shape) for i, (k, v) in enumerate(model.state_dict().items())}
    )
    return model


def adapted() -> nn.Sequential:
    model = base()
    for i, name in enumerate(("one", "two")):
        pl.attach(model, pl.LoRA(rank=2, alpha=3), name=name)
        state = pl.state_dict(model, name)
        state = {
            key: drawn(10 * i + j, *value.shape) / 2 for j, (key, value) in enumerate(state.items())
        }
        pl.load_state_dict(model, state, name)
    return model


def factors_of(model: nn.Module) -> dict[str, Factors]:
    return {
        name: [p.detach().clone() for p in pl.parameters(model, name)] for name in ("one", "two")
    }


def dense(x: Tensor, *active: Factors) -> Tensor:
    """Return what the plain model computes with W + s·BA written out; s = 3/2."""
    plain = base()
    first, second = plain[0].weight, plain[2].weight
    for A, B, A2, B2 in active:
        first, second = first + 1.5 * B @ A, second + 1.5 * B2 @ A2
    return F.linear(F.linear(x, first, plain[0].bias).tanh(), second, plain[2].bias)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return drawn(100 + step, 8, 6), drawn(200 + step, 8, 3)


def trained_alone(plan: list[tuple[str, ...]]) -> tuple[list[Tensor], dict[str, Factors]]:
    """Return the losses, and the factors in the end, of training the dense model in one process."""
    factors = factors_of(adapted())
    leaves = [factor.requires_grad_() for own in factors.values() for factor in own]
    optimizer, losses = torch.optim.Adam(leaves, lr=0.1), []
    for step, active in enumerate(plan):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = (dense(x, *(factors[name] for name in active)) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: [f.detach() for f in own] for name, own in factors.items()}


def train(model: nn.Module, plan: list[tuple[str, ...]]) -> list[Tensor]:
    """Train on this process's rows; return the losses, each the mean over the processes."""
    optimizer, losses = torch.optim.Adam(pl.parameters(model), lr=0.1), []
    for step, active in enumerate(plan):
        x, y = (tensor[dist.get_rank() :: WORLD] for tensor in batch(step))
        optimizer.zero_grad()
        with pl.using(model, *active):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / WORLD)
    return losses


def counting(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients as DDP does, and take down how many bytes that sends."""
    buffer = bucket.buffer()
    sent.append(buffer.numel() * buffer.element_size())
    work = dist.all_reduce(buffer.div_(WORLD), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def data_parallel(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, plan in (("always", ALWAYS), ("in turn", IN_TURN)):
        # What is off gets no gradient: DDP has to be told that this can be.
        model = DistributedDataParallel(adapted(), find_unused_parameters=True)
        sent: list[int] = []
        model.register_comm_hook(sent, counting)
        found[key] = train(model, plan), factors_of(model)
        found[f"bytes {key}"] = sum(sent)
    x, _ = batch(0)
    found["digest"] = pl.fingerprint(model.module)
    with torch.no_grad():
        found["on"] = model(x)
        with pl.merged(model):
            found["merged"] = model(x)
        with pl.disabled(model):
            found["off"] = model(x)
        pl.detach(model)
        found["detached"] = model(x)
    return found


def sharded(folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = adapted()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    losses, whole = train(model, ALWAYS), {}
    for name in ("one", "two"):
        shards: list[Any] = list(pl.parameters(model, name))
        whole[name] = [shard.detach().full_tensor() for shard in shards]
    found: dict[str, Any] = {"always": (losses, whole)}
    found["types"] = {type(p).__name__ for p in pl.parameters(model)}
    found["digest"] = pl.fingerprint(model)
    pl.save(model, folder / "one.safetensors", "one")
    x, _ = batch(0)
    with torch.no_grad():
        found["on"] = model(x)
        with pl.disabled(model):
            found["off"] = model(x)
        with pl.using(model, one=0.5):
            found["half"] = model(x)
    found["refused"] = []
    for verb in (
        pl.merge,
        pl.bake,
        pl.detach,
        lambda m: pl.attach(m, pl.LoRA(), "0", name="three"),
    ):
        try:
            verb(model)
        except pl.ParamloraError as error:
            found["refused"].append(str(error))
    with torch.no_grad():
        found["after"] = model(x)
    return found


def gathered(folder: Path) -> dict[str, Any]:
    """The root alone is sharded: after a forward without gradients FSDP leaves copies in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, _ = batch(0)
    model, other = adapted(), adapted()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    found: dict[str, Any] = {"refused": []}

    def refused(verb: Callable[[], object]) -> None:
        forward()
        try:
            verb()
        except pl.ParamloraError as error:
            found["refused"].append(str(error))

    state = {
        key: drawn(7 + i, *t.shape)
        for i, (key, t) in enumerate(pl.state_dict(other, "one").items())
    }
    part = {key[2:]: tensor for key, tensor in state.items() if key[0] == "0"}
    refused(lambda: pl.merge(model))
    refused(lambda: pl.bake(model))
    refused(lambda: pl.detach(model))
    refused(lambda: pl.attach(model, pl.LoRA(), "0", name="three"))
    refused(lambda: pl.load_state_dict(model[0], part, "one"))
    forward()
    found["parts"] = {type(p).__name__ for p in pl.parameters(model)}
    forward()
    pl.save(model, folder / "before.safetensors", "one")
    forward()
    pl.load_state_dict(model, state, "one")
    # Training puts the copies back: a write into them would be lost by now.
    found["loss"] = train(model, [("one", "two")])[0]
    pl.load_state_dict(model, state, "one")
    found["on"] = forward()
    base_state = {key: value + 1 for key, value in base().state_dict().items()}
    pl.load_base_state_dict(model, base_state)
    found["other base"] = forward()
    dist.barrier()  # until the first process has written the file
    pl.load(model, folder / "before.safetensors")
    found["one"] = [cast(Any, p).detach().full_tensor() for p in pl.parameters(model, "one")]
    return found


KINDS = [pl.DoRA(2), pl.Delta(), pl.LoRA(2, init="pissa"), pl.LoRA(2, init="olora")]


def of_kind(spec: pl.kinds.Spec) -> nn.Sequential:
    model = base()
    pl.attach(model, spec, name="one", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, factor in enumerate(pl.parameters(model)):
            factor.add_(drawn(i, *factor.shape), alpha=0.1)
    return model


def kinds(folder: Path) -> dict[str, Any]:
    """Sharded, every kind's outputs, gradients, and outputs after saving, wiping and loading."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, mesh, found = batch(0)[0], init_device_mesh("cpu", (WORLD,)), {}
    for i, spec in enumerate(KINDS):
        model = of_kind(spec)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        y = model(x)
        y.square().sum().backward()
        grads = [cast(Any, p.grad).full_tensor() for p in pl.parameters(model)]
        pl.save(model, folder / f"{i}.safetensors", "one")
        dist.barrier()
        with torch.no_grad():
            for parameter in pl.parameters(model):
                parameter.zero_()
            pl.load(model, folder / f"{i}.safetensors")
            found[repr(spec)] = y.detach(), grads, model(x)
    return found


@pytest.mark.slow
def test_data_parallel(tmp_path: Path) -> None:
    """With DistributedDataParallel losses and factors are those of one process on whole batches.

    Also where two adapters are trained in turn; and afterwards the verbs act on what DDP wraps.
    What is sent in a step are the factors' gradients, and nothing of the base.
    """
    size = sum(factor.nbytes for factors in factors_of(adapted()).values() for factor in factors)
    for found in run(data_parallel, tmp_path):
        for key, plan in (("always", ALWAYS), ("in turn", IN_TURN)):
            assert_close(tuple(found[key]), trained_alone(plan), **EXACT)
            assert found[f"bytes {key}"] == STEPS * size
        x, _ = batch(0)
        _, factors = trained_alone(IN_TURN)
        expected = dense(x, *factors.values()).detach()
        assert_close([found["on"], found["merged"]], [expected] * 2, **EXACT)
        plain = dense(x).detach()
        assert_close([found["off"], found["detached"]], [plain] * 2, rtol=0, atol=0)
        assert found["digest"] == pl.fingerprint(base())


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)
def test_sharded(tmp_path: Path) -> None:
    """With fully_shard after attach losses and factors are those of one process.

    Toggling, scaling, saving and the digest work on the shards; what would have to write behind
    FSDP's back is refused, and nothing is changed by that.
    """
    for found in run(sharded, tmp_path):
        assert found["types"] == {"DTensor"}
        losses, factors = trained_alone(ALWAYS)
        assert_close(tuple(found["always"]), (losses, factors), **EXACT)
        x, _ = batch(0)
        expected = dense(x, *factors.values()).detach()
        assert_close([found["on"], found["after"]], [expected] * 2, **EXACT)
        assert_close(found["off"], dense(x).detach(), **EXACT)
        A, B, A2, B2 = factors["one"]
        assert_close(found["half"], dense(x, [A, B / 2, A2, B2 / 2]).detach(), **EXACT)
        assert found["digest"] == pl.fingerprint(base())
        assert len(found["refused"]) == 4
        assert all("'0.weight'" in message and "shard" in message for message in found["refused"])
    model = base()
    pl.load(model, tmp_path / "one.safetensors")
    assert_close([p.detach() for p in pl.parameters(model)], factors["one"], **EXACT)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)
def test_gathered(tmp_path: Path) -> None:
    """What FSDP has gathered for a forward is never written to, where the write would be lost.

    Whole factors, whole bases and files are loaded into the parts; a file is written once, by the
    first process; what cannot be done is refused.
    """
    x, _ = batch(0)
    other = adapted()
    before = [p.detach().clone() for p in pl.parameters(other, "one")]
    state = {
        key: drawn(7 + i, *t.shape)
        for i, (key, t) in enumerate(pl.state_dict(other, "one").items())
    }
    pl.load_state_dict(other, state, "one")
    with torch.no_grad():
        on = other(x)
        loss = (on - batch(0)[1]).square().mean()
    for found in run(gathered, tmp_path):
        assert len(found["refused"]) == 5
        assert all("shard" in message for message in found["refused"])
        assert found["parts"] == {"DTensor"}
        assert_close(found["loss"], loss, **EXACT)
        assert found["on"].shape == on.shape
        assert_close(found["one"], before, **EXACT)
        assert not torch.equal(found["on"], found["other base"])
    model = base()
    pl.load(model, tmp_path / "before.safetensors")
    assert_close([p.detach() for p in pl.parameters(model)], before, **EXACT)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)
def test_every_kind_sharded(tmp_path: Path) -> None:
    """Every kind of adapter computes, learns, is saved and loaded sharded as it is whole."""
    x, _ = batch(0)
    for found in run(kinds, tmp_path):
        for spec in KINDS:
            model = of_kind(spec)
            y = model(x)
            y.square().sum().backward()
            grads = [p.grad for p in pl.parameters(model)]
            expected = y.detach()
            assert_close(found[repr(spec)], (expected, grads, expected), **EXACT)
