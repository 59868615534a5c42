"""Blocks belong to the thread or asyncio task that entered them."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import paramlora as pl
from paramlora.site.find import stacks_in
from tests.support.helpers import unchanged
from tests.support.threads import BLOCKS, THREADS, dense, expected, in_threads, two_adapters
from tests.support.versions import torch_before


def test_gradients_of_threads() -> None:
    """Factors get the gradients of the blocks in which the forwards ran."""
    model, x = two_adapters()
    parameters = pl.parameters(model)
    with_gradient = [0, 1, 3, 5, 6, 7]  # an adapter is on in these blocks

    def run(i: int) -> list[Any]:
        with BLOCKS[i][0](model):
            y = model(x).square().sum()
        return list(torch.autograd.grad(y, parameters, allow_unused=True, materialize_grads=True))

    alone = [run(i) for i in with_gradient]
    together = in_threads(lambda i: run(with_gradient[i]), len(with_gradient))
    assert_close(together, alone)


def test_thread_without_a_block() -> None:
    """A thread without a block raises inside of another's, and says how to do it."""
    model, x = two_adapters()
    message = (
        r"thread that has entered no block .* is inside of using\(\) on the same model; enter a "
        r"block in this thread too, or .*copy_context\(\).run"
    )
    with pl.using(model, "b"), ThreadPoolExecutor(1) as pool:
        for read in (lambda: model(x), lambda: model[0].weight):
            with pytest.raises(pl.StateError, match=message):
                pool.submit(read).result()
        found = pool.submit(contextvars.copy_context().run, model, x).result()
        assert_close(found, dense(model, x, b=1))

        def own() -> Tensor:
            with pl.disabled(model):
                return model(x)

        assert_close(pool.submit(own).result(), dense(model, x))
        assert_close(model(x), dense(model, x, b=1))
    with ThreadPoolExecutor(1) as pool:
        assert_close(pool.submit(model, x).result(), dense(model, x, a=1))


def test_block_on_another_model() -> None:
    """A block on one model, or on a part of it, does not concern the others."""
    model, x = two_adapters()
    other, _ = two_adapters()
    copied = copy.deepcopy(model)
    with pl.using(other, "b"), pl.using(copied, "b"), ThreadPoolExecutor(1) as pool:
        assert_close(pool.submit(model, x).result(), dense(model, x, a=1))
    with pl.disabled(model[1]), ThreadPoolExecutor(1) as pool:
        pool.submit(model[0], x).result()
        with pytest.raises(pl.StateError, match=r"inside of disabled\(\)"):
            pool.submit(model, x).result()


def test_tasks() -> None:
    """Interleaved tasks keep their own blocks; one that is started inside a block is in it."""
    model, x = two_adapters()
    wanted = [expected(model, x, rows) for _, rows in BLOCKS]

    async def in_block(i: int) -> None:
        with BLOCKS[i][0](model):
            for _ in range(20):
                await asyncio.sleep(0)
                assert_close(model(x), wanted[i])

    async def without(want: Tensor) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
            assert_close(model(x), want)

    async def main() -> None:
        tasks = [in_block(i) for i in range(THREADS)]
        await asyncio.gather(*tasks, without(dense(model, x, a=1)))
        with pl.using(model, "b"):
            inside = dense(model, x, b=1)
            await asyncio.gather(without(inside), asyncio.to_thread(lambda: model(x)))
            assert_close(await asyncio.to_thread(model, x), inside)

    with unchanged(model):
        asyncio.run(main())


def test_task_that_outlives_a_block() -> None:
    """A task that was started in a block which has ended raises, until it enters one itself."""
    model, x = two_adapters()

    async def late() -> Tensor:
        await asyncio.sleep(0.01)
        with pytest.raises(pl.StateError, match=r"started inside of using\(\), and that block has"):
            model(x)
        with pl.disabled(model, "a"):
            return model(x)

    async def main() -> Tensor:
        with pl.using(model, "b"):
            task = asyncio.create_task(late())
        assert_close(model(x), dense(model, x, a=1))
        return await task

    assert_close(asyncio.run(main()), dense(model, x))


@contextmanager
def in_generator(block: AbstractContextManager[None]) -> Iterator[None]:
    with block:
        yield


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0)])
def test_leaving_in_any_order(order: tuple[int, ...]) -> None:
    """Leaving removes the block that is left, wherever it is; the others keep their effect."""
    model, x = two_adapters()
    blocks = [
        in_generator(pl.using(model, "b")),
        in_generator(pl.enabled(model, "a")),
        in_generator(pl.using(model, a=3.0)),
    ]
    # The adapters for each set of blocks that is still open.
    wanted: dict[frozenset[int], dict[str, float]] = {
        frozenset(): {"a": 1},
        frozenset({0}): {"b": 1},
        frozenset({1}): {"a": 1},
        frozenset({2}): {"a": 3},
        frozenset({0, 1}): {"a": 1, "b": 1},
        frozenset({0, 2}): {"a": 3},
        frozenset({1, 2}): {"a": 3},
    }
    with unchanged(model):
        for block in blocks:
            block.__enter__()
        still_open = {0, 1, 2}
        for i in order:
            blocks[i].__exit__(None, None, None)
            still_open.remove(i)
            assert_close(model(x), dense(model, x, **wanted[frozenset(still_open)]))


def test_generator_left_by_another_thread() -> None:
    """A block that another thread leaves is over for the thread that entered it too."""
    model, x = two_adapters()

    def rows() -> Iterator[Tensor]:
        with pl.using(model, "b"):
            while True:
                yield model(x)

    generator = rows()
    assert_close(next(generator), dense(model, x, b=1))
    assert_close(model(x), dense(model, x, b=1))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generator.close).result()  # type: ignore[attr-defined]
    assert_close(model(x), dense(model, x, a=1))
    with pl.enabled(model):
        assert_close(model(x), dense(model, x, a=1, b=1))


