"""Adapters trained by two CPU processes, data parallel or sharded, equal those of one process.

Each process gets every other row of a batch, so the mean of their losses, and of their gradients,
is that of the whole batch. The expected values come from a plain dense model in the test's own
process.
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
from tests.support.helpers import EXACT
from tests.support.processes import WORLD, Results, draw, needs_sharding, run, shared_folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

Factors = list[Tensor]
STEPS = 4
# The active adapters in each step.
ALWAYS, IN_TURN = [("one",)] * STEPS, [("one",), ("two",)] * (STEPS // 2)


def base() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model.load_state_dict(
        {k: draw(i, *v.shape) for i, (k, v) in enumerate(model.state_dict().items())}
    )
    return model


def adapted() -> nn.Sequential:
    model = base()
    for i, name in enumerate(("one", "two")):
        pl.attach(model, pl.LoRA(rank=2, alpha=3), name=name, activate="no")
        state = pl.state_dict(model, name)
        state = {
            key: draw(10 * i + j, *value.shape) / 2 for j, (key, value) in enumerate(state.items())
        }
        pl.load_state_dict(model, state, name)
    pl.enable(model)
    return model


def factors_of(model: nn.Module) -> dict[str, Factors]:
    return {
        name: [p.detach().clone() for p in pl.parameters(model, name)] for name in ("one", "two")
    }


def dense(x: Tensor, *active: Factors) -> Tensor:
    """Return the outputs of the plain model with weights W + s·BA, s = 3/2."""
    plain = base()
    first, second = plain[0].weight, plain[2].weight
    for A, B, A2, B2 in active:
        first, second = first + 1.5 * B @ A, second + 1.5 * B2 @ A2
    return F.linear(F.linear(x, first, plain[0].bias).tanh(), second, plain[2].bias)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(100 + step, 8, 6), draw(200 + step, 8, 3)


def trained_alone(plan: list[tuple[str, ...]]) -> tuple[list[Tensor], dict[str, Factors]]:
    """Return the losses and the final factors of training the dense model in one process."""
    factors = factors_of(adapted())
    leaves = [f.requires_grad_() for adapter in factors.values() for f in adapter]
    optimizer, losses = torch.optim.Adam(leaves, lr=0.1), []
    for step, active in enumerate(plan):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = (dense(x, *(factors[name] for name in active)) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: [f.detach() for f in adapter] for name, adapter in factors.items()}


def train(model: nn.Module, plan: list[tuple[str, ...]]) -> list[Tensor]:
    """Train on the rows of this process; return the losses, averaged over the processes."""
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


def average_and_count(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients as DDP does, and append the number of bytes sent."""
    buffer = bucket.buffer()
    sent.append(buffer.numel() * buffer.element_size())
    work = dist.all_reduce(buffer.div_(WORLD), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def data_parallel(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, plan in (("always", ALWAYS), ("in turn", IN_TURN)):
        # DDP must be told that factors may get no gradient: those of inactive adapters get none.
        model = DistributedDataParallel(adapted(), find_unused_parameters=True)
        sent: list[int] = []
        model.register_comm_hook(sent, average_and_count)
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
    merged = adapted()
    pl.merge(merged)
    fully_shard(merged, mesh=mesh)
    try:
        pl.bake(merged)
    except pl.StateError as error:
        found["refused"].append(str(error))
    return found


def gathered(folder: Path) -> dict[str, Any]:
    """Shard the root module alone, so that FSDP keeps gathered copies after a no_grad forward."""
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
        key: draw(7 + i, *t.shape) for i, (key, t) in enumerate(pl.state_dict(other, "one").items())
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
    # Training drops the gathered copies: a write into them would be lost by now.
    found["loss"] = train(model, [("one", "two")])[0]
    pl.load_state_dict(model, state, "one")
    found["on"] = forward()
    base_state = {key: value + 1 for key, value in base().state_dict().items()}
    pl.load_base_state_dict(model, base_state)
    found["other base"] = forward()
    dist.barrier()  # the first process writes the file
    pl.load(model, folder / "before.safetensors")
    found["one"] = [cast(Any, p).detach().full_tensor() for p in pl.parameters(model, "one")]
    return found


SPECS = [pl.DoRA(2), pl.Delta(), pl.LoRA(2, init="pissa"), pl.LoRA(2, init="olora")]


def of_kind(spec: pl.kinds.Spec) -> nn.Sequential:
    model = base()
    pl.attach(model, spec, name="one", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, factor in enumerate(pl.parameters(model)):
            factor.add_(draw(i, *factor.shape), alpha=0.1)
    return model


def kinds(folder: Path) -> dict[str, Any]:
    """Shard every kind: outputs, gradients, and outputs after saving, zeroing and loading."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, mesh, found = batch(0)[0], init_device_mesh("cpu", (WORLD,)), {}
    for i, spec in enumerate(SPECS):
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


def wrapped(kind: str, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """Return an adapted model with other values for each seed, wrapped, and its optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = adapted()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(draw(seed + i, *parameter.shape))
    if kind == "sharded":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    else:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    return model, torch.optim.Adam(pl.parameters(model), lr=0.1)


def step(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """Train one step; return the outputs after it."""
    x, _ = batch(0)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return model(x)


def checkpoint(kind: str, folder: Path) -> dict[str, Any]:
    """Save a model and its optimizer by torch.distributed.checkpoint, and load them in another."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    model, optimizer = wrapped(kind, 1)
    step(model, optimizer)
    dcp.save(
        dict(zip("mo", states.get_state_dict(model, optimizer), strict=True)),
        checkpoint_id=folder / kind,
    )
    other, its = wrapped(kind, 100)
    loaded = dict(zip("mo", states.get_state_dict(other, its), strict=True))
    dcp.load(loaded, checkpoint_id=folder / kind)
    states.set_state_dict(other, its, model_state_dict=loaded["m"], optim_state_dict=loaded["o"])
    found: dict[str, Any] = {
        "steps": [(step(model, optimizer), step(other, its)) for _ in range(2)]
    }
    full = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found["state"] = states.get_model_state_dict(model, options=full)
    third, _ = wrapped(kind, 200)
    third.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        found["assigned"] = third(batch(0)[0])
    return found


def checkpoints(folder: Path) -> dict[str, Any]:
    return {kind: checkpoint(kind, folder) for kind in KINDS_OF_PARALLEL}


def old_sharding(folder: Path) -> dict[str, Any]:
    """Wrap an adapted model by FSDP1, as a whole and each module by itself; both are refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import always_wrap_policy

    found = {}
    for key, policy in (("whole", None), ("each", always_wrap_policy)):
        for target in ("*.weight", "*.bias"):
            model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            pl.attach(model, pl.Delta(), target)
            try:
                FullyShardedDataParallel(
                    model,
                    auto_wrap_policy=policy,
                    use_orig_params=True,
                    device_id=torch.device("cpu"),
                )
            except pl.StateError as error:
                found[key, target] = str(error)
    return {"refused": found}


SCENARIOS, KINDS_OF_PARALLEL = [data_parallel, checkpoints], ["replicated"]
if not needs_sharding.args[0]:
    SCENARIOS += [sharded, gathered, kinds, old_sharding]
    KINDS_OF_PARALLEL += ["sharded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that the scenarios write."""
    return shared_folder(tmp_path_factory, "distributed")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """The results of each scenario in each process."""
    return run(SCENARIOS, folder)


@pytest.mark.slow
def test_data_parallel(folder: Path, results: Results) -> None:
    """With DistributedDataParallel, losses and factors equal those of one process on whole batches.

    This holds too if two adapters are trained in turn. Each step sends the gradients of the
    factors and nothing else. Afterwards the verbs act on the wrapped model.
    """
    size = sum(factor.nbytes for factors in factors_of(adapted()).values() for factor in factors)
    for found in results["data_parallel"]:
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
@needs_sharding
def test_sharded(folder: Path, results: Results) -> None:
    """With fully_shard after attach, losses and factors equal those of one process.

    Toggling, scaling, saving and `fingerprint` work on the shards. Verbs that write to the stored
    weights raise, and change nothing. So does `bake` if the model was merged before it was sharded.
    """
    for found in results["sharded"]:
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
        assert len(found["refused"]) == 5
        assert all("'0.weight'" in message and "shard" in message for message in found["refused"])
    model = base()
    pl.load(model, folder / "one.safetensors")
    assert_close([p.detach() for p in pl.parameters(model)], factors["one"], **EXACT)


@pytest.mark.slow
@needs_sharding
def test_gathered(folder: Path, results: Results) -> None:
    """Loading and saving use the shards, not the copies that FSDP gathers for a forward.

    A write into such a copy would be lost. Only the first process writes a file. Verbs that write
    to the stored weights raise.
    """
    x, _ = batch(0)
    other = adapted()
    before = [p.detach().clone() for p in pl.parameters(other, "one")]
    state = {
        key: draw(7 + i, *t.shape) for i, (key, t) in enumerate(pl.state_dict(other, "one").items())
    }
    pl.load_state_dict(other, state, "one")
    with torch.no_grad():
        on = other(x)
        loss = (on - batch(0)[1]).square().mean()
    for found in results["gathered"]:
        assert len(found["refused"]) == 5
        assert all("shard" in message for message in found["refused"])
        assert found["parts"] == {"DTensor"}
        assert_close(found["loss"], loss, **EXACT)
        assert found["on"].shape == on.shape
        assert_close(found["one"], before, **EXACT)
        assert not torch.equal(found["on"], found["other base"])
    model = base()
    pl.load(model, folder / "before.safetensors")
    assert_close([p.detach() for p in pl.parameters(model)], before, **EXACT)


@pytest.mark.slow
@needs_sharding
def test_every_kind_sharded(folder: Path, results: Results) -> None:
    """Outputs, gradients and files of sharded adapters equal those of whole ones, for each kind."""
    x, _ = batch(0)
    for found in results["kinds"]:
        for spec in SPECS:
            model = of_kind(spec)
            y = model(x)
            y.square().sum().backward()
            grads = [p.grad for p in pl.parameters(model)]
            expected = y.detach()
            assert_close(found[repr(spec)], (expected, grads, expected), **EXACT)


@pytest.mark.slow
def test_distributed_checkpoints(results: Results) -> None:
    """With DDP or fully_shard, torch.distributed.checkpoint restores base, factors and optimizer.

    The whole state dict has the keys of one process and loads into a model of one process.
    """
    for found in results["checkpoints"]:
        for kind in KINDS_OF_PARALLEL:
            for first, second in found[kind]["steps"]:
                assert_close(second, first, rtol=0, atol=0)
            assert_close(found[kind]["assigned"], first, rtol=0, atol=0)
    for kind in KINDS_OF_PARALLEL:
        found, model = results["checkpoints"][0][kind], adapted()
        state = {key.removeprefix("module."): value for key, value in found["state"].items()}
        model.load_state_dict(state)
        with torch.no_grad():
            assert_close(model(batch(0)[0]), found["assigned"], **EXACT)


@pytest.mark.slow
@needs_sharding
def test_old_sharding(results: Results) -> None:
    """FSDP1 takes parameters out of their modules; on an adapted model it is refused by name."""
    for found in results["old_sharding"]:
        assert len(found["refused"]) == 4
        for (_, target), message in found["refused"].items():
            assert message.startswith(f"{target[2:]!r} of this Linear has adapters")
            assert "shard an adapted model by torch.distributed.fsdp.fully_shard" in message
