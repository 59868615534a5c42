"""RL's Razor: fine-tunings in a stack, the targets of the methods, the fits, and the command."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError
from experiments.razor import settings as razor_settings
from experiments.razor.analysis import HIGHEST, Found
from experiments.razor.settings import METHODS, Arm, RazorSettings
from experiments.razor.stacked import Stack, network
from experiments.razor.study import losses
from experiments.razor.targets import Draw

HIDDEN, ALPHA = (6, 5), 4.0
RATES = (1e-3, 3e-2)


def test_examples_in_docstrings_run():
    """The examples in the docstrings pass."""
    result = doctest.testmod(razor_settings)
    assert result.attempted
    assert not result.failed


def bases(count: int) -> list[dict[str, Tensor]]:
    """Return random networks in float64."""
    return [
        {name: p.detach().double() for name, p in network(HIDDEN).named_parameters()}
        for _ in range(count)
    ]


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(7, 785, generator=generator).double(),
            torch.randint(10, (7,), generator=generator),
            torch.rand(7, 4, generator=generator),
        )
        for _ in range(count)
    ]


def reference_loss(method: str, logits: Tensor, base: Tensor, batch: tuple) -> Tensor:
    """Return the loss of one training, image by image, from the formulas of the paper."""
    _, labels, uniform = batch
    total = logits.new_zeros(())
    for z, z0, label, numbers in zip(logits, base, labels.tolist(), uniform.tolist(), strict=True):
        log_p, parity = z - z.logsumexp(0), label % 2
        if method == "sft-1":
            total = total - log_p[parity]
        elif method == "sft-2":
            total = total - log_p[parity + (4 if numbers[0] < 0.5 else 0)]
        elif method == "oracle":
            p0 = z0.exp()
            right = [c for c in range(10) if c % 2 == parity]
            total = total - sum(p0[c] / p0[right].sum() * log_p[c] for c in right)
        else:
            limits = z.detach().softmax(0).cumsum(0).tolist()
            answers = [next((c for c in range(9) if u <= limits[c]), 9) for u in numbers]
            rewards = torch.tensor([float(a % 2 == parity) for a in answers], dtype=z.dtype)
            gains = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
            total = total - sum(gain * log_p[a] for gain, a in zip(gains, answers, strict=True)) / 4
    return total / len(logits)


def separately(arm: Arm, base: dict, start: dict, rate: float, method: str, seed: int) -> dict:
    """Train one network alone, with dense weights W + (alpha/r) B A; return its weights."""
    trained = {name: value.clone().requires_grad_() for name, value in start.items()}

    def weights() -> dict[str, Tensor]:
        made, scale = dict(base), ALPHA / (arm.rank or 1)
        for name, value in trained.items():
            layer, _, rest = name.partition(".")
            if rest.endswith(".A"):
                product = trained[name.removesuffix("A") + "B"] @ value
                made[f"{layer}.weight"] = base[f"{layer}.weight"] + scale * product
            elif not rest.endswith(".B"):
                made[name] = value
        return made

    def logits(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        for n in (1, 2):
            x = (x @ w[f"layer{n}.weight"].T + w[f"layer{n}.bias"]).clamp(min=0)
        return x @ w["layer3.weight"].T + w["layer3.bias"]

    optimizer = torch.optim.Adam(trained.values(), rate)
    for batch in batches(4, seed):
        loss = reference_loss(method, logits(batch[0], weights()), logits(batch[0], base), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights().items()}


@pytest.mark.parametrize("name", ["full", "weights-layer2", "lora-2", "lora-3-biases-layer1"])
def test_a_training_in_a_stack_is_that_training_alone(name):
    """Each training of a stack ends as a separate one of a dense network, for every method."""
    torch.manual_seed(0)
    arm, starts, seeds = Arm.of(name), bases(2), [5, 6]
    stack = Stack(arm, starts, HIDDEN, RATES, len(METHODS), ALPHA, seeds)
    first = {key: value.detach().clone() for key, value in stack.trained.items()}
    for both in zip(*(batches(4, seed) for seed in seeds), strict=True):
        inputs, labels, uniform = (torch.stack(part) for part in zip(*both, strict=True))
        draw = Draw(inputs, labels, uniform, stack.base_logits(inputs))
        stack.step(losses(list(METHODS), stack.logits(inputs), draw))
    sizes = stack.relative_sizes()
    probe = torch.randn(3, 785, dtype=torch.float64)
    logits = stack.logits(probe)
    for r, rate in enumerate(RATES):
        for s, (base, seed) in enumerate(zip(starts, seeds, strict=True)):
            for m, method in enumerate(METHODS):
                start = {key: value[r, s, m] for key, value in first.items()}
                alone = separately(arm, base, start, rate, method, seed)
                model = network(HIDDEN).double()
                model.load_state_dict(alone)
                assert_close(logits[r, s, m], model(probe), rtol=1e-6, atol=1e-8)
                for number in (1, 2, 3):
                    W = base[f"layer{number}.weight"]
                    expected = (alone[f"layer{number}.weight"] - W).norm() / W.norm()
                    assert_close(sizes[r, s, m, number - 1], expected, rtol=1e-6, atol=1e-8)


SETTINGS = {"seeds": 2}


def row(arm: str, base: int, kl: list[float], fashion: list[float], **more: Any) -> dict[str, Any]:
    """Return the row of a training with these checkpoints."""
    found = {"stage": "tuned", "cell": arm, "method": "oracle", "base_seed": base, "rate": 1e-3}
    found |= {"steps": list(range(len(kl))), "kl": kl, "kl_fashion": kl, "fashion": fashion}
    found |= {"parity": [0.95] * len(kl), "sizes": [[x, 2 * x, 1.0] for x in kl]}
    return {**found, **more}


def run_of(*rows: dict[str, Any]) -> RunDirectory:
    bases = [
        {"stage": "base", "base_seed": base, "parity": 0.9, "fashion": 0.8} for base in range(2)
    ]
    return RunDirectory(Path(), SETTINGS, {}, [*bases, *rows])


KLS = [0.02 * k for k in range(1, 40)]


def test_the_excess_is_the_height_above_full():
    """LoRA 5 points above full's own curve has an excess of 5 in each part."""
    rows = []
    for base in range(2):
        kept = [0.8 - 0.01 * (base + 20 * kl + 10 * kl**2) for kl in KLS]
        rows += [row("full", base, KLS, kept), row("lora-8", base, KLS, [x - 0.05 for x in kept])]
    found = Found(run_of(*rows))
    assert found.adapters == ["lora-8"]
    assert_close(torch.tensor(found.fits("full").values), torch.ones(2))
    for part in ((0.0, 0.05), (0.15, 0.4)):
        for method in (None, "oracle"):
            excess = found.excess("lora-8", part, method)
            assert_close(torch.tensor(excess.values), torch.full((2,), 5.0))
    assert found.excess("lora-8", (1.0, 3.0)).values == ()
    share, offset = found.explained([lambda one: [one.kl, one.kl**2]])
    assert_close(torch.tensor(offset.values), torch.full((2,), 5.0))
    assert max(share.values) < 1