def test_persistent_verbs_inside() -> None:
    """Verbs inside a block change the model, and show where the block leaves it open."""
    model, x = two_adapters()
    with pl.disabled(model, "a"):
        pl.enable(model)
        pl.scale(model, 2.0)
        assert_close(model(x), dense(model, x, b=2))
        with pl.using(model, b=3.0):
            pl.scale(model, 4.0, "b")
            pl.disable(model, "a")
            assert_close(model(x), dense(model, x, b=3))
        assert_close(model(x), dense(model, x, b=4))
        pl.enable(model, "a")
    assert_close(model(x), dense(model, x, a=2, b=4))


def test_persistent_verbs_of_another_thread() -> None:
    """A verb that another thread calls acts on the model and not on the block."""
    model, x = two_adapters()
    with pl.disabled(model, "a"), ThreadPoolExecutor(1) as pool:
        pool.submit(pl.enable, model).result()
        assert_close(model(x), dense(model, x, b=1))
    assert_close(model(x), dense(model, x, a=1, b=1))


def test_effective_state() -> None:
    """`summary` and `merge` read the state with the block; an independent copy is outside of it."""
    model, x = two_adapters()
    with pl.using(model, b=0.5):
        rows = {row.adapter: (row.active, row.scale) for row in pl.summary(model).sites}
        assert rows == {"a": (False, 1.0), "b": (True, 0.5)}
        copied = copy.deepcopy(model)
        with pl.merged(model):
            assert_close(model(x), dense(model, x, b=0.5))
        assert_close(model(x), dense(model, x, b=0.5))
    assert_close(model(x), dense(model, x, a=1))
    assert_close(copied(x), dense(model, x, a=1))
    with pl.using(model, b=0.5), pl.using(copied, "a"):
        assert_close(copied(x), dense(model, x, a=1))


@contextmanager
def in_another_thread(block: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a block open in another thread."""
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with block:
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("verb", [pl.merge, pl.unmerge, pl.bake])
def test_folding_beside_a_block(verb: Callable[[nn.Module], None]) -> None:
    """Merging, unmerging and baking raise while another thread has a block open."""
    model, _ = two_adapters()
    if verb is pl.bake:
        pl.detach(model, "b")
    if verb is pl.unmerge:
        pl.merge(model)
    message = rf"cannot {verb.__name__} while another thread or task is inside of disabled\(\)"
    names = [] if verb is pl.bake else ["b"]
    refused = pytest.raises(pl.StateError, match=message)
    with in_another_thread(pl.disabled(model, *names)), unchanged(model), refused:
        verb(model)
    verb(model)


def test_checkpointing_keeps_the_blocks() -> None:
    """With `keep_blocks`, a backward after the block recomputes in it, and can be repeated."""
    model, x = two_adapters()
    parameters = pl.parameters(model, "b")
    with pl.using(model, b=0.5):
        expected = torch.autograd.grad(model(x).square().sum(), parameters)
        y = checkpoint(model, x, use_reentrant=False, context_fn=pl.keep_blocks)
    with pl.disabled(model):
        for keep in (True, False):
            found = torch.autograd.grad(y.square().sum(), parameters, retain_graph=keep)
            assert_close(found, expected)
        assert_close(model(x), dense(model, x))
    assert_close(model(x), dense(model, x, a=1))


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_on_a_gpu(reentrant: bool) -> None:
    """The backward of a checkpointed model in a block equals the one without checkpointing.

    There it runs in a thread of autograd, which has entered no block.
    """
    model, x = two_adapters()
    model.cuda()
    x = x.cuda().requires_grad_()
    for block in (pl.disabled(model), pl.using(model, b=0.5), pl.routed(model, [0, 1, -1])):
        with block:
            (expected,) = torch.autograd.grad(model(x).square().sum(), x)
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert x.grad is not None
        assert_close(x.grad, expected)
        x.grad = None


def test_replicas_of_data_parallel() -> None:
    """DataParallel's replicas are refused in words; on a single device none is made."""
    model, x = two_adapters()
    stack: Any = stacks_in(model)[0]
    with unchanged(model), pytest.raises(pl.StateError, match=r"nn.DataParallel cannot replicate"):
        stack._replicate_for_data_parallel()
    assert_close(nn.DataParallel(model)(x), dense(model, x, a=1))


class Toggling(nn.Module):
    """A module whose forward reads its weight at several strengths."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> list[float]:
        outputs = []
        for strength in range(1, 9):
            with pl.using(self, a=torch.tensor(float(strength))):
                outputs.append((x @ self.weight.T).sum().item())
        return outputs


def test_strengths_as_tensors_in_one_forward() -> None:
    """Each strength of a forward has a weight of its own, though a freed tensor's id is reused."""
    model = Toggling()
    pl.attach(model, pl.Delta(), "weight", name="a")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.fill_(1.0)
        assert model(torch.ones(1, 4)) == [12.0 * strength for strength in range(1, 9)]


@pytest.mark.skipif(torch_before("2.7"), reason="two threads that compile can crash torch 2.6")
def test_two_threads_with_blocks_on_a_compiled_model() -> None:
    """Each of two threads computes with its own block, also through one compiled model."""
    torch.compiler.reset()
    model, x = two_adapters()
    compiled = torch.compile(model, backend="eager")
    both_inside = threading.Barrier(2, timeout=30)

    def computed(name: str) -> Tensor:
        with pl.using(model, name):
            both_inside.wait()
            found = compiled(x)
            both_inside.wait()
            return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(computed, "ab"))
    assert_close(found, [dense(model, x, a=1), dense(model, x, b=1)])
