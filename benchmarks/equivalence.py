"""paramlora and PEFT train the same adapter: equal losses, with time and memory beside them.

A Llama with random weights learns sequences in which each token is its predecessor plus a step.
Both libraries get the same factors, the same batches and the same optimizer, so their losses may
differ by rounding only. In float64 they agree to many digits for hundreds of steps. In float32
Adam amplifies the rounding of tiny gradients, and the losses part slowly.

PEFT's own method comparison trains Llama 3.2 3B and is no part of its package. This command stands
for a row there: the same training, and time and memory beside it.

Each library gives a row in results.jsonl, with all losses. Steps are timed in interleaved rounds.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .harness import options as shared
from .harness.contestants import CONTESTANTS, Contestant, linears, set_factors
from .harness.llama import SHAPES, SHAPES_HELP, llama
from .harness.results import Row, Table, append, machine, summarized
from .harness.timing import interleaved, peak_bytes

ALPHA, VOCABULARY = 16.0, 32
EXAMPLES = """\
examples:
  python -m benchmarks equivalence
  python -m benchmarks equivalence --dtype float64 --kind DoRA
  python -m benchmarks equivalence --shape deep --device cuda --steps 50
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    what("--shape", choices=SHAPES, default="tiny", help=SHAPES_HELP)
    what("--rank", type=int, default=8, help="rank of the adapters")
    what("--kind", choices=["LoRA", "DoRA"], default="LoRA", help="kind of the adapters")
    what("--steps", type=int, default=200, help="training steps")
    what("--batch", type=int, nargs=2, default=[8, 32], help="sequences, and tokens in each")
    what("--dtype", choices=["float32", "float64"], default="float32", help="dtype of the model")
    shared.add_device(what)
    shared.add_clock(parser.add_argument_group("how to measure").add_argument)
    shared.add_folder(parser.add_argument_group("results").add_argument)


def run(options: argparse.Namespace) -> None:
    """Train with both libraries, write their rows and print a table."""
    rows = measure(options)
    append(options.out / "results.jsonl", rows)
    print(table(rows).text())


def measure(options: argparse.Namespace) -> list[Row]:
    """Return a row for each library."""
    base = llama(options.shape, options.device).to(getattr(torch, options.dtype))
    batches = sequences(options.steps, *options.batch).to(options.device)
    ending = ", DoRA" if options.kind == "DoRA" else ""
    contestants = [c for c in CONTESTANTS if c.name in (f"paramlora{ending}", f"PEFT{ending}")]
    steps: dict[str, Callable[[], None]] = {}
    losses: dict[str, list[Tensor]] = {c.name: [] for c in contestants}
    for contestant in contestants:
        found = losses[contestant.name]
        steps[contestant.name] = trainer(contestant, base, batches, options.rank, found)
    device = options.device
    seconds = interleaved(steps, options.steps, device=device, clock=options.clock)
    first = losses[contestants[0].name]
    return [
        {
            "suite": "equivalence",
            "shape": options.shape,
            "rank": options.rank,
            "dtype": options.dtype,
            "batch": options.batch,
            "steps": options.steps,
            "contestant": contestant.name,
            "version": contestant.version,
            "losses": [float(loss) for loss in losses[contestant.name]],
            "largest_difference": max(
                abs(float(a - b)) for a, b in zip(first, losses[contestant.name], strict=True)
            ),
            **summarized(seconds[contestant.name]),
            "clock": options.clock,
            "peak_bytes": peak_bytes(steps[contestant.name], device),
            "torch": torch.__version__,
            "machine": machine(device),
        }
        for contestant in contestants
    ]


def sequences(steps: int, count: int, length: int) -> Tensor:
    """Return tokens, (steps, count, length): each is its predecessor plus 1, 2, 3 or 4."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(VOCABULARY, (steps, count, 1), generator=generator)
    stride = torch.randint(1, 5, (steps, count, 1), generator=generator)
    return (start + stride * torch.arange(length)) % VOCABULARY


def trainer(
    contestant: Contestant, base: nn.Module, batches: Tensor, rank: int, losses: list[Tensor]
) -> Callable[[], None]:
    """Return a function that makes the next training step and appends its loss to `losses`."""
    layers = linears(base)
    model, factors = contestant.build(copy.deepcopy(base), rank, ALPHA)
    set_factors(factors, start(layers, rank))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # No weight decay. For DoRA it would differ: PEFT trains the magnitudes, and paramlora trains
    # their changes.
    optimizer = torch.optim.Adam(trained, lr=3e-3)

    def step() -> None:
        ids = batches[len(losses) % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    return step


def start(layers: dict[str, nn.Linear], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors that both libraries start from: a random A, and B = 0."""
    generator = torch.Generator().manual_seed(2)
    return {
        path: (
            torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5,
            torch.zeros(layer.out_features, rank),
        )
        for path, layer in layers.items()
    }


def table(rows: list[Row]) -> Table:
    """Return a line per library."""
    head = ["library", "first loss", "last loss", "largest difference", "ms per step", "MiB"]
    return Table(
        head,
        [
            [
                row["contestant"],
                f"{row['losses'][0]:.6f}",
                f"{row['losses'][row['steps'] - 1]:.6f}",
                f"{row['largest_difference']:.1e}",
                f"{row['median_s'] * 1e3:.2f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            ]
            for row in rows
        ],
    )
