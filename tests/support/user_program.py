"""A user's program with types, which pyright checks in strict mode (`make lint`).

It uses the public functions, so that a type that is unknown or wrong there is an error here. The
two exempt lines call functions of torch that have no types.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import paramlora as pl
from paramlora import kinds


@dataclasses.dataclass(frozen=True)
class Offset(kinds.Spec):
    """A kind of the user's own, W' = W + λ·d, with one number d per tensor."""

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the factor, which is zero."""
        return {"d": torch.zeros((), dtype=kinds.factor_dtype(weight), device=weight.device)}

    def apply(
        self, weight: Tensor, factors: kinds.Factors, strength: kinds.Strength = 1.0
    ) -> Tensor:
        """Return W'."""
        return kinds.add_update(weight, strength * factors["d"])


def network() -> nn.Sequential:
    """Return a network of two layers."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def attach_and_look(model: nn.Module) -> list[str]:
    """Attach adapters of several kinds; return a line for each site."""
    specs: Mapping[str, kinds.Spec] = {"0": pl.LoRA(rank=2, alpha=4), "2": pl.IA3()}
    planned: pl.Summary = pl.attach(model, specs, name="one", dry_run=True)
    made = pl.attach(model, specs, name="one", generator=torch.Generator())
    assert len(planned.sites) == len(made.sites)
    pl.attach(model, pl.Delta(), "*.bias", name="biases", activate="also", exclude="2")
    pl.attach(model, Offset(), nn.Linear, name="shift", activate="no")
    lines = [f"{row.site} {row.adapter} {row.scale}" for row in pl.summary(model).sites]
    return [*lines, *(f"{left.tensor}: {left.reason}" for left in made.skipped)]


def train(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Make a step on the adapters, and return the loss."""
    pl.unfreeze(model, "one")
    pl.freeze(model, "biases")
    groups = pl.parameter_groups(model, "one", lr=1e-3, ratio=4.0)
    optimizer = torch.optim.Adam(groups)
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    report: pl.AuditReport = pl.audit(model, (x,), optimizer=optimizer)
    assert all(isinstance(finding, pl.Finding) for finding in report.findings)
    pl.unfreeze(model, "biases")
    trained: list[nn.Parameter] = pl.parameters(model, "one")
    return loss.item() + sum(p.numel() for p in trained)


def switch(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs with the adapters in several states."""
    pl.activate(model, "one")
    pl.enable(model, "biases")
    pl.scale(model, 0.5, "one")
    found: list[Tensor] = [model(x)]
    with pl.disabled(model):
        found.append(model(x))
    with pl.enabled(model, "shift"), pl.hold_statistics(model):
        found.append(model(x))
    with pl.using(model, "biases", one=0.3):
        found.append(model(x))
    with pl.using(model, {"one": 0.3}):
        found.append(model(x))
    with pl.routed(model, ["one", None, "biases"]):
        found.append(model(x))
    pl.disable(model, "biases")
    forward, backward = pl.keep_blocks()
    with forward, backward:
        found.append(model(x))
    return found


def fold(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the weights of the model with its active adapters in them."""
    pl.detach(model, "biases", "shift")
    with pl.merged(model, "one"):
        model(x)
    pl.merge(model)
    pl.unmerge(model)
    folded = pl.merged_state_dict(model)
    pl.bake(model)
    return {key: value for key, value in folded.items() if isinstance(value, Tensor)}


def store(model: nn.Module, folder: Path) -> str:
    """Save and load in all forms; return the fingerprint of the base."""
    pl.save(model, folder / "one.safetensors", "one")
    loaded: pl.Summary = pl.load(network(), folder / "one.safetensors", name="loaded")
    assert loaded.sites[0].adapter == "loaded"
    factors: dict[str, Tensor] = pl.state_dict(model, "one")
    pl.load_state_dict(model, factors, "one")
    pl.load_base_state_dict(model, pl.base_state_dict(model))
    fresh = network()
    pl.attach(fresh, pl.LoRA(rank=2), "0", name="lora")
    pl.save_peft(fresh, folder / "peft", "lora")
    pl.load_peft(network(), str(folder / "peft"), name="peft", activate="only")
    try:
        pl.load(model, folder / "peft" / "adapter_model.safetensors")
    except pl.CheckpointError as error:
        print(error)
    return pl.fingerprint(model)


def derive(x: Tensor) -> list[str]:
    """Make adapters from others, from data and from a change of weights; return their names."""
    model = network()
    for name in ("a", "b"):
        pl.attach(model, pl.LoRA(rank=2), "0", name=name)
    pl.combine(model, {"a": 0.5, "b": 0.5}, name="mean")
    shares: dict[str, float] = pl.eva(model, [x], "a")
    pl.attach(model, pl.LoRA(rank=2, init="corda"), "2", name="c", activate="no")
    pl.corda(model, [x], "c", mode="instruction")
    pl.detach(model, "c")
    pl.attach(model, pl.LoRA(rank=2, init="null"), "2", name="d", activate="no")
    pl.lora_null(model, [x], "d", call=lambda model, batch: model(batch))
    pl.detach(model, "d")
    tuned = copy.deepcopy(network())
    shares |= pl.extract(tuned, network(), rank=2)
    pl.detach(model, "b")
    return [*pl.names(model), *shares]


def main() -> None:
    """Run all parts."""
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model, x = network(), torch.randn(3, 8)
    for line in attach_and_look(model):
        print(line)
    print(train(model, x, torch.tensor([0, 1, 0])), len(switch(model, x)), derive(x))
    with tempfile.TemporaryDirectory() as folder:
        print(store(model, Path(folder)))
    print(sorted(fold(model, x)))


if __name__ == "__main__":
    main()
