"""Strategies of the random sequences of verbs, and what their rules share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from torch import nn

import paramlora as pl
from tests.support.reference_model import Part

NAMES = "abc"


BAD_NAME = (pl.AdapterNameError, r"^no adapter '.' here; attached are: ")


IS_MERGED = (pl.StateError, r"^cannot .* adapter '.' while it is merged; unmerge first$")


ALREADY_MERGED = (pl.StateError, r"^adapter '.' is merged already; unmerge first$")


IS_OFF = (pl.StateError, r"^adapter '.' is switched off")


NOTHING = (pl.StateError, r"^nothing to merge")


IS_TAKEN = (pl.AdapterNameError, r"^an adapter '.' is attached already")


Refusal = tuple[type[Exception], str]


def now(strategy: Callable[[Any], st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return a strategy that depends on what the machine's model is like then."""
    return st.runner().flatmap(strategy)


def mostly(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda i: other if i == 9 else good)


# Names that are mostly attached or mostly free, and parts of the model that are mostly all of it.
any_name = st.sampled_from(NAMES)


a_name = mostly(now(lambda m: st.sampled_from(m.book.names() or NAMES)), any_name)


some_names = mostly(
    now(lambda m: st.lists(st.sampled_from(m.book.names() or NAMES), max_size=2, unique=True)),
    st.lists(any_name, max_size=2, unique=True),
)


a_free_name = now(lambda m: st.sampled_from(sorted({*NAMES} - {*m.book.names()}) or NAMES))


a_scope = mostly(st.just(""), now(lambda m: st.sampled_from(m.scopes)))


a_strength = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])


a_seed = st.integers(0, 2**16)


a_spec = st.one_of(
    st.just(pl.Delta()),
    st.builds(
        pl.LoRA,
        rank=st.integers(1, 5),
        alpha=st.sampled_from([None, 1, 0.5, 3.0]),
        init=st.sampled_from(
            ["kaiming", "gaussian", "gaussian/sqrt_r", "orthogonal", nn.init.ones_]
        ),
        rank_stabilized=st.booleans(),
    ),
)


@dataclass
class File:
    """A file, and what the book says of the adapter in it."""

    path: Path
    name: str
    parts: dict[str, Part]
