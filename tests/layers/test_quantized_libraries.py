"""Quantized layers and their libraries: torchao, bitsandbytes, HQQ, quanto and transformers.

`quantize_` below adapters, code that reads the weight, torch.compile, and models that transformers
quantizes while it loads them.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.quantized import imported, inputs, layers, nf4, quantized, randomize


@pytest.fixture
def torchao() -> Any:
    return imported("torchao.quantization")


def adapted(model: nn.Module, spec: pl.LoRA | None = None) -> Any:
    """Return a model with an adapter that computes something."""
    pl.attach(model, spec or pl.LoRA(3))
    randomize(model)
    return model


class TestQuantizing:
    """A library quantizes a model that has adapters already."""

    @pytest.mark.parametrize("form", ["torchao int8", "torchao nf4"])
    def test_torchao(self, torchao: Any, form: str, tmp_path: Path) -> None:
        """`quantize_` below adapters equals quantizing first, and detaching leaves its result."""
        model, x = adapted(layers()), inputs()
        pl.save(model, tmp_path / "file")
        first = quantized(form)
        config = torchao.Int8WeightOnlyConfig() if form == "torchao int8" else nf4(torchao)
        torchao.quantize_(model, config)
        off = first(x)
        pl.load(first, tmp_path / "file")
        assert torch.equal(model(x), first(x))
        assert pl.fingerprint(model) == pl.fingerprint(first)
        with pl.disabled(model):
            assert torch.equal(model(x), off)
        pl.audit(model, x)
        with pytest.raises(pl.StateError, match=r"merge at '0\.weight': its layer is quant"):
            pl.merge(model)
        if form == "torchao int8":  # NF4 cannot be copied
            copied = copy.deepcopy(model)
            assert torch.equal(copied(x), model(x))
        pl.detach(model)
        assert torch.equal(model(x), off)
        assert type(model[0]) is nn.Linear
        assert not model[0].weight.requires_grad

    def test_a_tensor_that_was_quantized_elsewhere(self, torchao: Any) -> None:
        """Assigning codes is refused: they may be those of W', with the adapter in them."""
        model, x = adapted(layers()), inputs()
        y = model(x)
        with pytest.raises(pl.StateError, match="assigning another parameter would replace the ba"):
            model[0].weight = quantized("torchao int8").get_parameter("0.weight")
        assert torch.equal(model(x), y)

    @pytest.mark.parametrize("form", ["torchao int8", "torchao nf4"])
    def test_loading_codes(self, form: str) -> None:
        """`load_state_dict(assign=True)` may put codes below adapters."""
        first = quantized(form)
        model, x = adapted(layers()), inputs()
        model.load_state_dict(first.state_dict(), strict=False, assign=True)
        with pl.disabled(model):
            assert torch.equal(model(x), first(x))
        adapted(first)
        assert torch.equal(model(x), first(x))

    def test_a_bias_with_an_adapter(self, torchao: Any) -> None:
        """An adapter of the bias alone goes on working, with its gradients."""
        model = layers()
        pl.attach(model, pl.Delta(), "0.bias")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        model(inputs()).square().sum().backward()
        assert pl.parameters(model)[0].grad.abs().sum() > 0  # type: ignore[union-attr]

    @pytest.mark.parametrize("merged", [False, True])
    def test_torchao_is_refused(self, torchao: Any, merged: bool) -> None:
        """A kind that needs W, and a merged adapter, keep the layer from being quantized."""
        model, x = layers(), inputs()
        pl.attach(model, pl.LoRA(2) if merged else pl.DoRA(2))
        randomize(model)
        if merged:
            pl.merge(model)
        y = model(x)
        with pytest.raises(pl.StateError, match="cannot quantize 'weight' of this Linear below it"):
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert torch.equal(model(x), y)

    def test_libraries_that_replace_modules(self, torchao: Any) -> None:
        """HQQ, quanto and torchao's QAT would lose the adapters, and are refused."""

        def hqq(model: Any) -> None:
            core = imported("hqq.core.quantize")
            core.HQQLinear(model[0], core.BaseQuantizeConfig(nbits=4), device="cpu")

        def quanto(model: Any) -> None:
            library = imported("optimum.quanto")
            library.quantize(model, weights="qint8")

        def qat(model: Any) -> None:
            module = imported("torchao.quantization.qat")
            if not hasattr(module, "QATConfig"):
                pytest.skip("this torchao has no QATConfig")
            config = torchao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                weight_granularity=torchao.PerGroup(32),
            )
            torchao.quantize_(model, module.QATConfig(config, step="prepare"))

        quantize: Callable[[Any], None]
        for quantize in (qat, hqq, quanto):
            model, x = adapted(layers()), inputs()
            y = model(x)
            with pytest.raises(pl.StateError, match="quantize the model first, and attach then"):
                quantize(model)
            assert torch.equal(model(x), y)

    def test_quanto_freezes(self) -> None:
        """quanto's `freeze` stores the codes below the adapters; the outputs stay."""
        quanto = imported("optimum.quanto")
        model, x = layers(), inputs()
        quanto.quantize(model, weights="qint8")
        adapted(model)
        y = model(x)
        quanto.freeze(model)
        assert torch.equal(model(x), y)
        with pl.disabled(model):
            assert torch.equal(model(x), quantized("quanto int8")(x))


