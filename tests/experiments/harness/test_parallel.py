"""The studies trained by two CPU processes find what one process finds."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import paramlora as pl
from experiments.digits.model import DigitNet
from experiments.harness.parallel import Group, shared, spread
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError
from experiments.harness.train import Batches, cross_entropy, seeded_order
from experiments.harness.train import train as train_study
from experiments.text.bench import TextBench, prepare_bench
from experiments.text.data import load_corpus
from experiments.text.models import prepare as prepare_model
from experiments.text.settings import TextSettings
from paramlora.site.storage import whole
from tests.support import tiny_text
from tests.support.processes import WORLD, drawn, run

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def tiny_bench(folder: Path, how: str, group: Group) -> TextBench:
    settings = TextSettings(
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
    return prepare_bench(settings, run, load_corpus(settings), torch.device("cpu"), group)


def text_study(folder: Path, how: str, group: Group) -> dict[str, Any]:
    """Fine-tune in the study's own way; batches of 9 in two parts cannot be shared out evenly."""
    bench = tiny_bench(folder, how, group)
    model = bench.model(0).double()
    prepare_model(model, "lora", bench.settings, torch.Generator().manual_seed(0))
    row = bench.fine_tune(model, pl.parameters(model), "lora", 0)
    pl.save(model, folder / f"{how}.safetensors", "text")
    scored = bench.scored(model, "test")
    factors = [cast(Any, whole(p.detach())) for p in pl.parameters(model)]
    return {"factors": factors, "row": {**row, **scored}}


def text_data_parallel(folder: Path) -> dict[str, Any]:
    return text_study(folder, "ddp", Group(dist.get_rank(), WORLD))


def text_sharded(folder: Path) -> dict[str, Any]:
    return text_study(folder, "fsdp", Group(dist.get_rank(), WORLD))


def digit_study(how: str, group: Group) -> dict[str, Any]:
    """Fine-tune the digit study's network on drawn images, through its loop and its batches."""
    torch.manual_seed(0)
    model = DigitNet([24, 16], "relu").double()
    pl.attach(model, pl.LoRA(rank=2, alpha=1), generator=torch.Generator().manual_seed(0))
    images, labels = drawn(1, 200, 784), torch.arange(200) % 10
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


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)
def test_text_study(tmp_path: Path) -> None:
    """The text study by two processes, DDP and FSDP2, trains the factors that one alone trains.

    Its batches are shared out unevenly and in parts; every process finds the same figures.
    """
    pytest.importorskip("transformers", reason="transformers is not installed")
    tiny_text.checkpoint(tmp_path / "bert")
    tiny_text.write_jsonl(tmp_path / "train.jsonl", tiny_text.texts(50, 0))
    tiny_text.write_jsonl(tmp_path / "test.jsonl", tiny_text.texts(15, 1))
    alone = text_study(tmp_path, "alone", Group())
    for how, scenario in (("ddp", text_data_parallel), ("fsdp", text_sharded)):
        for found in run(scenario, tmp_path):
            # The loss is computed in float32.
            assert_close(found["factors"], alone["factors"], rtol=1e-4, atol=1e-6)
            for key in (
                "accuracy",
                "loss",
                "validation_accuracy",
                "steps",
                "best_step",
                "train_loss",
            ):
                assert found["row"][key] == pytest.approx(alone["row"][key], rel=1e-4), key
        model = tiny_bench(tmp_path, how, Group()).model(0).double()
        pl.load(model, tmp_path / f"{how}.safetensors")
        loaded = [p.detach() for p in pl.parameters(model)]
        assert_close(loaded, alone["factors"], rtol=1e-4, atol=1e-6)
        (tmp_path / "meet").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)
def test_digit_study(tmp_path: Path) -> None:
    """The digit study's loop by two processes, DDP and FSDP2, gives one's losses and factors."""
    alone = digit_study("ddp", Group())
    assert alone["losses"].shape == (60,)
    for scenario in (digits_data_parallel, digits_sharded):
        for found in run(scenario, tmp_path):
            assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)  # kept in float32
            assert_close(found["factors"], alone["factors"], rtol=1e-8, atol=1e-10)
        (tmp_path / "meet").unlink(missing_ok=True)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    """Means over unequal shares would be wrong: such a batch is refused, with what to do."""
    with pytest.raises(StudyError, match=r"a batch of 3 cannot be shared out evenly to 2"):
        next(shared([(torch.zeros(3, 1),)], Group(0, 2)))
