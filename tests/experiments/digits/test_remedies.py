"""Each remedy agrees with its dense formula and changes a fine-tuning as documented."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.analysis.evaluate import score
from experiments.digits.context import StudyContext
from experiments.digits.data import load_data
from experiments.digits.methods import ADAPTER, factors_of
from experiments.digits.remedies.losses import (
    distillation,
    kept_mass,
    mask_or_shift_logits,
    switched_off,
)
from experiments.digits.remedies.penalties import base_weights, elastic, fisher, orthogonal
from experiments.digits.remedies.projection import forbidden, principal, project_away
from experiments.digits.remedies.recipe import Average, answers, recipe
from experiments.digits.remedies.replay import memory, memory_generator
from experiments.digits.remedies.routes import Gate, grouped, routed
from experiments.digits.settings import DigitSettings, preset
from experiments.digits.shared import prepare
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError, replace
from experiments.sweeps.sweep import tune_one_by_one, tune_together

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (24, 16),
    "relu_logits": False,
    "base_steps": 300,
    "steps": 20,
    "order": "seeded",
    "compat": "none",
}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> StudyContext:
    """A base on scikit-learn's digits. Tests must not change it."""
    folder = tmp_path_factory.mktemp("context")
    settings = preset("blog", **SMALL, bases=str(folder))
    run = RunDirectory(folder, {}, {}, [])
    return prepare(settings, run, torch.device("cpu"), load_data("digits"), lambda line: None)


def with_settings(context: StudyContext, **changes: Any) -> StudyContext:
    return dataclasses.replace(context, settings=replace(context.settings, **changes))