@pytest.mark.parametrize("form", ["bitsandbytes 4", "bitsandbytes 8", "hqq", "torchao int8"])
def test_loading_a_base(form: str) -> None:
    """A base is loaded whole below adapters, or not at all."""
    model, state = adapted(quantized(form)), quantized(form).state_dict()
    if form == "torchao int8":
        pl.load_base_state_dict(model, state)
    else:
        with pytest.raises(pl.StateError, match="stores outside of its parameters: make the quan"):
            pl.load_base_state_dict(model, state)


class TestWeight:
    """`layer.weight` of a quantized layer, whose W' does not exist."""

    @pytest.mark.parametrize("form", ["torchao int8", "bitsandbytes 4"])
    def test_reading(self, form: str) -> None:
        """It has dtype, shape and device; its values are refused, or the base's with all off."""
        model: Any = quantized(form)
        stored = model[0].weight
        adapted(model)
        read = model[0].weight
        assert (read.dtype, read.shape, read.device) == (stored.dtype, stored.shape, stored.device)
        with pytest.raises(pl.StateError, match="never read, and sum was asked of it"):
            read.sum()
        with pytest.raises(pl.StateError, match="never read, and linear was asked of it"):
            nn.functional.linear(inputs(), model[0].weight)
        with pl.disabled(model):
            assert model[0].weight is stored
        assert model.get_parameter("0.weight") is stored

    def test_attention(self, torchao: Any) -> None:
        """An attention reads the weight of its projection, which is refused at attach."""
        model = nn.MultiheadAttention(64, 4)
        torchao.quantize_(
            model, torchao.Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear)
        )
        with pytest.raises(
            pl.TargetError, match=r"'out_proj\.weight' .* it is packed \(\w+Tensor\)"
        ):
            pl.attach(model, pl.LoRA(2), "out_proj")

    def test_torchs_own_way(self, torchao: Any) -> None:
        """`register_parametrization` computes with W, so a spec refuses a quantized one."""
        with pytest.raises(pl.TargetError, match="it is quantized; use attach"):
            pl.LoRA(2).parametrization(quantized("torchao int8").get_parameter("0.weight"))


@pytest.mark.slow
# By the compiler of torch 2.6, of the Function of bitsandbytes.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["torchao int8", "bitsandbytes 4"])
def test_compiled(form: str) -> None:
    """Compiled outputs and gradients equal the eager ones, on and off, without a new trace."""
    model, x = adapted(quantized(form)), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    for switch in (pl.enable, pl.disable, pl.enable):
        switch(model)
        torch.testing.assert_close(compiled(x), model(x))
    found, wanted = (
        torch.autograd.grad(one(x).square().sum(), pl.parameters(model))
        for one in (compiled, model)
    )
    torch.testing.assert_close(found, wanted)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, saved by transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=48,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def from_pretrained(folder: Path, library: str) -> Any:
    """Return the checkpoint as transformers quantizes it with a library."""
    import transformers

    imported(library)
    config: Any
    if library == "torchao":
        torchao = imported("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).requires_grad_(False)


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_transformers(library: str, checkpoint: Path, tmp_path: Path) -> None:
    """A model that transformers has quantized trains, generates, saves and loads its adapter."""
    model = from_pretrained(checkpoint, library).train()
    ids = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))
    summary = pl.attach(model, pl.LoRA(4))
    assert len(summary.sites) == 7
    assert "lm_head.weight" in [one.tensor for one in summary.skipped]
    optimizer, losses = torch.optim.AdamW(pl.parameters(model), lr=1e-2), []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    pl.save(model, tmp_path / "file")
    other = from_pretrained(checkpoint, library).eval()
    with torch.no_grad():
        off = other(ids).logits
        pl.load(other, tmp_path / "file")
        y = model.eval()(ids).logits
        # bitsandbytes rounds its scales when it packs a layer for a CPU with AVX-512.
        torch.testing.assert_close(other(ids).logits, y, rtol=0, atol=1e-2)
        pl.disable(other)
        assert torch.equal(other(ids).logits, off)
    model.save_pretrained(tmp_path / "whole")
    # The dtype is given because transformers 4 would take float16 for bitsandbytes.
    load = functools.partial(type(model).from_pretrained, dtype=model.dtype)
    saved = load(tmp_path / "whole", device_map={"": "cpu"}).train()
    with torch.no_grad(), pl.disabled(model):
        assert torch.equal(saved(ids).logits, model.train()(ids).logits)
    model.eval()
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_dequantizing_with_adapters(checkpoint: Path) -> None:
    """transformers would replace the adapted layers by others, and is refused."""
    model = from_pretrained(checkpoint, "bitsandbytes")
    pl.attach(model, pl.LoRA(4))
    with pytest.raises(pl.StateError, match="in the place of this Linear4bit, and its adapters wo"):
        model.dequantize()
