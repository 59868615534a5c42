"""Optimizers of the base and of the factors keep working, and their state stays valid."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.helpers import (
    MLP,
    case_of,
    factors,
    host_name,
)
from tests.support.mixed import assert_bits
from tests.support.reference import HOSTS, KINDS, Case, Host, floats, loss


class TestOptimizer:
    @pytest.mark.parametrize(
        "host", [MLP, "lstm", "attention", "conv2d_groups", "encoder_layer"], ids=host_name
    )
    def test_of_the_base(self, host: str | Host) -> None:
        """An optimizer made before attach, and its state, continue after detach bit for bit."""
        case = Case.of(HOSTS[host] if isinstance(host, str) else host)
        twin = copy.deepcopy(case.model)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            loss(floats(model(*case.inputs))).backward()
            optimizer.step()

        ours = torch.optim.Adam(case.model.parameters(), lr=0.01)
        theirs = torch.optim.Adam(twin.parameters(), lr=0.01)
        for _ in range(2):
            step(case.model, ours)
            step(twin, theirs)
        before = [id(p) for p in case.model.parameters()]
        case.attach(KINDS["lora"])
        step(case.model, torch.optim.Adam(pl.parameters(case.model), lr=0.01))
        pl.merge(case.model)
        pl.unmerge(case.model)
        pl.detach(case.model)
        assert [id(p) for p in case.model.parameters()] == before

        step(case.model, ours)
        step(twin, theirs)
        assert_bits(dict(case.model.state_dict()), dict(twin.state_dict()))
        # Loaded by a new one, each moment comes to its own parameter: shapes alone could not tell.
        again = torch.optim.Adam(case.model.parameters(), lr=0.01)
        again.load_state_dict(copy.deepcopy(theirs.state_dict()))
        step(case.model, again)
        step(twin, theirs)
        assert_bits(dict(case.model.state_dict()), dict(twin.state_dict()))

    def test_of_the_base_while_attached(self) -> None:
        """Loading its state or stepping it while attached does not change the frozen base."""
        case = Case.of(MLP)
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
        digest = pl.fingerprint(case.model)
        case.attach(KINDS["lora"])
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert pl.fingerprint(case.model) == digest

    def test_of_the_factors(self, tmp_path: Path) -> None:
        """Training continues bit for bit from a saved adapter and its optimizer's state."""
        case = case_of("encoder_layer")
        pl.scale(case.model, 1.0)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                loss(floats(model(*case.inputs))).backward()
                optimizer.step()

        optimizer = torch.optim.Adam(pl.parameters(case.model), lr=0.01)
        train(case.model, optimizer)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        saved = copy.deepcopy(optimizer.state_dict())

        pl.load(case.plain, tmp_path / "one.safetensors")
        again = torch.optim.Adam(pl.parameters(case.plain), lr=0.01)
        again.load_state_dict(saved)
        train(case.model, optimizer)
        train(case.plain, again)
        assert_bits(pl.state_dict(case.plain, "one"), pl.state_dict(case.model, "one"))

    def test_of_one_adapter_among_others(self) -> None:
        """Detaching one adapter keeps the other's parameters, which its optimizer still trains."""
        case = case_of(MLP)
        case.attach(KINDS["lora_stabilized"], "two")
        optimizer = torch.optim.Adam(pl.parameters(case.model, "two"), lr=0.01)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        pl.detach(case.model, "one")
        assert [id(p) for p in pl.parameters(case.model)] == held
        before = factors(case.model)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        assert all(not torch.equal(*pair) for pair in zip(factors(case.model), before, strict=True))
