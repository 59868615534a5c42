"""Order of the images, batches, training loop, hooks, bases, evaluation and forgetting."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from experiments.analysis.confusion import Change, accuracy, change, old_and_new
from experiments.analysis.evaluate import logits_of, score, scores
from experiments.digits.bases import (
    base_path,
    find,
    keep,
    network,
    order_after_base,
    pretrain,
    restore,
)
from experiments.digits.data import hold_out
from experiments.digits.model import DigitNet
from experiments.digits.settings import preset
from experiments.harness.batches import Batches, loader_order, seeded_order
from experiments.harness.loggers import (
    Curve,
    EarlyStopping,
    TensorBoardLog,
    logging,
    rows_to_csv,
)
from experiments.harness.settings import StudyError, replace
from experiments.harness.train import cpu_threads, cross_entropy, every, learning_rate, train

SMALL = preset("blog", hidden=(12, 8), base_steps=20, batch=5, threads=1)


def drawn(loader: DataLoader) -> list[int]:
    return [int(index) for batch in loader for index in batch]


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 784, generator=generator)
    return inputs, torch.randint(10, (count,), generator=generator)


def test_loader_order_is_a_dataloaders():
    """loader_order returns the indices of a shuffling DataLoader over several epochs."""
    torch.manual_seed(7)
    loader = DataLoader(range(53), batch_size=10, shuffle=True)
    theirs = drawn(loader) + drawn(loader) + drawn(loader)
    torch.manual_seed(7)
    assert loader_order(53, 120).tolist() == theirs[:120]


def test_order_after_base_continues_where_the_blog_does():
    """The order of fine-tuning continues the draws of network, pre-training and test pass."""
    torch.manual_seed(SMALL.seed)
    network(SMALL)
    drawn(DataLoader(range(100), batch_size=5, shuffle=True))
    drawn(DataLoader(range(30), batch_size=5))
    theirs = drawn(DataLoader(range(40), batch_size=5, shuffle=True))
    before = torch.get_rng_state()
    assert order_after_base(SMALL, images=100, rows=40, count=35).tolist() == theirs[:35]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_order_is_a_permutation_an_epoch():
    """Every epoch has each row once, in an order that depends only on the generator's seed."""
    first = seeded_order(20, 50, torch.Generator().manual_seed(3))
    assert sorted(first[:20].tolist()) == sorted(first[20:40].tolist()) == list(range(20))
    assert first[:20].tolist() != first[20:40].tolist()
    assert torch.equal(first, seeded_order(20, 50, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, seeded_order(20, 50, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("count", [1, 10, 1234])
def test_batches_are_rows_in_order(count):
    """Batches have the rows of the order in sequence; the last batch may be smaller."""
    values = torch.arange(100)
    order = torch.randint(100, (count,), generator=torch.Generator().manual_seed(0))
    batches = Batches((values, values * 2), order, 10)
    got = list(batches)
    assert len(got) == len(batches) == -(-count // 10)
    assert all(len(one) == 10 for one, _ in got[:-1])
    assert torch.equal(torch.cat([one for one, _ in got]), order)
    assert torch.equal(torch.cat([two for _, two in got]), order * 2)


def test_training_is_the_plain_loop():
    """Losses and weights are bit-for-bit those of a plain PyTorch training loop."""
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
        torch.optim.Adam(model.parameters(), 1e-2, fused=True),
    )
    assert ours.tolist() == theirs
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_takes_other_optimizers_too():
    """With SGD, momentum and weight decay, the weights are bit-for-bit those of a plain loop."""
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
    """cpu_threads sets the number of threads and restores it, also after an exception."""
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
    """logits_of evaluates in evaluation mode without a graph, and restores the mode."""
    model = nn.Sequential(nn.Linear(784, 10), nn.Dropout(0.5)).train(training)
    logits = logits_of(model, examples(20)[0])
    assert torch.equal(logits, model[0](examples(20)[0]))
    assert not logits.requires_grad
    assert model.training is training


def test_forgetting_counted_by_hand():
    """Learned and forgotten are the changes on tuned and other digits, in a case done by hand."""
    before = [[9, 1, 0], [2, 8, 0], [0, 5, 5]]
    after = [[6, 0, 4], [0, 8, 2], [0, 1, 9]]
    assert accuracy(before) == 22 / 30
    assert old_and_new(before, [2]) == (17 / 20, 5 / 10)
    assert change(before, after, [2]) == Change(learned=0.4, forgotten=0.15)


def test_a_base_is_kept_and_found_bitwise(tmp_path):
    """A base is bitwise the same after saving and loading; torch's generator does not change."""
    inputs, labels = examples(100)
    state = torch.get_rng_state()
    base = pretrain(SMALL, inputs, labels)
    path = tmp_path / "deep" / "base.safetensors"
    assert find(path) is None
    keep(base, path)
    found = find(path)
    assert found is not None
    assert torch.equal(found.losses, base.losses)
    assert len(base.losses) == SMALL.pretraining.base_steps
    model = restore(SMALL, found, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, base.state[key])


def test_a_damaged_base_is_refused_by_name(tmp_path):
    """Reading a file that is not a base raises StudyError with the file name."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"no base")
    with pytest.raises(StudyError, match=r"base.safetensors is damaged or not a base"):
        find(path)


def test_bases_are_told_apart():
    """Each setting that a base depends on changes its path; settings of fine-tuning do not."""
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
    others = [base_path(replace(SMALL, **change), cpu, "data") for change in differing]
    others += [base_path(SMALL, torch.device("cuda"), "data"), base_path(SMALL, cpu, "else")]
    assert len({path, *others}) == len(others) + 1
    tuning = {"rank": 4, "digits": "1", "steps": 3, "lr": 0.1, "alpha": 2.0, "seeds": 1}
    assert base_path(replace(SMALL, **tuning), cpu, "data") == path


def updates(**options) -> list[torch.Tensor]:
    """Return the weights of a small network after training with these options."""
    torch.manual_seed(0)
    model = DigitNet([12, 8], "relu").double()
    inputs, labels = examples(24)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    size = options.pop("size", 6)
    batches = Batches((inputs.double(), labels), torch.arange(24), size)
    train(model, batches, cross_entropy, sgd, **options)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("size", [6, 5])
def test_accumulated_batches_are_one_large_batch(size):
    """Accumulating batches, the last one smaller, gives the weights of one large batch."""
    per_step = -(-24 // size)
    torch.testing.assert_close(updates(size=size, accumulate=per_step), updates(size=24))
    halves = updates(size=6, accumulate=2)
    torch.testing.assert_close(halves, updates(size=12))
    assert not torch.equal(halves[0], updates(size=24)[0])


def test_accumulation_counts_steps_and_means_losses():
    """A step's loss is the mean over its examples; the last step has the remaining batches."""
    model, (inputs, labels) = DigitNet([12, 8]).double(), examples(25)
    batches = Batches((inputs.double(), labels), torch.arange(25), 5)
    still = torch.optim.SGD(model.parameters(), 0.0)
    losses = train(model, batches, cross_entropy, still, accumulate=2)
    whole = [F.cross_entropy(model(x), y).item() for x, y in list(batches)]
    means = [(whole[0] + whole[1]) / 2, (whole[2] + whole[3]) / 2, whole[4]]
    torch.testing.assert_close(losses, torch.tensor(means))


def test_clipping_bounds_the_step():
    """Clipping bounds the gradient norm, so a step with learning rate 1 has that length."""
    inputs, labels = examples(10)
    batches = Batches((inputs, labels), torch.arange(10), 10)
    moved = []
    for clip in (0.01, 1e6, None):
        torch.manual_seed(0)
        model = DigitNet([12, 8], "relu").double()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        x = batches.tensors[0].double()
        train(
            model,
            [(x, labels)],
            cross_entropy,
            torch.optim.SGD(model.parameters(), 1.0),
            clip=clip,
        )
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert float(moved[0].norm()) == pytest.approx(0.01, rel=1e-4)
    assert torch.equal(moved[1], moved[2])
    torch.testing.assert_close(moved[0], moved[2] * (0.01 / moved[2].norm()), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_and_keeps_the_weights(dtype):
    """Under autocast, layers compute in the low dtype, weights stay float32, the loss falls."""
    model, (inputs, labels) = DigitNet([12, 8]), examples(40)
    seen = set()
    model.linear1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    batches = Batches((inputs, labels), torch.arange(40).repeat(10), 20)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = train(model, batches, cross_entropy, optimizer, autocast=dtype, clip=5.0)
    assert seen == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses.dtype == torch.float32
    assert losses[-1] < losses[0] / 2


def test_hooks_see_every_step_and_can_end_the_training():
    """Hooks get step, model and loss in order; returning True ends the training after the step."""
    model, (inputs, labels) = DigitNet([12, 8]), examples(30)
    calls: list[tuple[str, int, float]] = []

    def first(step: int, of: nn.Module, loss: torch.Tensor) -> None:
        assert of is model
        calls.append(("first", step, float(loss)))

    def second(step: int, of: nn.Module, loss: torch.Tensor) -> bool:
        calls.append(("second", step, float(loss)))
        return step == 4

    batches = Batches((inputs, labels), torch.arange(30), 5)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    losses = train(model, batches, cross_entropy, sgd, hooks=[first, every(2, second)])
    assert [(name, step) for name, step, _ in calls] == [
        ("first", 1),
        ("first", 2),
        ("second", 2),
        ("first", 3),
        ("first", 4),
        ("second", 4),
    ]
    assert [value for name, _, value in calls if name == "first"] == losses.tolist()


def test_learning_rates_follow_the_schedule():
    """Each step uses the learning rate of the schedule for its number."""
    model, (inputs, labels) = DigitNet([12, 8]), examples(30)
    optimizer, rates = torch.optim.Adam(model.parameters(), lr=1.0, fused=True), []
    plain = optimizer.step

    def step() -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        plain()

    optimizer.step = step
    hook = learning_rate(optimizer, lambda number: number / 100)
    batches = Batches((inputs, labels), torch.arange(30), 10)
    train(model, batches, cross_entropy, optimizer, hooks=[hook])
    assert rates == [0.01, 0.02, 0.03]


def test_hooks_leave_the_training_as_it_is():
    """Logging and evaluating during training leave losses and weights bit-for-bit the same."""
    inputs, labels = examples(60)
    runs = []
    for hooks in ([], [logging(Curve(), lambda m: {"a": float(logits_of(m, inputs).mean())})]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 12), nn.Dropout(0.5), nn.Linear(12, 10))
        batches = Batches((inputs, labels), torch.arange(60), 10)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        losses = train(model, batches, cross_entropy, sgd, hooks=hooks)
        runs.append([losses, *model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_early_stopping_goes_back_to_the_best_step():
    """Training ends after `patience` calls without a new best; restore gives the best weights."""
    figures = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    model, (inputs, labels) = DigitNet([12, 8]), examples(60)
    kept = []
    stopping = EarlyStopping(lambda m: next(figures), model.parameters(), patience=2)
    batches = Batches((inputs, labels), torch.arange(60), 5)

    def keep_weights(step: int, of: nn.Module, loss: torch.Tensor) -> None:
        kept.append(nn.utils.parameters_to_vector(of.parameters()).detach().clone())

    sgd = torch.optim.SGD(model.parameters(), 0.1)
    hooks = [keep_weights, every(2, stopping)]
    losses = train(model, batches, cross_entropy, sgd, hooks=hooks)
    assert len(losses) == 8
    assert (stopping.best, stopping.highest) == (4, 0.7)
    stopping.restore()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), kept[3])


def test_logs_on_disk_hold_what_was_logged(tmp_path):
    """TensorBoard files have the logged figures of each step."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with TensorBoardLog(tmp_path / "board") as board:
        board(3, {"loss": 0.25})
        board(6, {"loss": 0.125})
    events = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25), (6, 0.125)]


def test_rows_as_csv_keep_what_is_plain():
    """The CSV has one column per key of any row, without lists and mappings."""
    rows = [{"stage": "on", "n": 3, "wrong": [1, 2]}, {"stage": "off, again", "loss": 0.5}]
    assert rows_to_csv(rows) == 'stage,n,loss\non,3,\n"off, again",,0.5\n'


def test_held_out_rows_are_as_many_of_each_class():
    """A validation split has `count` rows of each class and is disjoint from the rest."""
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))
    stay, held = hold_out(labels, 7, torch.Generator().manual_seed(2))
    assert torch.bincount(labels[held]).tolist() == [7] * 4
    assert sorted([*stay.tolist(), *held.tolist()]) == list(range(200))
    assert stay.tolist() == sorted(stay.tolist())
    again = hold_out(labels, 7, torch.Generator().manual_seed(2))[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, hold_out(labels, 7, torch.Generator().manual_seed(3))[1])
    with pytest.raises(StudyError, match="class 0 has 3 examples: 3 cannot be held out"):
        hold_out(torch.tensor([0, 0, 0, 1]), 3, torch.Generator())


def test_scores_of_any_number_of_classes():
    """Scores work for any number of classes; accuracies without examples are left out."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    row = score(logits, torch.tensor([0, 1, 1]))
    assert row["confusion"] == [[1, 0], [1, 1]]
    assert row["wrong_counts"] == [0, 1]
    assert row["accuracy"] == 2 / 3
    assert not row.keys() & {"tuned_accuracy", "other_accuracy"}
    row = score(torch.eye(4)[[0, 1, 1, 3]], torch.tensor([0, 1, 2, 3]), [2, 3])
    assert (row["tuned_accuracy"], row["other_accuracy"]) == (0.5, 1.0)
    assert "tuned_accuracy" not in score(torch.eye(4)[:2], torch.tensor([0, 1]), [2, 3])


def test_scores_of_several_evaluations_are_each_ones_own():
    """Stacked logits give each evaluation's own counts and torch's mean cross-entropy."""
    labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    logits = 3 * torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(1))
    for one, row in zip(logits, scores(logits, labels, [1]), strict=True):
        alone = score(one, labels, [1])
        assert row == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-6)}
        assert row["loss"] == pytest.approx(float(F.cross_entropy(one, labels)), rel=1e-6)
        assert row["wrong_counts"] == [
            int(((labels == k) & (one.argmax(1) != k)).sum()) for k in range(4)
        ]
