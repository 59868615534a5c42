"""Random sequences of verbs on random models, compared with plain dense models.

Each verb is called on a model and on its reference (`reference_model.py`). After every step the two
must agree in outputs, weights, flags, base, buffers, factors and summary. So must a second model
that was copied or loaded from the first.

`make fuzz` runs 10,000 sequences; `python -m tests.verbs.test_stateful --help` has its options.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.other_rules import OtherRules

COMMON = settings(
    deadline=None,
    report_multiple_bugs=False,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PHASES = [Phase.generate, Phase.shrink]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Use one thread: at these sizes more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("_one_thread")
def test_random_sequences_of_verbs() -> None:
    """After any sequence of verbs, a model agrees with its dense reference."""
    run_state_machine_as_test(
        OtherRules,
        settings=settings(
            COMMON, max_examples=200, derandomize=True, stateful_step_count=10, phases=PHASES
        ),
    )


def fuzz(count: int, first: int, batch: int, steps: int, shrink: bool) -> None:
    """Run sequences in batches; each has a seed of its own, which is printed."""
    start, phases = time.perf_counter(), PHASES if shrink else PHASES[:1]
    for number, done in enumerate(range(0, count, batch), first):
        size = min(batch, count - done)
        machine: Any = type("Machine", (OtherRules,), {})
        try:
            run_state_machine_as_test(
                seed(number)(machine),
                settings=settings(
                    COMMON, max_examples=size, stateful_step_count=steps, phases=phases
                ),
            )
        except BaseException:
            again = f"--seed {number} --sequences {size} --batch {size} --steps {steps}"
            print(f"A fault; {done + machine.count:,} sequences were run: {again}", flush=True)
            raise
        took = time.perf_counter() - start
        print(f"{done + size:,} of {count:,} sequences, {took:.0f} s, seed {number}", flush=True)


def main() -> None:
    """Run as many sequences as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=10_000, help="how many to run")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first batch")
    parser.add_argument("--batch", type=int, default=100, help="sequences for each seed")
    parser.add_argument("--steps", type=int, default=20, help="steps of a sequence, at most")
    parser.add_argument("--no-shrink", action="store_true", help="print the first fault as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    fuzz(options.sequences, options.seed, options.batch, options.steps, not options.no_shrink)
    print(
        f"{options.sequences:,} sequences of up to {options.steps} steps: "
        "the model agreed with its reference after every step"
    )


if __name__ == "__main__":
    main()
