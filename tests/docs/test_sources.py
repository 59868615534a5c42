"""The listings of docs/sources.md: each is written out here and compared with paramlora."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import paramlora as pl

TABLE = Path(__file__).parents[2] / "docs" / "sources.md"


def test_the_table_names_every_test():
    """docs/sources.md has one line for each test of this file."""
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    named = re.findall(r"^\| .*`(test_\w+)` \|$", TABLE.read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(here - {"test_the_table_names_every_test"})


class Toggled(nn.Module):
    """The blog's parametrization W + (alpha/r)·BA, with an attribute `enabled`, A ~ N(0, 1)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, into = weight.shape
        self.A = nn.Parameter(torch.randn(rank, into, dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=weight.dtype))
        self.scale, self.enabled = alpha / rank, True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A) if self.enabled else weight


class FourLayers(nn.Module):
    """A network of four linear layers, fc1 to fc4, float64, the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(12, 10), nn.Linear(10, 9)
            self.fc3, self.fc4 = nn.Linear(9, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc4(F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))))


def parametrized(model: nn.Module, names: list[str], rank: int, alpha: float) -> nn.Module:
    """Freeze a model and register `Toggled` on the weights of the named layers."""
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        added = Toggled(layer.weight, rank, alpha)
        parametrize.register_parametrization(layer, "weight", added)
    return model


def attached(names: list[str], rank: int, alpha: float) -> nn.Module:
    model, spec = FourLayers(), pl.LoRA(rank, alpha, init="gaussian")
    pl.attach(model, spec, names, name="mine")
    return model


def trained(model: nn.Module, steps: int) -> list[float]:
    """Train all parameters that require gradients on random images; return the losses."""
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1), []
    for _ in range(steps):
        x = torch.randn(6, 12, dtype=torch.float64, generator=generator)
        loss = F.cross_entropy(model(x), torch.randint(4, (6,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_three_adapted_layers_and_a_frozen_one():
    """fc1 to fc3 adapted and fc4 frozen train as in the listing; fc4 keeps its bits."""
    names = ["fc1", "fc2", "fc3"]
    torch.manual_seed(2)
    listing = parametrized(FourLayers(), names, rank=2, alpha=1.0)
    torch.manual_seed(2)
    ours = attached(names, rank=2, alpha=1.0)
    trainable = {name.split(".")[0] for name, p in ours.named_parameters() if p.requires_grad}
    assert trainable == set(names)
    assert_close(trained(ours, 50), trained(listing, 50))
    assert torch.equal(ours.fc4.weight, FourLayers().fc4.weight)
    assert torch.equal(ours.fc4.bias, FourLayers().fc4.bias)


def test_toggle_by_attribute():
    """`enabled` set on each parametrization and `disable`/`enable` give the same outputs."""
    names = ["fc1", "fc2", "fc3", "fc4"]
    torch.manual_seed(3)
    listing = parametrized(FourLayers(), names, rank=2, alpha=1.0)
    torch.manual_seed(3)
    ours = attached(names, rank=2, alpha=1.0)
    trained(listing, 5)
    trained(ours, 5)
    x = torch.randn(7, 12, dtype=torch.float64)

    def both(enabled: bool) -> tuple[Tensor, Tensor]:
        for name in names:
            listing.get_submodule(name).parametrizations["weight"][0].enabled = enabled
        (pl.enable if enabled else pl.disable)(ours, "mine")
        return listing(x), ours(x)

    on = both(True)
    off = both(False)
    assert_close(*on)
    assert torch.equal(off[0], FourLayers()(x))
    assert torch.equal(off[1], FourLayers()(x))
    assert float((on[1] - off[1]).detach().abs().max()) > 1e-3
    assert_close(both(True), on, rtol=0, atol=0)


class Wrapped(nn.Module):
    """y = linear(x) + alpha · x A B, A: (in, r) filled by Kaiming's rule, B: (r, out) zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        A = torch.empty(linear.in_features, rank, dtype=linear.weight.dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.linear, self.alpha, self.A = linear, alpha, nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(rank, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha * (x @ self.A @ self.B)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, Wrapped(module, rank, alpha))
        else:
            replace_linear_with_lora(module, rank, alpha)


def test_replace_linear_with_lora():
    """init="uniform/sqrt_r" and alpha·r as alpha are that listing: same A, same 50 losses."""
    listing = FourLayers().requires_grad_(False)
    torch.manual_seed(4)
    replace_linear_with_lora(listing, rank=3, alpha=1.5)
    ours = FourLayers()
    spec = pl.LoRA(rank=3, alpha=3 * 1.5, init="uniform/sqrt_r")
    torch.manual_seed(4)
    pl.attach(ours, spec, nn.Linear, name="mine")
    assert spec.scaling == 1.5
    state = pl.state_dict(ours, "mine")
    for name in ("fc1", "fc2", "fc3", "fc4"):
        assert torch.equal(state[f"{name}.weight.A"], listing.get_submodule(name).A.T)
    losses = trained(ours, 50)
    assert_close(losses, trained(listing, 50))
    assert losses[-1] != losses[0]


def test_gaussian_over_the_root_of_the_rank():
    """init="gaussian/sqrt_r" is N(0, 1)/√r."""
    weight = torch.zeros(5, 40, dtype=torch.float64)
    A = pl.LoRA(9, init="gaussian/sqrt_r").create(weight, torch.Generator().manual_seed(5))["A"]
    drawn = torch.randn(9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert_close(A, drawn / math.sqrt(9))


def test_a_weight_of_300_by_200_at_rank_4():
    """A weight of 300 × 200 has 60,000 numbers, and its update of rank 4 has 2,000."""
    summary = pl.attach(nn.Linear(200, 300, bias=False), pl.LoRA(rank=4), nn.Linear)
    assert (summary.total, summary.trainable) == (60_000, 2_000)


def gpt2(**config: int) -> nn.ModuleDict:
    """A GPT-2 without weights, on the meta device."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return nn.ModuleDict({"gpt2": transformers.GPT2Model(transformers.GPT2Config(**config))})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_gpt2_small_has_no_trainable_parameter_before_the_adapter():
    """GPT-2 with two classes: 124,441,346 trainable, 0 when frozen, 2,666,528 with adapters."""
    model = gpt2()
    with torch.device("meta"):
        model["head"] = nn.Linear(768, 2)
    assert count(model) == 124_441_346
    model.requires_grad_(False)
    assert count(model) == 0
    blocks = [
        "*.c_attn.weight[:, :768]",
        "*.c_attn.weight[:, 768:1536]",
        "*.c_attn.weight[:, 1536:]",
    ]
    pl.attach(model, pl.LoRA(rank=16), [*blocks, "*.c_proj", "*.c_fc", "head"])
    assert count(model) == 2_666_528


def test_gpt2_large():
    """GPT-2 L has 774 M parameters; rank 4 on query and value adds 737,280, published as 0.77 M."""
    model = gpt2(n_embd=1280, n_layer=36, n_head=20)
    assert count(model) == 774_030_080
    pl.attach(model, pl.LoRA(rank=4), ["*.c_attn.weight[:, :1280]", "*.c_attn.weight[:, 2560:]"])
    assert count(model) == 36 * 2 * 4 * (1280 + 1280) == 737_280
    assert abs(count(model) / 770_000 - 1) < 0.05
