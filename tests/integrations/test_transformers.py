"""AdapterTrainer: checkpoints of one adapter, resuming, the best model, other trainers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import unchanged

transformers = pytest.importorskip("transformers")
from paramlora.integrations.transformers import AdapterTrainer  # noqa: E402


class Texts(nn.Module):
    """A model in the form that the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.1)  # so that the random state counts

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.drop(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rescaling(transformers.Trainer):  # type: ignore[name-defined]
    """Another library's trainer, with a method of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class Mixed(AdapterTrainer, Rescaling):
    pass


torch.manual_seed(0)
BASE = Texts()
DATA = [{"input_ids": torch.randint(20, (5,)), "labels": i % 2} for i in range(16)]


def adapted(*names: str) -> Texts:
    """Return the base with an adapter of each name, the last one active and trained."""
    model = copy.deepcopy(BASE)
    for name in names or ("digits",):
        same = torch.Generator().manual_seed(0)
        pl.attach(
            model, {"*.weight": pl.LoRA(2), "head.bias": pl.Delta()}, name=name, generator=same
        )
    return model


def trainer(
    folder: Path, model: nn.Module, kind: type[AdapterTrainer] = AdapterTrainer, **options: Any
) -> AdapterTrainer:
    chosen = {key: options.pop(key) for key in ("adapter",) if key in options}
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    return kind(model, arguments, train_dataset=DATA, eval_dataset=DATA, **chosen)


def losses(run: AdapterTrainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [AdapterTrainer, Mixed])
def test_resuming(tmp_path: Path, kind: type[AdapterTrainer]) -> None:
    """A resumed run has the losses and factors of an uninterrupted one, and saves no model.

    As the first base class it changes another trainer, whose own methods stay.
    """
    through = trainer(tmp_path, adapted(), kind)
    through.train()
    resumed = trainer(tmp_path, adapted(), kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(through)[-2:]
    expected, found = pl.state_dict(through.model), pl.state_dict(resumed.model)
    assert all(torch.equal(expected[key], factor) for key, factor in found.items())
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"adapter.safetensors"}
    if kind is Mixed:
        plain = trainer(tmp_path, adapted())
        plain.train()
        assert_close(losses(through)[0], 2 * losses(plain)[0], rtol=1e-3, atol=1e-3)


def test_best_model(tmp_path: Path) -> None:
    """load_best_model_at_end reloads the best adapter, and save_model writes it for `load`."""
    run = trainer(
        tmp_path,
        adapted("other", "digits"),
        adapter="digits",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best one is not the last
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    run.save_model(str(tmp_path / "final"))
    saved = load_file(best / "adapter.safetensors")
    fresh = copy.deepcopy(BASE)
    pl.load(fresh, tmp_path / "final" / "adapter.safetensors")
    for found in (pl.state_dict(run.model, "digits"), pl.state_dict(fresh, "digits")):
        assert all(torch.equal(saved[key], factor) for key, factor in found.items())


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """A checkpoint without an adapter, or with one of another rank, is refused before training."""
    trainer(tmp_path, adapted()).save_model(str(tmp_path / "two"))
    model = copy.deepcopy(BASE)
    pl.attach(model, pl.LoRA(3), "head", name="digits")
    for folder, kind, message in (
        (
            "none",
            FileNotFoundError,
            r"none.adapter\.safetensors does not exist; AdapterTrainer",
        ),
        ("two", pl.CheckpointError, r"has other sites, kinds or ranks than adapter 'digits': att"),
    ):
        with unchanged(model), pytest.raises(kind, match=message):
            trainer(tmp_path, model).train(resume_from_checkpoint=str(tmp_path / folder))


def test_parameters_that_checkpoints_would_lack(tmp_path: Path) -> None:
    """Training refuses to start if it would train more than checkpoints contain."""
    model = adapted()
    model.embed.parametrizations.weight.original.requires_grad_()  # type: ignore[union-attr]
    with pytest.raises(pl.StateError, match=r"'digits' would lack .*embed.*; freeze them"):
        trainer(tmp_path, model).train()
    with pytest.raises(pl.AdapterNameError, match="'digits', 'spam'; say which one, by adapter="):
        trainer(tmp_path, adapted("digits", "spam")).train()


def test_trl(tmp_path: Path) -> None:
    """The class changes TRL's SFTTrainer in the same way."""
    trl = pytest.importorskip("trl", reason="trl needs packages that the test extra leaves out")
    datasets = pytest.importorskip("datasets")

    class SFT(AdapterTrainer, trl.SFTTrainer):  # type: ignore[name-defined]
        pass

    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    rows = datasets.Dataset.from_list(
        [{"input_ids": torch.randint(2, 20, (6,)).tolist()} for _ in range(8)]
    )
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )

    def run(resume: str | None = None) -> AdapterTrainer:
        model = copy.deepcopy(base)
        pl.attach(model, pl.LoRA(2), generator=torch.Generator().manual_seed(0))
        one = SFT(model, arguments, train_dataset=rows, processing_class=tokenizer(config))
        one.train(resume_from_checkpoint=resume)
        return one

    through = run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(through)[-2:]
    assert not list(tmp_path.rglob("model*.safetensors"))


def tokenizer(config: Any) -> Any:
    """Return a tokenizer of the model's vocabulary, made here."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>"
    )