def test_diverged_trainings_and_large_kl_do_not_count():
    """A value that is not finite, parity below the base's at the end, or a large KL excludes."""
    same = [0.7, 0.7]
    worse_at_first = row("full", 0, [0.2, 0.3], same, parity=[0.5, 0.95])
    worse = row("full", 0, [0.4, 0.5], same, parity=[0.95, 0.89])
    infinite = {**row("full", 0, [0.6, 0.7], same), "kl": [None, 0.7]}
    large = row("full", 0, [0.8, HIGHEST + 0.1], same)
    found = Found(run_of(worse_at_first, worse, infinite, large))
    assert [one.kl for one in found.rows] == [0.2, 0.3, 0.8]
    assert (found.total, found.diverged, found.beyond) == (8, 4, 1)


def test_the_command_trains_continues_and_reports(tmp_path, capsys):
    """The small preset runs without any data set; run again, it trains nothing."""
    words = ["razor", "--preset", "small", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    run = RunDirectory.read(tmp_path / "run")
    settings = RazorSettings.of_preset("small")
    assert len(run.rows) == 2 + 2 * 3 * 3 * len(METHODS)
    assert len(run.rows[-1]["kl"]) == settings.finetuning.checkpoints
    first = capsys.readouterr().out
    assert "Rule of exclusion" in first
    assert main([*words, "--together", "2"]) == 0
    assert "0 stages remaining" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() in first
    assert (tmp_path / "run" / "razor.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "value"), [("arms", "lora-0"), ("arms", "full-layer4"), ("rates", "1e-3,1e-3")]
)
def test_options_that_are_not_allowed(option, value):
    """An unknown arm, a layer that the network lacks, and a repeated rate are refused."""
    with pytest.raises(StudyError, match=f"--{option} must be"):
        RazorSettings.of_preset("small", **{option: value})
