"""Training steps on a Llama of a billion parameters with a quantized base, beside PEFT.

The model has random weights. Its linear layers, lm_head excluded, are quantized by torchao or
bitsandbytes if they are installed, and by int4 codes that need neither. paramlora and PEFT get the
same factors at those layers. They are compared with each other, and timed in interleaved rounds. A
training step is forward, backward and AdamW on the factors. The floor is the frozen model with the
gradient of its embedded input. "base GB" is the memory of the model alone, "peak GB" the peak
increase during a step.
"""

import argparse
import gc
import importlib.util
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from .big_model import Entry, train_step
from .harness import options as shared
from .harness.cases import relative_error
from .harness.contestants import Built, Contestant, floor, set_factors
from .harness.llama import SHAPES, SHAPES_HELP, llama
from .harness.quantizers import BASES
from .harness.results import Row, Table, append, machine, summarized
from .harness.timing import interleaved, peak_bytes

REPEATS = 3  # steps of a contestant in each round
EXAMPLES = """\
examples:
  python -m benchmarks quantized
  python -m benchmarks quantized --bases "NF4, bitsandbytes" --checkpointed
  python -m benchmarks quantized --model tiny --device cpu --bases int4 --batch 2 --length 16
"""


def paramlora(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt the default target by `paramlora.attach`."""
    sites = pl.attach(model, pl.LoRA(rank, alpha)).sites
    named = dict(model.named_parameters())
    key = "{}.parametrizations.weight.0.factors.default.{}"
    paths = [site.site.removesuffix(".weight") for site in sites]
    return model, {
        path: (named[key.format(path, "A")], named[key.format(path, "B")]) for path in paths
    }


def peft(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt by PEFT's "all-linear"."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    found = {
        path.removeprefix("base_model.model."): (
            m.lora_A["default"].weight,
            m.lora_B["default"].weight,
        )
        for path, m in wrapped.named_modules()
        if hasattr(m, "lora_A")
    }
    return wrapped, found


CONTESTANTS = (
    Contestant("floor", floor),
    Contestant("paramlora", paramlora, "paramlora"),
    Contestant("PEFT", peft, "peft"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    what("--model", choices=SHAPES, default="deep", help=SHAPES_HELP)
    text = "; ".join(BASES) + " (default: those whose package is installed)"
    what("--bases", nargs="+", choices=BASES, metavar="BASE", help=text)
    what("--checkpointed", action="store_true", help="checkpoint the activations of each block")
    shared.add_sizes(parser.add_argument_group("sizes").add_argument, 4, "sequences in a batch")
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_device(how)
    shared.add_rounds(how, 5, f"interleaved rounds of {REPEATS} steps")
    shared.add_file(parser.add_argument_group("results").add_argument, "runs/quantized.jsonl")


def run(options: argparse.Namespace) -> None:
    """Measure each base, write the rows and print a table."""
    size = options.batch, options.length
    ids = torch.randint(SHAPES[options.model]["vocab_size"], size, device=options.device)
    rows: list[Row] = []
    for base in options.bases or BASES:
        if importlib.util.find_spec(BASES[base][0]) is None:
            print(f"{base}: {BASES[base][0]} is not installed", file=sys.stderr)
            continue
        new = measure(base, ids, options)
        about = {"torch": torch.__version__, "machine": machine(ids.device.type)}
        append(options.out, [row | about for row in new])
        rows += new
    print(table(rows).text())


def measure(base: str, ids: Tensor, options: argparse.Namespace) -> list[Row]:
    """Return a row for each contestant on one form of the base."""
    entries, rows, device = [], [], ids.device.type
    for contestant in CONTESTANTS:
        if not contestant.installed:
            continue
        before = _allocated(device)
        model = _model(base, options)
        size = _allocated(device) - before
        entries.append(_entry(contestant, model, options.rank))
        rows.append(
            {
                "base": base,
                "model": options.model,
                "checkpointed": options.checkpointed,
                "contestant": contestant.name,
                "version": contestant.version,
                "layers": len(entries[-1].factors),
                "shape": list(ids.shape),
                "rank": options.rank,
                "base_bytes": size,
            }
        )
    for row, entry in zip(rows, entries, strict=True):
        row |= _agreement(entry, entries, ids[:1, :64])
        train_step(entry, ids)
        row["peak_bytes"] = peak_bytes(partial(train_step, entry, ids), device)
    steps = {entry.contestant.name: partial(train_step, entry, ids) for entry in entries}
    seconds = interleaved(steps, options.rounds, repeats=REPEATS, warm_up=1, device=device)
    for row in rows:
        row |= summarized(seconds[row["contestant"]])
        row["ratio"] = row["median_s"] / rows[0]["median_s"]
    return rows


def _model(base: str, options: argparse.Namespace) -> Any:
    model: Any = llama(options.model, options.device)
    BASES[base][1](model.model)
    model.requires_grad_(False)
    if options.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return model


def _allocated(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _entry(contestant: Contestant, model: nn.Module, rank: int) -> Entry:
    """Return a contestant with factors that depend on the path of the layer alone."""
    model, factors = contestant.build(model, rank, 2.0 * rank)
    values, generator = {}, torch.Generator().manual_seed(0)
    for path, (A, B) in sorted(factors.items()):
        a = torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5
        values[path] = a, torch.randn(B.shape, generator=generator) * 0.01
    set_factors(factors, values)
    trained = [factor for pair in factors.values() for factor in pair]
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused) if trained else None
    return Entry(contestant, model.train(), factors, optimizer, model)


def _agreement(entry: Entry, entries: list[Entry], ids: Tensor) -> Row:
    """Return how far the logits are from paramlora's, and whether off it computes the floor's."""
    first = next(one for one in entries if one.contestant.name == "paramlora")
    with torch.no_grad():
        logits = entry.model(input_ids=ids).logits
        found: Row = {"error": None, "off_is_base": None}
        if entry.factors:
            found["error"] = relative_error(logits, first.model(input_ids=ids).logits)
        if entry is first:
            with pl.disabled(entry.model):
                off = entry.model(input_ids=ids).logits
            found["off_is_base"] = torch.equal(off, entries[0].model(input_ids=ids).logits)
    return found


def table(rows: list[Row]) -> Table:
    """Return the rows as a table."""
    cells = [
        [
            row["base"],
            row["contestant"],
            str(row["layers"]),
            f"{row['base_bytes'] / 1e9:.2f}",
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['ratio']:.3f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            "-" if row["error"] is None else f"{row['error']:.1e}",
            {None: "-", True: "yes", False: "no"}[row["off_is_base"]],
        ]
        for row in rows
    ]
    head = ["base", "contestant", "layers", "base GB", "step ms", "/ floor", "peak GB"]
    return Table([*head, "vs paramlora", "off is base"], cells)
