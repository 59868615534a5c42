"""Training steps and verbs on a Llama of a billion parameters, beside PEFT.

The model has random weights in bfloat16 and an adapter on every linear layer, lm_head included. All
contestants get the same factors and are checked against a dense float32 model. They are then timed
in interleaved rounds. A training step is forward, backward and AdamW on the factors. The floor is
the frozen model with the gradient of its embedded input. Memory is the peak increase during a step.
Verbs are timed once each, on one model per library.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .big_model_verbs import attach_on_meta, paramlora_verbs, peft_verbs
from .harness import options as shared
from .harness.cases import relative_error
from .harness.contestants import Contestant, Factors, linears, select, set_factors
from .harness.llama import SHAPES, SHAPES_HELP, llama
from .harness.results import Row, Table, append, machine, summarized
from .harness.timing import interleaved, peak_bytes, timed_call

BACKEND = "inductor"
MODES = ("eager", "checkpointed", "compiled")
REPEATS = 3  # steps of a contestant in each round
# Upper bound of the relative error. Rounding to bfloat16 at every layer stays below it.
BOUND = 0.1
EXAMPLES = """\
examples:
  python -m benchmarks big-model --verbs
  python -m benchmarks big-model --model wide --modes compiled
  python -m benchmarks big-model --model tiny --device cpu --modes eager --batch 2 --length 16
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    what("--model", choices=SHAPES, default="deep", help=SHAPES_HELP)
    modes = ", ".join(MODES)
    default = ["eager", "checkpointed"]
    what("--modes", nargs="*", choices=MODES, default=default, metavar="MODE", help=modes)
    shared.add_only(what, default=["paramlora", "PEFT", "PEFT, one dtype"])
    what("--verbs", action="store_true", help="also the verbs, and attaching on the meta device")
    shared.add_sizes(parser.add_argument_group("sizes").add_argument, 4, "sequences in a batch")
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_device(how)
    shared.add_rounds(how, 5, f"interleaved rounds of {REPEATS} steps")
    shared.add_file(parser.add_argument_group("results").add_argument, "runs/big-model.jsonl")


def run(options: argparse.Namespace) -> None:
    """Measure verbs and training steps, write their rows and print two tables."""
    contestants = select(options.only)
    base = llama(options.model, options.device)
    vocabulary, size = SHAPES[options.model]["vocab_size"], (options.batch, options.length)
    ids = torch.randint(vocabulary, size, device=options.device)
    about = {
        "model": options.model,
        "torch": torch.__version__,
        "machine": machine(ids.device.type),
    }
    rows: list[Row] = []

    def keep(new: list[Row]) -> None:
        rows.extend(new)
        append(options.out, [row | about for row in new])

    if options.verbs:
        keep(paramlora_verbs(base, options.rank, ids))
        keep(attach_on_meta(partial(llama, options.model, "meta"), base, options.rank, ids))
        if any(contestant.package == "peft" for contestant in contestants):
            keep(peft_verbs(base, options.rank, ids))
    for mode in options.modes:
        keep(measure(base, contestants, mode, ids, options.rank, options.rounds))
    print("\n\n".join(table.text() for table in tables(rows)))


@dataclass
class Entry:
    """A contestant that is ready to be trained: its model, factors and optimizer."""

    contestant: Contestant
    model: nn.Module
    factors: Factors
    optimizer: torch.optim.Optimizer | None
    forward: Callable[..., Any]


