"""AdapterCheckpoint: Lightning's checkpoints with one adapter alone, resuming, the best one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback  # noqa: E402

from paramlora.integrations.lightning import AdapterCheckpoint  # noqa: E402

# Lightning calls what torch has deprecated, and warns of the folders of checkpoints.
pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:(The dirpath has changed|Checkpoint directory):UserWarning:lightning"
    ),
]
BATCHES: Any = torch.linspace(-1, 1, 64).view(2, 4, 8)  # two batches of four rows


class Digits(lightning.LightningModule):  # type: ignore[name-defined]
    """A module that trains an adapter, and logs a metric that is best, lowest, at first."""

    def __init__(self, names: tuple[str, ...] = ("digits",)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.0), nn.Linear(4, 2))
        for name in names:
            pl.attach(self.model, pl.LoRA(rank=2), name=name)
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = (self.model(batch) - 3).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("grows", -(self.model(batch) - 3).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(pl.parameters(self.model, "digits"), lr=1e-1)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    callback = AdapterCheckpoint(
        folder, "{epoch}", monitor="grows", save_top_k=-1, save_last=True, **options
    )
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("weights_only", [False, True])
def test_resuming(tmp_path: Path, weights_only: bool) -> None:
    """Checkpoints have the adapter alone; a resumed run has the losses of an uninterrupted one."""
    through = Digits()
    trainer(tmp_path, 2, save_weights_only=weights_only).fit(through, BATCHES, BATCHES)
    for file in tmp_path.glob("*.ckpt"):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert saved.keys() == pl.state_dict(through).keys()
    assert through.state_dict().keys() > {"model.0.bias", "model.2.bias"}  # the whole module again
    if weights_only:
        return
    resumed = Digits()
    run = trainer(tmp_path / "resumed", 2)
    run.fit(resumed, BATCHES, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == through.losses[2:]
    expected = pl.state_dict(through)
    assert all(torch.equal(expected[key], f) for key, f in pl.state_dict(resumed).items())


def test_best_model(tmp_path: Path) -> None:
    """ckpt_path="best" reloads the best adapter, and leaves another adapter alone."""
    module = Digits(("other", "digits"))
    run = trainer(tmp_path, 3, adapter="digits")
    run.fit(module, BATCHES, BATCHES)
    best = run.checkpoint_callback.best_model_path
    saved = torch.load(best, weights_only=True)["state_dict"]
    with torch.no_grad():
        for factor in pl.parameters(module):
            factor.fill_(9.0)
    run.validate(module, BATCHES, ckpt_path="best", verbose=False)
    assert all(torch.equal(saved[k], f) for k, f in pl.state_dict(module, "digits").items())
    assert all((factor == 9).all() for factor in pl.parameters(module, "other"))


def test_refusals(tmp_path: Path) -> None:
    """It refuses to train what it would not save, and checkpoints of the whole module."""
    module = Digits()
    module.model[0].bias.requires_grad_()
    with pytest.raises(pl.StateError, match=r"'digits' would lack model\.0\.bias.*; freeze them"):
        trainer(tmp_path, 1).fit(module, BATCHES, BATCHES)
    plain = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    plain.strategy.connect(Digits())
    plain.save_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    with pytest.raises(pl.CheckpointError, match=r"model\.0\.bias"):
        trainer(tmp_path, 1).validate(Digits(), BATCHES, ckpt_path=tmp_path / "whole.ckpt")


def test_an_exception_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    """After an exception the state dict is the whole module's, and the run can be resumed."""
    module = Digits()
    keys = module.state_dict().keys()
    run = trainer(tmp_path, 2)

    class Stop(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("stop")

    run.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(module, BATCHES, BATCHES)
    assert module.state_dict().keys() == keys
    trainer(tmp_path / "again", 2).fit(
        module, BATCHES, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert len(module.losses) == 4


def test_two_callbacks(tmp_path: Path) -> None:
    """Two callbacks for one adapter resume; two for different adapters are refused."""
    module, more = (
        Digits(("other", "digits")),
        AdapterCheckpoint(tmp_path / "more", adapter="digits"),
    )
    run = trainer(tmp_path, 1, adapter="digits")
    run.callbacks.append(more)
    run.fit(module, BATCHES, BATCHES)
    again = trainer(tmp_path / "again", 2, adapter="digits")
    again.callbacks.append(AdapterCheckpoint(tmp_path / "third", adapter="digits"))
    again.fit(module, BATCHES, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    again.callbacks.append(AdapterCheckpoint(tmp_path / "fourth", adapter="other"))
    with pytest.raises(ValueError, match="name 'digits' and 'other'"):
        again.fit(module, BATCHES, BATCHES)
