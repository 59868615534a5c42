"""Adapters on the meta device: attaching, materialising, and errors if values are needed."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import EXACT, MLP, case_of, host_name, outputs
from tests.support.mixed import assert_bits
from tests.support.reference import HOSTS, KINDS, Case, Host, floats, loss


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def trained() -> nn.Sequential:
    """Return a model whose adapter has random factors."""
    model = plain()
    pl.attach(model, pl.LoRA(2), name="digits")
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.normal_()
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return plain()


def test_load_after_assigning_the_base(tmp_path: Path) -> None:
    """`load_state_dict` with assign=True fills a base on meta, and `load` then works."""
    expected, x = trained(), torch.randn(3, 4)
    pl.save(expected, tmp_path / "digits.safetensors", "digits")
    model = on_meta()
    model.load_state_dict(pl.base_state_dict(expected), assign=True)
    pl.load(model, tmp_path / "digits.safetensors")
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "verb",
    [
        lambda m, path: pl.load_base_state_dict(m, plain().state_dict()),
        lambda m, path: pl.load_state_dict(m, pl.state_dict(trained(), "digits"), "digits"),
        lambda m, path: pl.load(m, path),
        lambda m, path: pl.load(m, path, name="other"),
        lambda m, path: pl.save(m, path.with_name("new.safetensors"), "digits"),
    ],
    ids=["load_base_state_dict", "load_state_dict", "load", "load a new one", "save"],
)
def test_loading_and_saving_meta_tensors(
    verb: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    """Loading into meta tensors or saving them raises StateError and changes nothing."""
    pl.save(trained(), tmp_path / "digits.safetensors", "digits")
    model = on_meta()
    pl.attach(model, pl.LoRA(2), name="digits")
    before = str(pl.summary(model))
    with pytest.raises(pl.StateError, match=r"'0\..*' is on the meta device .* materialise"):
        verb(model, tmp_path / "digits.safetensors")
    assert str(pl.summary(model)) == before
    assert all(p.is_meta for p in model.parameters())
    assert not (tmp_path / "new.safetensors").exists()


META = [MLP, *(n for n in HOSTS if n in ("embedding", "bag_sum", "conv2d", "conv_transpose1d"))]
META += ["lstm", "gru", "attention", "encoder_layer", "bilinear", "bare_3d", "batch_norm"]


class TestMeta:
    @pytest.mark.parametrize("host", META, ids=host_name)
    def test_shapes(self, host: str | Host) -> None:
        """Attaching on meta draws no random numbers; outputs and gradients have their shapes."""
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
        """`to_empty`, `load_base_state_dict` and `load` restore the model that was saved."""
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

    def test_fingerprint_needs_values(self) -> None:
        """`fingerprint` raises ValueError for meta tensors."""
        model = MLP.make().to("meta")
        pl.attach(model, pl.LoRA(rank=2))
        with pytest.raises(ValueError, match=r"'0\.bias' is on the meta device"):
            pl.fingerprint(model)
