"""Verbs on DataParallel, DDP and compiled models act on the model inside, under its names."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

import paramlora as pl
from paramlora.wrappers import inner
from tests.support.helpers import unchanged

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process, which DDP needs."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def inside(model: nn.Module) -> nn.Module:
    """Wrap a layer inside of the model."""
    model[0] = compiled(model[0])  # type: ignore[index, operator]
    model[2] = checkpoint_wrapper(model[2])  # type: ignore[index, operator]
    return model


WRAPPERS: dict[str, Wrap] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": ddp,
    "compiled DDP": lambda model: compiled(ddp(model)),
    "DDP of compiled": lambda model: ddp(compiled(model)),
    "inside": inside,
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def content(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in list(opened.keys())}


def adapted() -> nn.Sequential:
    """Return a model with an adapter that changes its outputs."""
    model = base()
    pl.attach(model, pl.LoRA(rank=2), nn.Linear, name="digits")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model


@pytest.mark.usefixtures("group")
@wrappers
def test_names_are_those_of_the_model_inside(wrap: Wrap, tmp_path: Path) -> None:
    """Sites, keys and files of a wrapped model are those of the model."""
    model = adapted()
    wrapped = wrap(copy.deepcopy(model))
    assert pl.summary(wrapped).sites == pl.summary(model).sites
    assert pl.state_dict(wrapped, "digits").keys() == pl.state_dict(model, "digits").keys()
    assert pl.base_state_dict(wrapped).keys() == inner(wrap(base())).state_dict().keys()
    found = []
    for folder, one in (("plain", model), ("wrapped", wrapped)):
        pl.save(one, tmp_path / f"{folder}.safetensors", "digits")
        pl.save_peft(one, tmp_path / folder, "digits")
        config = (tmp_path / folder / "adapter_config.json").read_text()
        files = (
            tmp_path / f"{folder}.safetensors",
            tmp_path / folder / "adapter_model.safetensors",
        )
        found.append((config, [content(file) for file in files]))
    (config, contents), (expected_config, expected) = reversed(found)
    assert config == expected_config
    for (metadata, tensors), (expected_metadata, expected_tensors) in zip(
        contents, expected, strict=True
    ):
        assert metadata == expected_metadata
        assert_close(tensors, expected_tensors, rtol=0, atol=0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "wrap", [compiled, ddp, nn.DataParallel], ids=["compiled", "DDP", "DataParallel"]
)
def test_the_base_of_a_wrapped_model(wrap: Wrap) -> None:
    """The fingerprint and the base's state dict are those of the model inside."""
    wrapped, fresh = wrap(adapted()), base()
    assert pl.fingerprint(wrapped) == pl.fingerprint(fresh)
    fresh.load_state_dict(pl.base_state_dict(wrapped))
    other = {key: value + 1 for key, value in fresh.state_dict().items()}
    pl.load_base_state_dict(wrapped, other)
    assert_close(pl.base_state_dict(wrapped), other, rtol=0, atol=0)


@wrappers
@pytest.mark.usefixtures("group")
def test_verbs_act_on_the_model_inside(wrap: Wrap) -> None:
    """Toggling, merging and detaching a wrapped model change its outputs."""
    x, model = torch.randn(2, 4), adapted()
    on, off = model(x), base()(x)
    wrapped = wrap(model)
    for block, expected in (
        (pl.disabled(wrapped), off),
        (pl.using(wrapped, "digits"), on),
        (pl.merged(wrapped), on),
        (pl.routed(wrapped, [0, -1]), torch.stack([on[0], off[1]])),
    ):
        with block:
            assert_close(wrapped(x), expected)
    pl.detach(wrapped)
    assert torch.equal(wrapped(x), off)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "wrap", [compiled, nn.DataParallel, inside], ids=["compiled", "DataParallel", "inside"]
)
def test_attach_and_load_on_a_wrapped_model(wrap: Wrap, tmp_path: Path) -> None:
    """Targets are paths of the model inside, and files of the plain model load."""
    model, x = adapted(), torch.randn(2, 4)
    pl.save(model, tmp_path / "digits.safetensors", "digits")
    pl.save_peft(model, tmp_path / "digits", "digits")
    for load in (
        lambda m: pl.load(m, tmp_path / "digits.safetensors"),
        lambda m: pl.load_peft(m, tmp_path / "digits"),
    ):
        wrapped = wrap(base())
        load(wrapped)
        assert_close(wrapped(x), model(x))
    wrapped = wrap(base())
    assert [row.site for row in pl.attach(wrapped, pl.LoRA(2), ["0", "2.weight"]).sites] == [
        "0.weight",
        "2.weight",
    ]
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pl.parameters(wrapped))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [ddp, lambda m: compiled(ddp(m))], ids=["DDP", "compiled DDP"])
def test_new_adapter_on_ddp(wrap: Wrap, tmp_path: Path) -> None:
    """DDP would not synchronise factors that come after it, so they are refused."""
    pl.save(adapted(), tmp_path / "digits.safetensors", "digits")
    wrapped = wrap(base())
    for call in (
        lambda: pl.attach(wrapped, pl.LoRA(2)),
        lambda: pl.load(wrapped, tmp_path / "digits.safetensors"),
    ):
        with (
            unchanged(wrapped),
            pytest.raises(pl.StateError, match=r"add the adapter to the model inside \(ddp.module"),
        ):
            call()


def test_module_with_a_child_named_module() -> None:
    """A user's module that calls its child `module` is no wrapper."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    summary = pl.attach(Outer(), pl.LoRA(rank=2))
    assert [row.site for row in summary.sites] == ["module.weight"]