def factor_values(base: nn.Module, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the float32 factors that all contestants get, by the path of the layer."""
    values = {}
    for path, layer in linears(base).items():
        device = layer.weight.device
        A = torch.randn(rank, layer.in_features, device=device) / layer.in_features**0.5
        values[path] = A, torch.randn(layer.out_features, rank, device=device) * 0.01
    return values


def prepare(
    contestant: Contestant, base: nn.Module, values: dict[str, Any], rank: int, mode: str
) -> Entry:
    """Return a contestant on a copy of the base, checkpointed or compiled if `mode` says so."""
    model = copy.deepcopy(base)
    if mode == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model, factors = contestant.build(model, rank, 2.0 * rank)
    model.train()
    set_factors(factors, values)
    trained = [factor for pair in factors.values() for factor in pair]
    on_gpu = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu) if trained else None
    forward: Any = model
    if mode == "compiled":
        forward = torch.compile(model, dynamic=False, backend=BACKEND)
    return Entry(contestant, model, factors, optimizer, forward)


def train_step(entry: Entry, ids: Tensor) -> Tensor:
    """Make one training step and return its loss."""
    loss = loss_of(entry, ids)
    loss.backward()
    if entry.optimizer is not None:
        entry.optimizer.step()
        entry.optimizer.zero_grad()
    return loss.detach()


def loss_of(entry: Entry, ids: Tensor) -> Tensor:
    """Return the loss of predicting `ids`, (batch, length).

    The embedded input requires a gradient, as it would inside a larger network.
    """
    embed = entry.model.get_input_embeddings()  # type: ignore[operator]
    embedded = embed(ids).detach().requires_grad_()
    return entry.forward(inputs_embeds=embedded, labels=ids).loss


def check(entry: Entry, base: nn.Module, values: dict[str, Any], ids: Tensor) -> float:
    """Return the largest relative error of the loss and the gradients, against dense float32.

    The gradients of all A are compared as one vector, and so are those of all B. In an attention
    that has learned nothing, the gradients of single queries and keys are differences of almost
    equal numbers, whose relative error means little.
    """
    dense = copy.deepcopy(base).float()
    s = 2.0 if entry.factors else 0.0
    for path, layer in linears(dense).items():
        A, B = values[path]
        layer.weight = nn.Parameter(layer.weight + s * B @ A)
    expected = dense(input_ids=ids, labels=ids).loss
    loss = loss_of(entry, ids)
    errors = [relative_error(loss, expected)]
    if entry.factors:
        expected.backward()
        loss.backward()
        found: list[list[Tensor]] = [[], []]  # gradients of all A, of all B
        wanted: list[list[Tensor]] = [[], []]
        for path, factors in entry.factors.items():
            dW = dense.get_parameter(f"{path}.weight").grad  # (out, in)
            assert dW is not None
            A, B = values[path]
            for i, gradient in enumerate((s * B.T @ dW, s * dW @ A.T)):
                factor_gradient = factors[i].grad
                assert factor_gradient is not None
                found[i].append(factor_gradient.float().flatten())
                wanted[i].append(gradient.flatten())
                factors[i].grad = None
        errors += [relative_error(torch.cat(found[i]), torch.cat(wanted[i])) for i in (0, 1)]
    return max(errors)


def measure(
    base: nn.Module, contestants: list[Contestant], mode: str, ids: Tensor, rank: int, rounds: int
) -> list[Row]:
    """Return a row for each contestant: seconds per step, and the memory that a step adds.

    A contestant whose error exceeds BOUND is named on stderr and left out.
    """
    torch._dynamo.reset()
    device = ids.device.type
    values = factor_values(base, rank)
    entries: list[Entry] = []
    rows: list[Row] = []
    for contestant in contestants:
        entry = prepare(contestant, base, values, rank, mode)
        _, first = timed_call(partial(train_step, entry, ids), device)
        set_factors(entry.factors, values)
        # Compiled code is specific to a shape, so it is checked at the shape that is timed.
        error = check(entry, base, values, ids if mode == "compiled" else ids[:1, :64])
        if error > BOUND:
            print(f"{contestant.name}, {mode}, is off by {error:.1e}: not timed", file=sys.stderr)
            continue
        train_step(entry, ids)
        entries.append(entry)
        rows.append(
            {
                "what": "train",
                "mode": mode,
                "contestant": contestant.name,
                "version": contestant.version,
                "parameters": sum(p.numel() for p in base.parameters()),
                "trainable": sum(a.numel() + b.numel() for a, b in entry.factors.values()),
                "shape": list(ids.shape),
                "rank": rank,
                "error": error,
                "first_step_s": first,
                "peak_bytes": peak_bytes(partial(train_step, entry, ids), device),
            }
        )
    losses: dict[str, float] = {}

    def step(entry: Entry) -> None:
        losses[entry.contestant.name] = float(train_step(entry, ids))

    steps = {entry.contestant.name: partial(step, entry) for entry in entries}
    seconds = interleaved(steps, rounds, repeats=REPEATS, device=device)
    for row in rows:
        row |= summarized(seconds[row["contestant"]])
        row["loss"] = losses[row["contestant"]]
        row["ratio"] = row["median_s"] / rows[0]["median_s"]
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """Return the rows as tables of training steps and of verbs, without empty ones."""
    steps = []
    for row in (row for row in rows if row["what"] == "train"):
        size = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        steps.append(
            [
                row["mode"],
                row["contestant"],
                f"{row['median_s'] * 1e3:.1f}",
                f"{row['ratio']:.3f}",
                size,
                f"{row['first_step_s']:.1f}",
                f"{row['error']:.1e}",
            ]
        )
    by_verb: dict[str, dict[str, float]] = {}
    for row in (row for row in rows if row["what"] == "verb"):
        by_verb.setdefault(row["verb"], {})[row["contestant"]] = row["seconds"]
    verbs = [
        [
            verb,
            *(
                f"{seconds[name] * 1e3:.1f}" if name in seconds else "-"
                for name in ("paramlora", "PEFT")
            ),
        ]
        for verb, seconds in by_verb.items()
    ]
    head = ["mode", "contestant", "step ms", "/ floor", "peak GB", "first step s", "error"]
    both = [Table(head, steps), Table(["verb", "paramlora ms", "PEFT ms"], verbs)]
    return [table for table in both if table.rows]
