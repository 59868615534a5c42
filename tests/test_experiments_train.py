"""The study's parts: order of the images, batches, the training loop, evaluation, forgetting."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from experiments.adam import SmallAdam
from experiments.bases import base_path, find, keep, network, order_after_base, pretrain, restore
from experiments.evaluate import logits_of, score
from experiments.forgetting import Change, accuracy, change, old_and_new
from experiments.models import DigitNet
from experiments.settings import StudyError, preset
from experiments.train import (
    Batches,
    cpu_threads,
    cross_entropy,
    loader_order,
    seeded_order,
    train,
)

SMALL = preset("blog", hidden=(12, 8), base_steps=20, batch=5, threads=1)


def drawn(loader: DataLoader) -> list[int]:
    return [int(index) for batch in loader for index in batch]


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 784, generator=generator)
    return inputs, torch.randint(10, (count,), generator=generator)


def test_loader_order_is_a_dataloaders():
    """Images come in the order of a shuffling DataLoader, over several epochs, without one."""
    torch.manual_seed(7)
    loader = DataLoader(range(53), batch_size=10, shuffle=True)
    theirs = drawn(loader) + drawn(loader) + drawn(loader)
    torch.manual_seed(7)
    assert loader_order(53, 120).tolist() == theirs[:120]


def test_order_after_base_continues_where_the_blog_does():
    """Fine-tuning draws on after network, pre-training and a test pass, as a script would."""
    torch.manual_seed(SMALL.seed)
    network(SMALL)
    drawn(DataLoader(range(100), batch_size=5, shuffle=True))
    drawn(DataLoader(range(30), batch_size=5))
    theirs = drawn(DataLoader(range(40), batch_size=5, shuffle=True))
    before = torch.get_rng_state()
    assert order_after_base(SMALL, images=100, rows=40, count=35).tolist() == theirs[:35]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_order_is_a_permutation_an_epoch():
    """Every epoch has each row once, in an order that the generator's seed decides."""
    first = seeded_order(20, 50, torch.Generator().manual_seed(3))
    assert sorted(first[:20].tolist()) == sorted(first[20:40].tolist()) == list(range(20))
    assert first[:20].tolist() != first[20:40].tolist()
    assert torch.equal(first, seeded_order(20, 50, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, seeded_order(20, 50, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("count", [1, 10, 1234])
def test_batches_are_rows_in_order(count):
    """Batches hold the rows that the order names, one after the other, the last one smaller."""
    values = torch.arange(100)
    order = torch.randint(100, (count,), generator=torch.Generator().manual_seed(0))
    batches = Batches((values, values * 2), order, 10)
    got = list(batches)
    assert len(got) == len(batches) == -(-count // 10)
    assert all(len(one) == 10 for one, _ in got[:-1])
    assert torch.equal(torch.cat([one for one, _ in got]), order)
    assert torch.equal(torch.cat([two for _, two in got]), order * 2)


def test_training_is_the_plain_loop():
    """Loop and optimizer give bitwise the losses and weights of the loop that everybody writes."""
    inputs, labels = examples(60)
    model = DigitNet([12, 8], "relu")
    plain = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(plain.parameters(), 1e-2, fused=True)
    order, theirs = seeded_order(60, 60, torch.Generator().manual_seed(0)), []
    for start in range(0, 60, 7):
        rows = order[start : start + 7]
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    ours = train(
        model,
        Batches((inputs, labels), order, 7),
        cross_entropy,
        SmallAdam(model.parameters(), 1e-2),
    )
    assert ours.tolist() == theirs
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_takes_torchs_optimizers_too():
    """The loop is the same for an optimizer of torch.optim, with its own momentum and decay."""
    inputs, labels = examples(30)
    model = DigitNet([12, 8])
    plain = copy.deepcopy(model).train()
    batches = Batches((inputs, labels), torch.arange(30), 10)
    kind = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, batches, cross_entropy, kind(model.parameters()))
    optimizer = kind(plain.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_threads_are_given_back():
    """The number of CPU threads inside is the one asked for, afterwards what it was."""
    before = torch.get_num_threads()
    inside = []
    with contextlib.suppress(KeyError), cpu_threads(before + 1):
        inside.append(torch.get_num_threads())
        raise KeyError
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_evaluation_is_a_loop_over_rows():
    """Counts, accuracies and loss of one batched pass are those of a plain loop over images."""
    inputs, labels = examples(200)
    model, tuned = DigitNet([12, 8]).double(), {1, 4, 7}
    got = score(logits_of(model, inputs.double()), labels, tuned)
    wrong, right, losses = [0] * 10, {True: [], False: []}, []
    confusion = [[0] * 10 for _ in range(10)]
    for image, label in zip(inputs.double(), labels.tolist(), strict=True):
        logits = model(image.unsqueeze(0))[0].detach()
        answer = int(logits.argmax())
        wrong[label] += answer != label
        confusion[label][answer] += 1
        right[label in tuned].append(answer == label)
        losses.append(float(-logits.log_softmax(0)[label]))
    assert got["wrong_counts"] == wrong
    assert got["confusion"] == confusion
    assert got["n"] == 200
    assert got["accuracy"] == (200 - sum(wrong)) / 200
    assert got["tuned_accuracy"] == sum(right[True]) / len(right[True])
    assert got["other_accuracy"] == sum(right[False]) / len(right[False])
    assert got["loss"] == pytest.approx(sum(losses) / 200, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training):
    """A pass is in evaluation mode, without a graph, and gives the mode back."""
    model = nn.Sequential(nn.Linear(784, 10), nn.Dropout(0.5)).train(training)
    logits = logits_of(model, examples(20)[0])
    assert torch.equal(logits, model[0](examples(20)[0]))
    assert not logits.requires_grad
    assert model.training is training


def test_forgetting_counted_by_hand():
    """Learned and forgotten are the changes on tuned and other digits, by a hand-made case."""
    before = [[9, 1, 0], [2, 8, 0], [0, 5, 5]]
    after = [[6, 0, 4], [0, 8, 2], [0, 1, 9]]
    assert accuracy(before) == 22 / 30
    assert old_and_new(before, [2]) == (17 / 20, 5 / 10)
    assert change(before, after, [2]) == Change(learned=0.4, forgotten=0.15)


def test_a_base_is_kept_and_found_bitwise(tmp_path):
    """A trained base survives its file, with its losses, and leaves the global generator alone."""
    inputs, labels = examples(100)
    state = torch.get_rng_state()
    base = pretrain(SMALL, inputs, labels)
    path = tmp_path / "deep" / "base.safetensors"
    assert find(path) is None
    keep(base, path)
    found = find(path)
    assert found is not None
    assert torch.equal(found.losses, base.losses)
    assert len(base.losses) == SMALL.base_steps
    model = restore(SMALL, found, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, base.state[key])


def test_a_damaged_base_is_refused_by_name(tmp_path):
    """A file that is no base is an error that names it."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"no base")
    with pytest.raises(StudyError, match=r"base.safetensors is not a base that a run left"):
        find(path)


def test_bases_are_told_apart():
    """Whatever a base depends on gives it another file; fine-tuning's settings do not."""
    cpu = torch.device("cpu")
    path = base_path(SMALL, cpu, "data")
    differing = [
        {"seed": 1},
        {"hidden": (12, 9)},
        {"activation": "relu"},
        {"relu_logits": False},
        {"mean": 0.2},
        {"std": 0.2},
        {"base_steps": 21},
        {"base_lr": 0.1},
        {"batch": 6},
        {"threads": 2},
    ]
    values = {**SMALL.__dict__}
    others = [base_path(type(SMALL)(**{**values, **change}), cpu, "data") for change in differing]
    others += [base_path(SMALL, torch.device("cuda"), "data"), base_path(SMALL, cpu, "else")]
    assert len({path, *others}) == len(others) + 1
    tuning = {"rank": 4, "digits": "1", "steps": 3, "lr": 0.1, "alpha": 2.0, "seeds": 1}
    assert base_path(type(SMALL)(**{**values, **tuning}), cpu, "data") == path
