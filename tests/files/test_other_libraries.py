"""Checkpoints that other libraries write of an adapted model, and load again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import assert_bits
from tests.support.reference import shake

transformers = pytest.importorskip("transformers")

IDS = torch.arange(2, 12).view(2, 5)
STATES = {"on": lambda m: None, "off": pl.disable, "merged": lambda m: pl.merge(m, "one")}


def gpt2() -> Any:
    """Return a small GPT-2, whose head is tied to the embedding; always with the same weights."""
    torch.default_generator.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    without = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    config = transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(head: bool = True) -> Any:
    """Return the GPT-2 with two adapters, with the tied head or without; "two" is trained."""
    model = gpt2()
    targets = ["*.c_attn", "*.c_proj"] + (["transformer.wte"] if head else [])
    pl.attach(model, pl.LoRA(rank=2), targets, name="one")
    pl.attach(model, pl.LoRA(rank=2), "*.c_fc", name="two", activate="also")
    shake(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[i % 2], "labels": IDS[i % 2]}


def trainer(model: nn.Module, folder: Path) -> Any:
    """Return a Trainer that saves each of its three steps."""
    settings = {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_steps": 100}
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, learning_rate=0.05, **settings, **quiet
    )
    return transformers.Trainer(model, args, train_dataset=Rows())


def loads_into_the_plain_model(folder: Path, model: Any, merged: bool) -> None:
    """Assert that plain transformers loads a folder: the base, or the merged weights."""
    plain, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    base = pl.base_state_dict(model)
    expected = model.state_dict() if merged else base
    for key, value in plain.state_dict().items():
        assert_bits(value, expected[key])
    assert plain.state_dict().keys() == base.keys()


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_save_pretrained(state: str, head: bool, tmp_path: Path) -> None:
    """`save_pretrained` writes the base, or the merged weights; no weight is lost or random."""
    model = adapted(head)
    STATES[state](model)
    model.save_pretrained(tmp_path)
    loads_into_the_plain_model(tmp_path, model, state == "merged")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["on", "merged"])
def test_trainer(state: str, tmp_path: Path) -> None:
    """A Trainer's checkpoint resumes to the same weights, and loads into the plain model."""
    model, other = adapted(), adapted()
    for each in (model, other):
        STATES[state](each)
    trainer(model, tmp_path).train()
    loads_into_the_plain_model(tmp_path / "checkpoint-3", model, state == "merged")
    for parameter in pl.parameters(other):
        parameter.data.zero_()
    trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bits(logits(other), logits(model))
    if state == "merged":
        other = adapted()
        with pytest.raises(RuntimeError, match="was saved while 'one' was merged"):
            trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate(safe: bool, tmp_path: Path) -> None:
    """accelerate's saved state restores an adapted model with a tied head."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(adapted())
    expected = logits(model)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    for parameter in model.parameters():
        parameter.data.add_(1)
    accelerator.load_state(tmp_path)
    assert_bits(logits(model), expected)
    accelerator.free_memory()


def test_safetensors(tmp_path: Path) -> None:
    """`save_model` and `load_model` of safetensors keep an adapted model, tied head included."""
    from safetensors.torch import load_model, save_model

    model, plain, file = adapted(), gpt2(), tmp_path / "model.safetensors"
    save_model(model, str(file))
    other = adapted()
    shake(other)
    load_model(other, file)
    assert_bits(logits(other), logits(model))
    missing, _ = load_model(plain, file, strict=False)
    assert not missing
    assert_bits(logits(plain), logits(gpt2()))


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    """A checkpoint of Lightning resumes training, and its base loads into the plain model."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted().train()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(pl.parameters(self.model), lr=0.05)

    def fit(module: Any, steps: int, **options: Any) -> Any:
        flags = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
        fitted = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            **flags,
        )
        fitted.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=2), **options)
        return fitted

    whole, part, file = Module(), Module(), tmp_path / "two.ckpt"
    fit(whole, 4)
    fit(part, 2).save_checkpoint(file)
    resumed = Module()
    fit(resumed, 4, ckpt_path=file)
    assert_bits(logits(resumed.model), logits(whole.model))
    state = torch.load(file, weights_only=True)["state_dict"]
    plain = gpt2()
    named = {key.removeprefix("model."): value for key, value in state.items()}
    assert plain.load_state_dict(named, strict=False).missing_keys == []
    assert_bits(logits(plain), logits(gpt2()))


def test_tie_weights() -> None:
    """`tie_weights` finds the stored weight of an adapted, tied head, and leaves it tied."""
    for merged in (False, True):
        model = adapted()
        if merged:
            pl.merge(model)
        with unchanged(model):
            model.tie_weights()
        pl.detach(model) if not merged else pl.bake(model)
        assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("size", [{"new_num_tokens": 20}, {"new_num_tokens": 16}, {}])
@pytest.mark.parametrize("active", [True, False])
def test_resizing_adapted_embeddings(size: dict[str, int], active: bool) -> None:
    """`resize_token_embeddings` refuses an adapted embedding before anything changes."""
    model = adapted()
    if not active:
        pl.disable(model)
    with unchanged(model), pytest.raises(pl.StateError, match="cannot resize the embeddings"):
        model.resize_token_embeddings(**size)
    assert (model.config.vocab_size, model.transformer.wte.num_embeddings) == (16, 16)


def test_resizing_other_embeddings() -> None:
    """`resize_token_embeddings` works on a model with adapters on other layers."""
    model = adapted(head=False)
    expected = logits(model)
    model.resize_token_embeddings(20)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(logits(model)[..., :16], expected)


@torch.no_grad()
def test_beams_with_an_adapter_for_each_row() -> None:
    """`generate` with beams inside of `routed` gives each row what its adapter alone gives."""
    model = gpt2()
    for name in ("one", "two"):
        pl.attach(model, pl.LoRA(rank=2, init="gaussian"), ["*.c_attn", "*.c_fc"], name=name)
    shake(model)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3}
    options |= {"do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones(1, 5).long()}
    with pl.routed(model, [1, -1], "one", "two"):
        both = model.generate(IDS, **options | {"attention_mask": torch.ones(2, 5).long()})
    with pl.using(model, "two"):
        assert torch.equal(both[:1], model.generate(IDS[:1], **options))
    with pl.disabled(model):
        assert torch.equal(both[1:], model.generate(IDS[1:], **options))


@torch.no_grad()
def test_t5_with_an_adapter_for_each_row() -> None:
    """T5 asks for the dtype of `wo.weight` inside of `routed`, beams included, and gets it."""
    torch.default_generator.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    pl.attach(model, pl.LoRA(rank=2, init="gaussian"), ["*.wo", "*.q"], name="one")
    shake(model)
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with pl.routed(model, [0, -1], "one"):
        both = model(input_ids=IDS, decoder_input_ids=IDS).logits
        generated = model.generate(IDS, **options)
    expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(both[0], expected[0])
    one = model.generate(IDS[:1], **options)[0]
    assert torch.equal(generated[0, : len(one)], one)
    with pl.disabled(model):
        expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(both[1], expected[1])
