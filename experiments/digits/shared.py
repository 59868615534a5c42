"""Build the context of the digit study from settings; cache data and bases that runs share."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.confusion import wrong_counts
from ..analysis.evaluate import logits_of, score
from ..harness.environment import commit, resolve_device
from ..harness.rundir import RunDirectory
from ..harness.train import cpu_threads
from .bases import Base, base_path, find, keep, pretrain, restore
from .context import StudyContext
from .data import Data, Split, hold_out, load_data
from .settings import DigitSettings, chosen_digits, preset, small_version
from .strengths import Strengths


def settings_and_data(name: str = "", **given: Any) -> tuple[DigitSettings, Data]:
    """Return the settings of a study for the data set that is available, and the data set.

    Without a preset, the settings are those of "blog", or of "small" with `data="digits"`. If
    "auto" finds no MNIST, they are the small version of the preset.

    Args:
        name: the preset; "" if none is given.
        given: the changed options by name.

    Raises:
        StudyError: a value is not allowed, or the device or the data set is not available.
    """
    usual = "small" if given.get("data") == "digits" else "blog"
    settings = preset(name or usual, **given)
    resolve_device(settings.place.device)  # fails at once, before a download
    data = shared_data(settings.dataset.data, settings.dataset.data_dir)
    if settings.dataset.data == "auto" and data.is_small:
        settings = small_version(settings.preset, **{**given, "data": "digits"})
    return settings, data


def prepare(
    settings: DigitSettings,
    run: RunDirectory,
    device: torch.device,
    data: Data,
    say: Callable[[str], None],
) -> StudyContext:
    """Load or train the base and return the context of a run.

    Args:
        settings: the settings of the run.
        run: the directory that the context records rows in.
        device: the device for data and networks.
        data: the data set, on the CPU.
        say: called with each line of progress.
    """
    splits = split_images(settings, data, device)
    norm = settings.network.mean, settings.network.std
    inputs, test_inputs = splits.tuning.inputs(*norm), splits.test.inputs(*norm)
    whole, held = splits.pretraining, splits.held
    whole_inputs = inputs if whole is splits.tuning else whole.inputs(*norm)
    base, how = obtain(settings, whole_inputs, whole.labels, data.digest)
    model = restore(settings, base, device)
    logits = logits_of(model, test_inputs)
    counts = wrong_counts(score(logits, splits.test.labels, [0])["confusion"])
    held_inputs = held.inputs(*norm) if held else None
    held_labels = held.labels if held else None
    context = StudyContext(
        settings=settings,
        run=run,
        base=base,
        inputs=inputs,
        labels=splits.tuning.labels,
        test_inputs=test_inputs,
        test_labels=splits.test.labels,
        base_logits=logits,
        base_fingerprint=pl.fingerprint(model),
        tuned=tuned_digits(settings, model, held_inputs, held_labels),
        commit=commit(),
        held_inputs=held_inputs,
        held_labels=held_labels,
    )
    say(f"base     {pl.summary(model).total:,} parameters, {how}")
    say(f"         wrong answers by digit: {', '.join(map(str, counts))}")
    images = len(context.tuned_rows)
    say(f"tuned    digits {', '.join(map(str, context.tuned))}: {images:,} training images")
    return context


def tuned_digits(
    settings: DigitSettings, base: nn.Module, inputs: Tensor | None, labels: Tensor | None
) -> list[int]:
    """Return the digits to tune; worst:K counts the base's wrong answers to validation images.

    The test images are not used for this choice, because the results are measured on them.

    Args:
        settings: the settings of the run.
        base: the base.
        inputs: the validation images, float32 (n, 784), or None if there are none.
        labels: their labels, int64 (n,).
    """
    digits, counts = settings.finetuning.digits, [0] * 10
    if digits.startswith("worst:") and inputs is not None and labels is not None:
        counts = wrong_counts(score(logits_of(base, inputs), labels)["confusion"])
    return chosen_digits(digits, counts)


@dataclass(frozen=True)
class Splits:
    """The images of pre-training, of fine-tuning, of evaluation, and the validation images.

    `held` is None if the settings have no validation images.
    """

    pretraining: Split
    tuning: Split
    test: Split
    held: Split | None = None


def split_images(settings: DigitSettings, data: Data, device: torch.device) -> Splits:
    """Return the splits of the data set by the settings, on the device."""
    train, test = data.train.to(device), data.test.to(device)
    if not settings.holdout.validation:
        return Splits(train, train, test)
    tuning, held = (train.rows(rows) for rows in held_out(train.labels, settings))
    if settings.holdout.selection:
        return Splits(tuning, tuning, held, held)
    return Splits(train, tuning, test, held)


def held_out(labels: Tensor, settings: DigitSettings) -> tuple[Tensor, Tensor]:
    """Return the rows of the remaining training images and of the validation images."""
    return hold_out(labels, settings.holdout.validation, torch.Generator().manual_seed(0))


def obtain(
    settings: DigitSettings, inputs: Tensor, labels: Tensor, data_digest: str
) -> tuple[Base, str]:
    """Load the base if it is on disk, else train and save it; return it and a line of progress."""
    path = base_path(settings, labels.device, data_digest)
    if (kept := find(path)) is not None:
        return kept, f"loaded from {path}"
    began = time.perf_counter()
    with cpu_threads(settings.place.threads):
        base = pretrain(settings, inputs, labels)
    keep(base, path)
    seconds = time.perf_counter() - began
    return base, f"trained for {settings.pretraining.base_steps:,} steps in {seconds:.1f} s"


def context_of(settings: DigitSettings) -> StudyContext:
    """Return the context of these settings, with data and base cached per process."""
    context = shared_context(shared_settings(settings))
    tuned = tuned_digits(settings, context.model(), context.held_inputs, context.held_labels)
    return dataclasses.replace(context, settings=settings, tuned=tuned)


def shared_settings(settings: DigitSettings) -> DigitSettings:
    """Return settings with the same data and base, and all other options as in preset blog."""
    return DigitSettings(
        seed=settings.seed,
        network=settings.network,
        pretraining=settings.pretraining,
        holdout=dataclasses.replace(settings.holdout, patience=0),
        dataset=settings.dataset,
        place=dataclasses.replace(settings.place, out=""),
    )


@lru_cache(maxsize=4)
def shared_context(settings: DigitSettings) -> StudyContext:
    """Return the context of shared settings, cached per process."""
    device = resolve_device(settings.place.device)
    data = shared_data(settings.dataset.data, settings.dataset.data_dir)
    return prepare(settings, RunDirectory(Path(), {}, {}, []), device, data, lambda line: None)


@lru_cache(maxsize=4)
def shared_strengths(settings: DigitSettings) -> Strengths:
    """Return the `Strengths` of the base of shared settings, cached per process."""
    context = shared_context(settings)
    return Strengths(context.model(), context.test_inputs, context.base_logits)


@lru_cache(maxsize=2)
def shared_data(kind: str, data_dir: str) -> Data:
    """Return the data set of `load_data`, cached per process."""
    return load_data(kind, data_dir)


def counted_images(settings: DigitSettings) -> Tensor:
    """Return the images of the evaluation for display, uint8 (n, 28, 28)."""
    data = shared_data(settings.dataset.data, settings.dataset.data_dir)
    if not settings.holdout.selection:
        return data.test.images
    _, held = held_out(data.train.labels, settings)
    return data.train.images[held]
