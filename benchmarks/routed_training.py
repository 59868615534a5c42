"""Training several adapters at once by `pl.routed`, compared with as many separate trainings.

Both train the same adapters from the same factors, on the same batches, with Adam. Before they are
timed, the gradients of the first step are compared. A ratio is the time of all adapters at once
over that of all separate trainings, in one round. Rows keep its mean and standard deviation over
the rounds, and how far apart the factors ended, relative to the way that training moved them.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

import paramlora as pl

from .harness.cases import BOUNDS, relative_error
from .harness.jobs import MODELS, Job, job_of
from .harness.results import Row, Table, append, machine, summarized
from .harness.timing import interleaved, peak_bytes

RATE = 1e-3


def add_options(add: Callable[..., argparse.Action]) -> None:
    """Add the options of `--train`."""
    add("--train", action="store_true", help="train adapters at once, and separately")
    add("--models", nargs="+", choices=MODELS, default=["mlp", "llama"], help="models to adapt")
    add("--steps", type=int, default=60, help="steps of a training")
    text = "for minilm: folder of a BERT (default: random weights of MiniLM's shape)"
    add("--checkpoint", metavar="DIR", help=text)
    text = "for minilm: folder with the SMS Spam Collection (default: random tokens)"
    add("--data-dir", metavar="DIR", help=text)


def run(options: argparse.Namespace) -> None:
    """Measure all cells, write their rows and print a table."""
    defaults = {"mlp": (10, 100), "minilm": (8,), "llama": (1,)}
    cells = [
        (name, adapters, n)
        for name in options.models
        for n in options.batches or defaults[name]
        for adapters in options.adapters or (16, 64)
    ]
    lines = []
    for name, adapters, n in tqdm(cells, unit="cell", disable=None):
        row = measure(job_of(name, adapters, n, options), options)
        append(options.out / "results.jsonl", [row])
        lines.append(
            [
                row["model"],
                f"{adapters}",
                f"{n}",
                f"{row['separate_s'] * 1e3:.1f}",
                f"{row['at_once_s'] * 1e3:.1f}",
                f"{row['ratio']:.2f} ± {row['sd']:.2f}",
                f"{row['ratio'] * adapters:.1f}",
                f"{row['difference']:.0e}",
            ]
        )
    head = ["model", "adapters", "rows of\neach", "separate,\nms a step", "at once", "ratio"]
    print(Table([*head, "price,\nadapters", "difference"], lines).text())


def measure(job: Job, options: argparse.Namespace) -> Row:
    """Return the row of a job.

    Raises:
        AssertionError: if the gradients of the first step differ by more than rounding explains.
    """
    device, (adapters, n) = options.device, job.batches[0][0].shape[:2]
    separate, at_once = Separate(job, adapters), AtOnce(job, adapters)
    pairs = zip(separate.first_gradients(), at_once.first_gradients(), strict=True)
    error = max(relative_error(found, expected) for expected, found in pairs)
    bound = BOUNDS[next(job.base.parameters()).dtype]
    assert error < bound, f"gradients are off by {error:.1e} in {job.name}; not timed"
    difference = relative_error(at_once.moved(), separate.moved())
    peaks = [peak_bytes(contestant.train, device) for contestant in (separate, at_once)]
    seconds = interleaved(
        {"separate": separate.train, "at_once": at_once.train},
        options.rounds,
        device=device,
        clock=options.clock,
    )
    ratios = [b / a for a, b in zip(seconds["separate"], seconds["at_once"], strict=True)]
    steps = len(job.batches)
    return {
        "suite": f"{device}-rows-training",
        "model": job.name,
        "adapters": adapters,
        "n": n,
        "rank": job.rank,
        "steps": steps,
        **{f"{name}_s": summarized(v)["median_s"] / steps for name, v in seconds.items()},
        "ratio": statistics.mean(ratios),
        "sd": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
        "rounds": len(ratios),
        "difference": difference,
        "peak_bytes": peaks,
        "clock": options.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine(device),
    }


class AtOnce:
    """All adapters on one model, trained in one pass."""

    def __init__(self, job: Job, adapters: int) -> None:
        self.job, self.model = job, copy.deepcopy(job.base)
        self.names = [f"a{i}" for i in range(adapters)]
        for name, seed in zip(self.names, range(adapters), strict=True):
            attach(self.model, job, name, seed)
        pl.unfreeze(self.model)
        self.parameters = [p for name in self.names for p in pl.parameters(self.model, name)]
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        n = job.batches[0][0].shape[1]
        self.ids = torch.arange(adapters).repeat_interleave(n)

    def train(self) -> None:
        """Train from the start."""
        put(self.parameters, self.start)
        optimizer = torch.optim.Adam(self.parameters, RATE, fused=True)
        with pl.routed(self.model, self.ids, *self.names):
            for inputs, targets in self.job.batches:
                self._loss(inputs, targets).backward()
                optimizer.step()
                optimizer.zero_grad()

    def first_gradients(self) -> list[Tensor]:
        """Return the gradients of the first step, one vector for each adapter."""
        with pl.routed(self.model, self.ids, *self.names):
            grads = torch.autograd.grad(self._loss(*self.job.batches[0]), self.parameters)
        size = len(grads) // len(self.names)
        return [vector(grads[i : i + size]) for i in range(0, len(grads), size)]

    def moved(self) -> Tensor:
        """Train, and return the change of all factors as one vector."""
        self.train()
        return changes(self.parameters, self.start)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # The sum of each adapter's mean: the gradient of an adapter is that of its own mean.
        outputs = self.model(inputs.flatten(0, 1))
        return self.job.losses(outputs, targets.flatten(0, 1)).sum() / inputs.shape[1]


class Separate:
    """One adapter on a model, trained once for each seed."""

    def __init__(self, job: Job, adapters: int) -> None:
        self.job, self.model = job, copy.deepcopy(job.base)
        self.starts = []
        for seed in range(adapters):
            if seed:
                pl.detach(self.model, "a")
            attach(self.model, job, "a", seed)
            self.starts.append([p.detach().clone() for p in pl.parameters(self.model, "a")])
        pl.activate(self.model, "a")
        pl.unfreeze(self.model)
        self.parameters = pl.parameters(self.model, "a")

    def train(self) -> None:
        """Train each adapter from its start."""
        for _ in self._trainings():
            pass

    def first_gradients(self) -> list[Tensor]:
        """Return the gradients of the first step of each training, as a vector."""
        found = []
        inputs, targets = self.job.batches[0]
        for i, start in enumerate(self.starts):
            put(self.parameters, start)
            loss = self._loss(inputs[i], targets[i])
            found.append(vector(torch.autograd.grad(loss, self.parameters)))
        return found

    def moved(self) -> Tensor:
        """Train, and return the changes of all factors as one vector."""
        ways = [changes(self.parameters, self.starts[i]) for i in self._trainings()]
        return torch.cat(ways)

    def _trainings(self) -> Iterator[int]:
        """Train one adapter after the other, and yield its index after its training."""
        for i, start in enumerate(self.starts):
            put(self.parameters, start)
            optimizer = torch.optim.Adam(self.parameters, RATE, fused=True)
            for inputs, targets in self.job.batches:
                self._loss(inputs[i], targets[i]).backward()
                optimizer.step()
                optimizer.zero_grad()
            yield i

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.job.losses(self.model(inputs), targets).mean()


def attach(model: nn.Module, job: Job, name: str, seed: int) -> None:
    """Attach an adapter with random factors, so that no gradient of a first step is zero."""
    generator = torch.Generator(job.batches[0][0].device).manual_seed(seed)
    pl.attach(model, pl.LoRA(job.rank), job.targets, name=name, activate="no", generator=generator)
    with torch.no_grad():
        for key, factor in pl.state_dict(model, name).items():
            if key.endswith(".B"):
                factor.normal_(std=0.01, generator=generator)


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def changes(parameters: list[nn.Parameter], start: list[Tensor]) -> Tensor:
    """Return parameters less their values at the start, as one vector."""
    pairs = zip(parameters, start, strict=True)
    return vector([p.detach() - value for p, value in pairs])


def vector(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])
