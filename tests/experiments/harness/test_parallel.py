"""A study trained by two CPU processes has the factors and rows of one process."""

import gc
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import paramlora as pl
from experiments.digits.model import DigitNet
from experiments.harness.batches import Batches, seeded_order
from experiments.harness.parallel import Group, group, shared, spread
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError, replace
from experiments.harness.train import cross_entropy
from experiments.harness.train import train as train_study
from experiments.text.context import TextContext, prepare_context
from experiments.text.data import load_corpus
from experiments.text.models import prepare as prepare_model
from experiments.text.settings import TextSettings
from experiments.text.training import fine_tune
from paramlora.stack.storage import whole
from tests.support import tiny_text
from tests.support.processes import (
    WORLD,
    Results,
    draw,
    forked,
    needs_sharding,
    run,
    shared_folder,
    start,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
HAS_TRANSFORMERS = find_spec("transformers") is not None
CAN_SHARD = not needs_sharding.args[0]
HOW = ["ddp", pytest.param("fsdp", marks=needs_sharding)]


def tiny_context(folder: Path, how: str, group: Group) -> TextContext:
    settings = replace(
        TextSettings(),
        model=str(folder / "bert"),
        data_dir=str(folder),
        tokens=str(folder / "tokens"),
        targets="*.query,*.dense",
        methods="lora",
        alpha=2.0,
        lr=1e-3,
        batch=9,
        accumulate=2,
        epochs=1,
        validation=0.3,
        device="cpu",
        parallel="ddp" if how == "alone" else how,
    )
    run = RunDirectory(folder, {}, {}, [])
    return prepare_context(settings, run, load_corpus(settings.dataset), torch.device("cpu"), group)


def text_study(folder: Path, how: str, group: Group) -> dict[str, Any]:
    """Fine-tune as the study does; its batches of 9 cannot be divided evenly."""
    context = tiny_context(folder, how, group)
    model = context.model(0).double()
    prepare_model(model, "lora", context.settings, torch.Generator().manual_seed(0))
    row = fine_tune(context, model, "lora", 0)
    pl.save(model, folder / f"{how}.safetensors", "text")
    scored = context.scored(model, "test")
    factors = [cast(Any, whole(p.detach())) for p in pl.parameters(model)]
    return {"factors": factors, "row": {**row, **scored}}


def text_data_parallel(folder: Path) -> dict[str, Any]:
    return text_study(folder, "ddp", Group(dist.get_rank(), WORLD))


def text_sharded(folder: Path) -> dict[str, Any]:
    return text_study(folder, "fsdp", Group(dist.get_rank(), WORLD))


def digit_study(how: str, group: Group) -> dict[str, Any]:
    """Fine-tune the network of the digit study on random images, with its training loop."""
    torch.manual_seed(0)
    model = DigitNet([24, 16], "relu").double()
    pl.attach(model, pl.LoRA(rank=2, alpha=1), generator=torch.Generator().manual_seed(0))
    images, labels = draw(1, 200, 784), torch.arange(200) % 10
    order = seeded_order(200, 60 * 10, torch.Generator().manual_seed(0))
    batches = Batches((images, labels), order, 10)
    parallel = spread(model, how, group, list(model.children()))
    optimizer = torch.optim.Adam(pl.parameters(model), 1e-3)
    losses = train_study(parallel, shared(batches, group), cross_entropy, optimizer)
    total = group.total(losses.clone()) / group.size
    factors = [cast(Any, whole(p.detach())) for p in pl.parameters(model)]
    return {"losses": total, "factors": factors}


def digits_data_parallel(folder: Path) -> dict[str, Any]:
    return digit_study("ddp", Group(dist.get_rank(), WORLD))


def digits_sharded(folder: Path) -> dict[str, Any]:
    return digit_study("fsdp", Group(dist.get_rank(), WORLD))


SCENARIOS = [digits_data_parallel]
if HAS_TRANSFORMERS:
    SCENARIOS += [text_data_parallel]
if CAN_SHARD:
    SCENARIOS += [digits_sharded]
if CAN_SHARD and HAS_TRANSFORMERS:
    SCENARIOS += [text_sharded]
FIGURES = ("accuracy", "loss", "validation_accuracy", "steps", "best_step", "train_loss")


def prepare(folder: Path) -> None:
    """Write the checkpoint and the texts of the text study."""
    if HAS_TRANSFORMERS:
        tiny_text.checkpoint(folder / "bert")
        tiny_text.write_jsonl(folder / "train.jsonl", tiny_text.texts(50, 0))
        tiny_text.write_jsonl(folder / "test.jsonl", tiny_text.texts(15, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that the scenarios read and write."""
    return shared_folder(tmp_path_factory, "parallel")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """The results of each scenario in each process."""
    return run(SCENARIOS, folder, prepare)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
def test_text_study(how: str, folder: Path, results: Results) -> None:
    """Two processes, DDP or FSDP2, train the factors of the text study that one process trains.

    The processes get unequal shares of a batch, and each finds the same figures.
    """
    one_process = text_study(folder, "alone", Group())
    expected = one_process["factors"]
    for found in results["text_data_parallel" if how == "ddp" else "text_sharded"]:
        # The loss is computed in float32.
        assert_close(found["factors"], expected, rtol=1e-4, atol=1e-6)
        for key in FIGURES:
            assert found["row"][key] == pytest.approx(one_process["row"][key], rel=1e-4), key
    model = tiny_context(folder, how, Group()).model(0).double()
    pl.load(model, folder / f"{how}.safetensors")
    loaded = [p.detach() for p in pl.parameters(model)]
    assert_close(loaded, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_digit_study(how: str, results: Results) -> None:
    """Two processes, DDP or FSDP2, have the losses and factors of one in the digit study's loop."""
    one_process = digit_study("ddp", Group())
    assert one_process["losses"].shape == (60,)
    for found in results["digits_data_parallel" if how == "ddp" else "digits_sharded"]:
        # The losses are kept in float32.
        assert_close(found["losses"], one_process["losses"], rtol=1e-6, atol=1e-6)
        assert_close(found["factors"], one_process["factors"], rtol=1e-8, atol=1e-10)


def train_and_leave(rank: int, port: int, counts: Any) -> None:
    """Train in a group as torchrun's processes do; store the numbers of threads."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    gc.disable()  # so that only `group` collects the wrapped model
    counts[3 * rank] = len(os.listdir("/proc/self/task"))
    with group(torch.device("cpu")) as (processes, _):
        model = spread(torch.nn.Linear(3, 2), "ddp", processes, [])
        model(torch.ones(1, 3)).sum().backward()
        model.__dict__["itself"] = model  # a reference cycle, as hooks and tracebacks make
        del model
        counts[3 * rank + 1] = len(os.listdir("/proc/self/task"))
    counts[3 * rank + 2] = len(os.listdir("/proc/self/task"))


def test_leaving_the_group_ends_its_threads() -> None:
    """No thread of gloo outlives the group: one that does can abort Python when it exits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counts = forked().Array("i", 3 * WORLD)
    start(train_and_leave, (port, counts))
    for before, inside, after in (counts[:3], counts[3:]):
        assert inside > before
        assert after == before


def test_uneven_batch() -> None:
    """A batch that cannot be divided evenly raises: the mean over unequal shares would be wrong."""
    with pytest.raises(StudyError, match=r"a batch of 3 cannot be divided evenly among 2"):
        next(shared([(torch.zeros(3, 1),)], Group(0, 2)))
