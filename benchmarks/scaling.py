"""Training by several GPUs of one machine, beside one: throughput, and what is communicated.

    python -m benchmarks.scaling --processes 2

A Llama of `benchmarks.big_model` with an adapter on every linear layer of its blocks, trained by
DDP: each process has the same batch size, so that so many processes see so many times as much.
The processes are run alone and together, in turn. Communicated bytes are counted where DDP hands
them to NCCL.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import paramlora as pl

from .big_model import SHAPES, llama
from .harness.measure import now


def counting(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients as DDP does, and take down how many bytes that sends."""
    buffer = bucket.buffer()
    sent.append(buffer.numel() * buffer.element_size())
    work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def measure(rank: int, size: int, options: argparse.Namespace, meet: str) -> None:
    """Train in one of `size` processes; the first appends a row."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=size)
    model: Any = llama(options.model, str(device))
    pl.attach(model, pl.LoRA(options.rank), "*_proj")
    parallel: Any = DistributedDataParallel(model)
    sent: list[int] = []
    parallel.register_comm_hook(sent, counting)
    optimizer = torch.optim.AdamW(pl.parameters(model), lr=1e-5, fused=on_gpu)
    shape = (options.batch, options.length)
    ids = torch.randint(SHAPES[options.model]["vocab_size"], shape, device=device)
    seconds = []
    for step in range(options.steps + 3):
        began = now(device.type)
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        if step >= 3:
            seconds.append(now(device.type) - began)
    if rank == 0:
        factors = sum(p.nbytes for p in pl.parameters(model))
        row = {
            "processes": size,
            "median_s": median(seconds),
            "tokens_per_s": size * ids.numel() / median(seconds),
            "sent_bytes_a_step": sum(sent) / (options.steps + 3),
            "factor_bytes": factors,
            "base_bytes": sum(p.nbytes for p in model.parameters()) - factors,
            "model": options.model,
            "shape": list(shape),
            "torch": torch.__version__,
            "machine": torch.cuda.get_device_name() if on_gpu else "cpu",
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="deep", help="its shape [deep]")
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--batch", type=int, default=8, help="sequences of a process [8]")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each [1024]")
    parser.add_argument("--rank", type=int, default=16, help="r [16]")
    parser.add_argument("--steps", type=int, default=20, help="timed steps [20]")
    parser.add_argument("--rounds", type=int, default=2, help="alone and together so often [2]")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.jsonl"), help="rows")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(options.rounds):
        for size in sorted({1, options.processes}):
            meet = options.out.resolve().with_name(f".meet-{os.getpid()}-{number}-{size}")
            torch.multiprocessing.spawn(measure, (size, options, str(meet)), nprocs=size)
            meet.unlink(missing_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    by_size: dict[int, list[float]] = {}
    for row in rows:
        by_size.setdefault(row["processes"], []).append(row["tokens_per_s"])
    alone, together = median(by_size[1]), median(by_size[options.processes])
    print(f"{options.processes} processes: {together / alone:.2f} times the throughput of one")


if __name__ == "__main__":
    main()
