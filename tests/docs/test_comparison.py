"""docs/comparison.md: its statements are backed by our tests and the sources of the peers.

docs/data/comparison.csv has a row for each answer: for us tests, for a peer a line of a file, or a
word that the file, or the whole package, does not contain.
"""

import csv
import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import paramlora as pl
from tests.support.versions import torch_before

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
PEERS = {"PEFT": "peft", "LyCORIS": "lycoris_lora", "loralib": "loralib"}
MODULES = {"PEFT": "peft", "LyCORIS": "lycoris", "loralib": "loralib"}
ANSWERS = ("yes", "no", "in part")

with (ROOT / "docs" / "data" / "comparison.csv").open(encoding="utf-8", newline="") as file:
    EVIDENCE = list(csv.DictReader(file))
TABLES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.split("## Other projects' tests")[0].splitlines()
    if line.startswith("| ") and "---" not in line
]


def sources(peer: str) -> Path:
    """Return the source folder of a peer, of the version that the document names."""
    named = re.search(rf"\[{peer}\]\([^)]*\)\s+([\d.]+)\b", TEXT)
    assert named, f"no version of {peer} in the document"
    try:
        installed = version(PEERS[peer])
    except PackageNotFoundError:
        pytest.skip(f"no {peer} here")
    if installed != named[1].rstrip("."):
        pytest.skip(f"{peer} is {installed} here, the document is about {named[1]}")
    spec = find_spec(MODULES[peer])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_tables_and_evidence_agree() -> None:
    """Each cell of the tables has a row of evidence with the same answer, in the same order."""
    heads = [row for row in TABLES if not row[0]]
    assert all(head == heads[0] for head in heads)
    cells = [
        (row[0], library, answer)
        for row in TABLES
        if row[0]
        for library, answer in zip(heads[0][1:], row[1:], strict=True)
    ]
    assert cells == [(row["row"], row["library"], row["answer"]) for row in EVIDENCE]
    assert {answer for _, _, answer in cells} == set(ANSWERS)


def test_partial_answers_are_explained() -> None:
    """The document has the remark of each "in part", except for LyCORIS' second interface."""
    text = " ".join(TEXT.split())
    for row in EVIDENCE:
        if row["answer"] == "in part":
            assert row["remark"], row
            remark = row["remark"].split(" (tests/")[0]
            assert remark in text or "second interface" in remark, row


def test_tests_of_ours_exist() -> None:
    """Each answer of ours names existing tests, or says why there is nothing to test."""
    for row in EVIDENCE:
        named = re.findall(r"tests/([\w/]+\.py)((?:::\w+)*)", row["file"] + " " + row["remark"])
        if row["library"] == "paramlora":
            assert named or (row["answer"] == "no" and row["remark"]), row
        for name, path in named:
            text = (ROOT / "tests" / name).read_text(encoding="utf-8")
            for part in path.split("::")[1:]:
                assert re.search(rf"\b(?:def|class) {part}\b", text), f"{name}{path}"


@pytest.mark.parametrize("peer", PEERS)
def test_lines_of_peers_exist(peer: str) -> None:
    """Each quoted line of a peer is in the named file, and each missing feature is not found."""
    folder = sources(peer)
    files = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    for row in EVIDENCE:
        if row["library"] != peer:
            continue
        where, word = row["file"], row["absent word"].lower()
        if word:
            searched = [folder / where] if where else list(files)
            assert not any(word in files[path].lower() for path in searched), row
        else:
            assert row["line"], row
            assert row["line"] in files[folder / where], row


def test_the_nightly_run_fails_if_the_result_is_worse_than_the_table() -> None:
    """Its limits are the numbers of the first table of PEFT's tests, and one case less fails."""
    table = TEXT.split("## Other projects' tests")[1].split("As a control")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    numbers = {"passed": 0, "failed": 0}
    for result, cases, *_ in rows:
        if result in numbers:
            numbers[result] += int(cases.replace(",", ""))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    limits = re.findall(r"--(?:fewest-passed|most-failures) (\d+)", workflow)
    assert [int(limit) for limit in limits] == [*numbers.values()]
    pytest.importorskip("peft")
    from tests.support.peft_suite.__main__ import Counts

    counts = Counts()
    counts.passed, counts.reasons["failed"]["a reason"] = numbers.values()
    assert not counts.worse(*numbers.values())
    counts.passed -= 1
    counts.reasons["failed"]["another"] += 1
    assert len(counts.worse(*numbers.values())) == 2


def graphs(call: Any, switch: Callable[..., object], settings: Iterable[Any]) -> list[int]:
    """Return how many graphs a compiled model has after each setting; its outputs are right."""
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(3, 4)
    compiled, counts = torch.compile(call, backend=counter), []
    for setting in settings:
        switch(setting)
        assert_close(compiled(x), call(x))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


SETS, STRENGTHS = ["a", "b", ""] * 2, [1.0, 0.5, 0.25, 2.0]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def shaken(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_graphs_of_ours() -> None:
    """Two adapters and the base take three graphs; numbers as strengths take one more."""
    model = small()
    for name in "ab":
        pl.attach(model, pl.LoRA(2), name=name)
    shaken(model)
    assert graphs(model, lambda names: pl.activate(model, *names), SETS) == [1, 2, *[3] * 4]
    pl.activate(model, "a")
    assert graphs(model, lambda value: pl.scale(model, value), STRENGTHS) == [1, 2, 2, 2]


def test_graphs_of_peft() -> None:
    """PEFT compiles as often: once for each adapter and the base, twice for numbers as scales."""
    peft = pytest.importorskip("peft")
    sources("PEFT")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(small(), config, "one")
    model.add_adapter("two", config)
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]

    def activate(name: str) -> None:
        model.base_model.disable_adapter_layers()
        if name:
            model.base_model.enable_adapter_layers()
            model.set_adapter({"a": "one", "b": "two"}[name])

    def scale(value: float) -> None:
        for layer in layers:
            layer.set_scale("one", value)

    if torch_before("2.7"):
        pytest.skip("torch 2.6 makes other graphs of PEFT's model")
    assert graphs(model, activate, SETS) == [1, 2, *[3] * 4]
    activate("a")
    assert graphs(model, scale, STRENGTHS) == [1, 2, 2, 2]


def test_graphs_of_lycoris() -> None:
    """LyCORIS compiles twice for its multiplier, which also switches it off."""
    lycoris = pytest.importorskip("lycoris")
    sources("LyCORIS")
    model = small()
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo="lora")
    network.apply_to()
    shaken(network)
    assert graphs(model, network.set_multiplier, [1.0, 0.0, 1.0, 0.5, 2.0]) == [1, 2, 2, 2, 2]


def test_recurrent_layers_in_peft_and_lycoris() -> None:
    """PEFT adapts an LSTM's matrices by `target_parameters` alone, LyCORIS by its parametrize."""
    peft = pytest.importorskip("peft")
    x = torch.randn(2, 3, 4)
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 5)})
    with pytest.raises(ValueError, match=r"LSTM.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["rnn"]))
    before = model["rnn"](x)[0]
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["rnn.weight_hh_l0"],
        init_lora_weights=False,
    )
    wrapped = peft.inject_adapter_in_model(config, model)
    assert not torch.allclose(wrapped["rnn"](x)[0], before)
    locon = pytest.importorskip("lycoris.modules.locon")
    rnn = nn.LSTM(4, 5)
    before = rnn(x)[0]
    shaken(locon.LoConModule.parametrize(rnn, "weight_hh_l0", lora_dim=2, alpha=1.0))
    assert not torch.allclose(rnn(x)[0], before)
