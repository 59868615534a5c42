"""Many threads, tasks and requests at once: each row gets the adapters of its own block.

`make fuzz` runs the full sizes; `python -m tests.stack.test_load` prints their figures.
"""

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.threads import BLOCKS, THREADS, expected, in_threads, two_adapters


def wanted_of(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return the outputs that each of BLOCKS must give, from the dense reference."""
    return [expected(model, x, rows) for _, rows in BLOCKS]


def right(model: nn.Module, x: Tensor, want: Tensor) -> int:
    """Return the number of rows, which all must be right."""
    assert torch.allclose(model(x), want, rtol=1e-10)
    return len(want)


def run_threads(forwards: int) -> int:
    """Run 8 threads with blocks of their own on two models at once; return the rows.

    Half of the forwards are in one block of each model, the others each in new blocks.
    """
    first, x = two_adapters()
    second, _ = two_adapters()
    with torch.no_grad():
        for parameter in pl.parameters(second):
            parameter.mul_(-2)
    wanted = [wanted_of(model, x) for model in (first, second)]

    @torch.no_grad()
    def run(i: int) -> int:
        rows, mine = 0, [(first, i, wanted[0][i]), (second, -1 - i, wanted[1][-1 - i])]
        with ExitStack() as stack:
            for model, number, _ in mine:
                stack.enter_context(BLOCKS[number][0](model))
            for turn in range(forwards // 2):
                model, _, want = mine[turn % 2]
                rows += right(model, x, want)
        for turn in range(forwards // 2):
            model, number, _ = mine[turn % 2]
            number = (number + turn) % len(BLOCKS)
            with BLOCKS[number][0](model):
                rows += right(model, x, wanted[turn % 2][number])
        return rows

    with unchanged(first), unchanged(second):
        return sum(in_threads(run))


def run_tasks(count: int, turns: int) -> int:
    """Run asyncio tasks with blocks of their own, which interleave after each forward."""
    model, x = two_adapters()
    wanted = wanted_of(model, x)

    async def task(i: int) -> int:
        rows = 0
        for turn in range(turns):
            number = (i + turn) % len(BLOCKS)
            with BLOCKS[number][0](model):
                for _ in range(3):
                    await asyncio.sleep(0)
                    rows += right(model, x, wanted[number])
        return rows

    async def main() -> list[int]:
        return await asyncio.gather(*[task(i) for i in range(count)])

    with unchanged(model), torch.no_grad():
        return sum(asyncio.run(main()))


@contextmanager
def served(model: nn.Module, x: Tensor) -> Iterator[str]:
    """Serve a model on the loopback interface; a request names the block to compute in."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = int(self.path.lstrip("/"))
            with torch.no_grad(), BLOCKS[number][0](model):
                body = json.dumps(model(x).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):  # one thread for each request
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_server(requests: int) -> int:
    """Send requests from 8 clients to a server with a thread for each; return the rows."""
    model, x = two_adapters()
    wanted = wanted_of(model, x)
    # Without a proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(i: int) -> int:
        number = i % len(BLOCKS)
        with opener.open(f"{address}/{number}", timeout=60) as answer:
            found = torch.tensor(json.load(answer), dtype=torch.float64)
        assert torch.allclose(found, wanted[number], rtol=1e-10)
        return len(found)

    with unchanged(model), served(model, x) as address, ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(ask, range(requests)))


Run = Callable[[], Any]
# Each load in the size of the tests, and in full.
LOADS: dict[str, tuple[Run, Run, str]] = {
    "threads": (
        lambda: run_threads(400),
        lambda: run_threads(10_000),
        "8 threads x 10,000 forwards on two models",
    ),
    "tasks": (
        lambda: run_tasks(100, 2),
        lambda: run_tasks(100, 100),
        "100 asyncio tasks x 300 forwards",
    ),
    "server": (lambda: run_server(100), lambda: run_server(1000), "1,000 HTTP requests"),
}


@pytest.mark.parametrize("load", LOADS)
def test_load(load: str) -> None:
    """Under load, each row is that of its block, and the state afterwards is the one before."""
    assert LOADS[load][0]() > 0


def main() -> None:
    """Run all loads in full, and print how many rows were compared."""
    torch.set_num_threads(1)
    for _, full, what in LOADS.values():
        start = time.perf_counter()
        rows = full()
        took = time.perf_counter() - start
        print(f"{what}: {rows:,} rows, none wrong, the state as before, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