def logits(rows: int = 5, classes: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def test_an_infinite_margin_is_the_cross_entropy_over_the_tuned_classes():
    """With an infinite margin the softmax is over C only; with margin 0 logits are unchanged."""
    z, labels = logits(), torch.tensor([1, 3, 3, 1, 1])
    masked = F.cross_entropy(mask_or_shift_logits(z, [1, 3], math.inf), labels)
    only = F.cross_entropy(z[:, [1, 3]], (labels == 3).long())
    assert_close(masked, only)
    assert mask_or_shift_logits(z, [1, 3], 0.0) is z


def test_a_margin_is_a_smaller_prior_of_the_other_classes():
    """A margin m multiplies the prior of the other classes by e^-m."""
    z, labels = logits(), torch.tensor([1, 3, 3, 1, 1])
    weight = torch.tensor([math.exp(-2.5), 1.0, math.exp(-2.5), 1.0], dtype=torch.float64)
    expected = -(z.exp()[range(5), labels] / (z.exp() * weight).sum(1)).log().mean()
    assert_close(F.cross_entropy(mask_or_shift_logits(z, [1, 3], 2.5), labels), expected)


def test_distillation_is_the_divergence_at_a_temperature():
    """Distillation is T² Σ p⁰ log(p⁰/p), and zero if teacher and student agree."""
    z, teacher = logits(), logits(seed=1)
    p0, p = (torch.softmax(x / 3.0, 1) for x in (teacher, z))
    expected = 9 * (p0 * (p0 / p).log()).sum(1).mean()
    assert_close(distillation(z, teacher, 3.0), expected)
    assert float(distillation(z, z, 3.0)) == 0


def test_kept_mass_sees_only_whether_an_image_is_of_a_tuned_class():
    """kept_mass is the KL of tuned vs. other, and ignores changes within the classes."""
    z, teacher = logits(), logits(seed=1)
    q0, q = (torch.softmax(x, 1)[:, [1, 3]].sum(1) for x in (teacher, z))
    expected = (q0 * (q0 / q).log() + (1 - q0) * ((1 - q0) / (1 - q)).log()).mean()
    assert_close(kept_mass(z, teacher, [1, 3]), expected)
    swapped = teacher[:, [2, 3, 0, 1]]
    assert_close(kept_mass(swapped, teacher, [1, 3]), torch.zeros((), dtype=torch.float64))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    pl.attach(model, pl.LoRA(rank=2), name="a")
    return model


def test_the_teacher_is_the_model_switched_off():
    """switched_off returns bit-for-bit the base's logits for any factors."""
    model = small_model()
    x = logits(7, 6)
    base = model(x).detach()
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.normal_()
    assert torch.equal(switched_off(model, x), base)
    assert not torch.equal(model(x), base)


def test_fisher_information_is_the_mean_square_of_gradients():
    """If predictions are certain, F is the mean of squared gradients of log p(y|x)."""
    model = small_model()
    with torch.no_grad():  # p(0) ≈ 1, so each drawn label is 0, but 1 - p does not round to 0
        model[2].bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
    x = logits(9, 6)
    got = fisher(model, ["0.weight", "2.weight"], x, torch.Generator().manual_seed(0))
    pl.detach(model)
    total = [torch.zeros(5, 6).double(), torch.zeros(3, 5).double()]
    for row in x:
        log_p = F.log_softmax(model(row.unsqueeze(0)), 1)[0, 0]
        for sum_, gradient in zip(
            total, torch.autograd.grad(log_p, [model[0].weight, model[2].weight]), strict=True
        ):
            sum_ += gradient**2 / len(x)
    assert_close(got["0.weight"], total[0])
    assert_close(got["2.weight"], total[1])


def test_elastic_weights_cost_half_their_information_times_the_update_squared():
    """The penalty is ½ Σ F ΔW² with ΔW = s·B A multiplied out, and its gradient reaches A and B."""
    model = small_model()
    weights = base_weights(model, ["0.weight"])
    information = {"0.weight": logits(5, 6).abs()}
    assert elastic(weights, information)(model).item() == 0
    for factor in pl.parameters(model):
        nn.init.normal_(factor)
    factors = pl.state_dict(model, "a")
    update = factors["0.weight.B"] @ factors["0.weight.A"]
    penalty = elastic(weights, information)(model)
    assert_close(penalty, (information["0.weight"] * update**2).sum() / 2)
    penalty.backward()
    assert all(p.grad is not None for p in pl.parameters(model[0]))


def test_orthogonality_is_the_overlap_of_row_spaces():
    """The penalty is Σ|A_earlier Aᵀ|, and zero if the rows are orthogonal."""
    model = small_model()
    path = next(k for k, _ in model.named_parameters() if k.startswith("0.") and k.endswith(".A"))
    A = dict(model.named_parameters())[path]
    earlier = torch.eye(6).double()[:2]
    penalty = orthogonal({"0": earlier}, {"0": path})
    assert_close(penalty(model), A.detach()[:, :2].abs().sum())
    with torch.no_grad():
        A[:, :2] = 0
    assert penalty(model).item() == 0


@pytest.mark.parametrize(("energy", "kept"), [(0.0, 0), (0.5, 1), (0.96, 2), (1.0, 3)])
def test_principal_directions_hold_the_energy(energy, kept):
    """principal returns the fewest orthonormal directions with the energy, largest first."""
    left, right = torch.linalg.qr(logits(8, 3))[0], torch.linalg.qr(logits(5, 5, seed=1))[0]
    rows = left @ torch.diag(torch.tensor([3.0, 2.0, 0.5]).double()) @ right[:, :3].T
    found = principal(rows, energy)
    assert found.shape == (kept, 5)
    assert_close(found @ found.T, torch.eye(kept).double())
    assert_close((found @ right[:, :kept]).abs(), torch.eye(kept).double(), atol=1e-9, rtol=0)


def test_a_projected_update_leaves_the_directions_alone():
    """After projection B A x = 0 for every x in the span, for stacked factors as well."""
    directions = torch.linalg.qr(logits(6, 2))[0].T
    A = torch.stack([logits(3, 6), logits(3, 6, seed=1)])
    project_away(A, directions)
    assert_close(A @ directions.T, torch.zeros(2, 3, 2).double(), atol=1e-12, rtol=0)
    again = A.clone()
    project_away(again, directions)
    assert_close(again, A)


def test_grouped_answers_follow_the_chain_rule():
    """p(c) is p⁰(C) p(c|C) for tuned classes and p⁰(c) for the others."""
    on, off = logits(), logits(seed=1)
    p, p0 = torch.softmax(on, 1), torch.softmax(off, 1)
    expected = p0.clone()
    inside = p[:, [1, 3]] / p[:, [1, 3]].sum(1, keepdim=True)
    expected[:, [1, 3]] = inside * p0[:, [1, 3]].sum(1, keepdim=True)
    assert_close(torch.softmax(grouped(on, off, [1, 3]), 1), expected)
    assert_close(routed(on, off, [1, 3])[off.argmax(1) % 2 == 0], off[off.argmax(1) % 2 == 0])


def test_a_gate_learns_where_the_tuned_classes_are():
    """The gate has the weights of scikit-learn's logistic regression with balanced classes."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    off = torch.cat([logits(60, 4) + torch.tensor([0, 2, 0, 1.0]), logits(20, 4, seed=1)])
    is_tuned = torch.arange(80) < 60
    gate = Gate(off, is_tuned, decay=1e-2)
    # The gate applies weight decay to the bias too, so the bias is a column of ones here.
    x = F.pad(off, (0, 1), value=1.0).numpy()
    weights = torch.where(is_tuned, 0.5 / 60, 0.5 / 20).numpy()
    fit = linear_model.LogisticRegression(C=1 / 1e-2, fit_intercept=False, tol=1e-10, max_iter=999)
    fit.fit(x, is_tuned.numpy(), sample_weight=weights)
    assert_close(gate.w, torch.from_numpy(fit.coef_[0]), rtol=1e-4, atol=1e-4)
    on = torch.full_like(off, 7.0)
    chosen = gate(on, off)
    open_ = torch.from_numpy(fit.predict(x))
    assert torch.equal((chosen == 7.0).all(1), open_)
    assert torch.equal(chosen[~open_], off[~open_])


def test_averaged_parameters_are_the_mean_of_the_last_steps():
    """restore sets the parameters to their mean over the steps after `start`."""
    parameter = nn.Parameter(torch.zeros(2))
    average = Average([parameter], start=2)
    for step in range(1, 6):
        with torch.no_grad():
            parameter.fill_(float(step**2))
        average(step, nn.Identity(), torch.tensor(0.0))
    average.restore()
    assert_close(parameter.detach(), torch.full((2,), (9 + 16 + 25) / 3))


REMEDIES: list[dict[str, Any]] = [
    {"margin": math.inf},
    {"margin": 4.0, "distill": 0.5},
    {"mass": 1.0, "schedule": "cosine"},
    {"replay": 5},
    {"replay": 5, "margin": 2.0, "distill": 1.0, "mass": 0.5, "tune_batch": 7},
    {"replay": 5, "replay_of": "all", "margin": math.inf},
    {"ewc": 10.0},
    {"null_space": 0.5},
    {"replay": 5, "null_space": 0.9, "null_space_of": "old"},
    {"average": 0.5},
]


def tuned(context: StudyContext, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """Return the base with an adapter fine-tuned by the settings, and the losses."""
    model, generator = context.model(), torch.Generator().manual_seed(seed)
    plain = context.batches(generator)
    pl.attach(model, pl.LoRA(2, 1.0, init="gaussian"), name=ADAPTER, generator=generator)
    made = recipe(context, model, factors_of(model), plain, seed)
    losses = context.train(model, made.batches, made.objective, made.optimizer, "", made.hooks)
    made.finish()
    return model, losses


def test_without_remedies_it_is_the_plain_fine_tuning_bit_for_bit(context):
    """Without remedies, losses and factors are bit-for-bit those of the plain fine-tuning."""
    model, losses = tuned(context)
    other, generator = context.model(), torch.Generator().manual_seed(0)
    batches = context.batches(generator)
    pl.attach(other, pl.LoRA(2, 1.0, init="gaussian"), name=ADAPTER, generator=generator)
    plain = context.fine_tune(other, batches, pl.parameters(other), "")
    assert torch.equal(losses, plain)
    for one, two in zip(pl.parameters(model), pl.parameters(other), strict=True):
        assert torch.equal(one, two)
    assert not context.settings.remedied


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda r: " ".join(r))
def test_a_remedy_changes_the_training_and_leaves_the_base(context, remedy):
    """Each remedy gives other factors; the base stays bit-for-bit the same."""
    model, _ = tuned(with_settings(context, **remedy))
    plain, _ = tuned(context)
    assert with_settings(context, **remedy).settings.remedied
    assert any(
        not torch.equal(one, two)
        for one, two in zip(pl.parameters(model), pl.parameters(plain), strict=True)
    )
    assert pl.fingerprint(model) == context.base_fingerprint
    assert torch.equal(switched_off(model, context.test_inputs), context.base_logits)


@pytest.mark.parametrize("remedy", [{}, *REMEDIES[:8], REMEDIES[9]], ids=lambda r: " ".join(r))
def test_seeds_trained_together_come_out_as_one_by_one(context, remedy):
    """Training stacked seeds under vmap gives each seed's own factors and losses, to rounding."""
    changed = with_settings(context, **remedy)
    todo = [(changed, seed) for seed in range(3)]
    for one, two in zip(tune_one_by_one(todo), tune_together(todo), strict=True):
        assert_close(two[0], one[0], rtol=1e-3, atol=1e-4)
        assert two[1] == pytest.approx(one[1], rel=1e-5)


def test_projected_training_ends_outside_the_directions(context):
    """After projected training A is orthogonal to the directions; old logits do not move."""
    changed = with_settings(context, replay=5, null_space=1.0, null_space_of="old")
    model, _ = tuned(changed)
    old = memory(changed, memory_generator(0))
    directions = forbidden(changed, old)
    for path in ("linear1", "linear2"):
        A = pl.state_dict(model, ADAPTER)[f"{path}.weight.A"]
        assert float((A @ directions[path].T).abs().max()) < 1e-5
    with torch.no_grad():
        moved = {
            name: float((switched_off(model, x) - model(x)).abs().max())
            for name, x in (
                ("old", changed.inputs[old]),
                ("tuned", changed.inputs[changed.tuned_rows]),
            )
        }
    assert moved["old"] < 1e-4 * moved["tuned"]


def test_replayed_images_are_as_many_of_each_other_digit(context):
    """The memory has equally many images of each old digit, and depends on the seed."""
    changed = with_settings(context, replay=5)
    old = memory(changed, memory_generator(0))
    assert torch.bincount(changed.labels[old], minlength=10).tolist() == [
        5,
        5,
        0,
        0,
        5,
        0,
        5,
        5,
        0,
        0,
    ]
    assert torch.equal(old, memory(changed, memory_generator(0)))
    every = memory(changed, memory_generator(0), "all")
    assert torch.bincount(changed.labels[every]).tolist() == [5] * 10
    assert torch.equal(every[:25], old)
    assert not torch.equal(old, memory(changed, memory_generator(1)))


@pytest.mark.parametrize("route", ["none", "base", "soft", "gate"])
def test_routes_answer_for_other_digits_as_they_say(context, route):
    """Routing by the base does not lower the accuracy on other digits; "none" changes nothing."""
    changed = with_settings(context, route=route, replay=5)
    model, _ = tuned(context)
    got = score(answers(changed, changed.evaluate(model), 0), changed.test_labels, changed.tuned)
    base = score(changed.base_logits, changed.test_labels, changed.tuned)
    if route == "base":
        assert got["other_accuracy"] >= base["other_accuracy"]
    if route == "none":
        assert got == score(changed.evaluate(model), changed.test_labels, changed.tuned)


def test_early_stopping_keeps_the_best_on_the_validation_images(tmp_path):
    """The final factors have the best accuracy on the validation images."""
    settings = preset("blog", **SMALL, bases=str(tmp_path), validation=20, patience=1, lr=0.05)
    run = RunDirectory(Path(tmp_path), {}, {}, [])
    context = prepare(settings, run, torch.device("cpu"), load_data("digits"), lambda line: None)
    model, _ = tuned(context)
    assert context.held_labels is not None
    assert torch.bincount(context.held_labels).tolist() == [20] * 10
    assert len(context.labels) == 1437 - 200
    last = dataclasses.replace(context, settings=replace(settings, patience=0))
    assert context.validated(model) >= context.validated(tuned(last)[0])
    with pl.disabled(model):
        assert context.validated(model) <= 1.0


def test_a_selection_counts_on_images_that_its_base_has_not_seen(tmp_path):
    """With --selection, another base is trained and evaluated on the validation images."""
    data = load_data("digits")
    run = RunDirectory(tmp_path, {}, {}, [])
    made = {}
    for selection in (False, True):
        settings = preset("blog", **SMALL, bases=str(tmp_path), validation=20, selection=selection)
        made[selection] = prepare(settings, run, torch.device("cpu"), data, lambda line: None)
    assert torch.equal(made[False].test_labels, data.test.labels)
    assert len(made[True].test_labels) == 200
    assert torch.equal(made[True].test_inputs, made[False].held_inputs)
    assert made[True].base_fingerprint != made[False].base_fingerprint
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 1}, "--patience must be used with --validation above 0"),
        ({"selection": True}, "--selection must be used with --validation above 0"),
        ({"route": "gate"}, "--replay must be above 0 for a remedy that uses old images"),
        ({"null_space": 0.5, "null_space_of": "old"}, "--replay must be above 0"),
        ({"margin": -1.0}, "--margin must be a number of at least 0, got '-1.0'"),
        ({"null_space": 1.5}, "--null-space must be a number from 0 to 1, got '1.5'"),
        ({"temperature": 0.0}, "--temperature must be a finite number above 0"),
    ],
)
def test_remedies_that_cannot_be_are_refused(changes, message):
    """A remedy without the options it needs raises StudyError, which names the option."""
    with pytest.raises(StudyError, match=message):
        replace(DigitSettings(), **changes)
