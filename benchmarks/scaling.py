"""Data-parallel training on several GPUs of one machine, compared with one GPU.

The model is a Llama of `big-model` with an adapter on every linear layer of its blocks, trained
under DDP. The batch size is that of one process, so N processes train on N times as many tokens.
Runs with one process and with all of them alternate. The bytes sent are counted when DDP hands them
to NCCL. The command starts its processes itself; it needs no torchrun.
"""

import argparse
import importlib
import json
import os
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import paramlora as pl
from experiments.harness.parallel import leave

from .harness import options as shared
from .harness.llama import SHAPES, SHAPES_HELP, llama
from .harness.results import append, machine, read
from .harness.timing import timed_call

WARM_UP = 3  # steps before those that are timed
EXAMPLES = """\
examples:
  python -m benchmarks scaling --processes 2
  python -m benchmarks scaling --model tiny --processes 2 --batch 2 --length 8 --steps 2 --rounds 1
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    what("--model", choices=SHAPES, default="deep", help=SHAPES_HELP)
    gpus = max(1, torch.cuda.device_count())
    what("--processes", type=int, default=gpus, help="processes, one per GPU")
    shared.add_sizes(parser.add_argument_group("sizes").add_argument, 8, "sequences per process")
    how = parser.add_argument_group("how to measure").add_argument
    how("--steps", type=int, default=20, help=f"timed steps, after {WARM_UP} to warm up")
    shared.add_rounds(how, 2, "runs with one process and with all of them, in turn")
    shared.add_file(parser.add_argument_group("results").add_argument, "runs/scaling.jsonl")


def run(options: argparse.Namespace) -> None:
    """Measure one process and all of them in turn, write rows, and print the ratio."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(options.rounds):
        for size in sorted({1, options.processes}):
            meet = options.out.resolve().with_name(f".meet-{os.getpid()}-{number}-{size}")
            torch.multiprocessing.spawn(measure, (size, options, str(meet)), nprocs=size)
            meet.unlink(missing_ok=True)
    by_size: dict[int, list[float]] = {}
    for row in read(options.out):
        by_size.setdefault(row["processes"], []).append(row["tokens_per_s"])
    alone, together = median(by_size[1]), median(by_size[options.processes])
    print(f"{options.processes} processes: {together / alone:.2f} times the throughput of one")


def measure(rank: int, size: int, options: argparse.Namespace, meet: str) -> None:
    """Train in one of `size` processes, which find each other by the file `meet`.

    The process of rank 0 appends a row.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    importlib.import_module("torch.distributed.nn.functional")  # first: see harness.parallel.group

    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=size)
    model: Any = llama(options.model, str(device))
    pl.attach(model, pl.LoRA(options.rank), "*_proj")
    parallel: Any = DistributedDataParallel(model)
    sent: list[int] = []
    parallel.register_comm_hook(sent, count_and_average)
    optimizer = torch.optim.AdamW(pl.parameters(model), lr=1e-5, fused=on_gpu)
    shape = (options.batch, options.length)
    ids = torch.randint(SHAPES[options.model]["vocab_size"], shape, device=device)
    step = partial(train_step, parallel, optimizer, ids)
    seconds = [timed_call(step, device.type)[1] for _ in range(WARM_UP + options.steps)]
    taken = median(seconds[WARM_UP:])
    if rank == 0:
        factors = sum(p.nbytes for p in pl.parameters(model))
        row = {
            "processes": size,
            "median_s": taken,
            "tokens_per_s": size * ids.numel() / taken,
            "sent_bytes_a_step": sum(sent) / len(seconds),
            "factor_bytes": factors,
            "base_bytes": sum(p.nbytes for p in model.parameters()) - factors,
            "model": options.model,
            "shape": list(shape),
            "torch": torch.__version__,
            "machine": machine(device.type),
        }
        append(options.out, [row])
        print(json.dumps(row), flush=True)
    del parallel, step
    leave()


def train_step(parallel: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """Make one training step, and wait for the other processes."""
    parallel(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()


def count_and_average(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients as DDP does, and append the bytes that this sends to `sent`."""
    buffer = bucket.buffer()
    sent.append(buffer.numel() * buffer.element_size())
    work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
