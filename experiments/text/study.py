"""The text study: several methods fine-tune a checkpoint into a classifier of texts.

With the same seed, all methods start from the same classifier and see the same batches in the same
order. The validation rows choose the best step of a training and the settings. The test rows are
not used for choices.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.intruders import compared
from ..harness.adapters import adapter_path, load_adapter
from ..harness.environment import RESULT_KEYS, commit, machine, resolve_device
from ..harness.parallel import Group, group
from ..harness.rundir import RunDirectory
from ..harness.settings import result_settings
from ..harness.stages import Stage, run_stages
from .context import TextContext, autocast_dtype, prepare_context
from .data import Corpus, load_corpus
from .forgetting import similarity
from .models import ADAPTER, globs, head_of, prepare, spec_of
from .retention import kept
from .settings import TextSettings
from .training import fine_tune

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
ATTACHED = ("off", "on", "merged")


def stages(settings: TextSettings) -> Iterator[Stage[TextContext]]:
    """Yield the stages of a run, in order."""
    for seed in range(settings.seed_from, settings.seed_from + settings.seeds):
        for method in settings.chosen_methods:
            key = {"method": method, "seed": seed}
            if "lora" not in method:
                yield Stage(key, ("tuned",), partial(tune, method, seed))
                continue
            make, adapter = partial(tune_attached, method, seed), f"{method}-{seed}"
            yield Stage(key, ATTACHED, make, adapter)
            if settings.forgetting:
                yield Stage(key, ("strengths",), partial(try_strengths, method, seed))


def run_text(settings: TextSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Run the study, or the rest of an interrupted one, and return its run directory.

    Under torchrun all processes call it; only the first one writes files and messages.

    Args:
        settings: the settings of the study.
        say: receives each line of progress.

    Raises:
        StudyError: the model, data, device or folder cannot be used. The message says why.
    """
    with group(resolve_device(settings.place.device)) as (processes, device):
        corpus = load_corpus(settings.dataset)
        report = say if processes.first else _silent
        with _begin(settings, corpus, device, processes) as run:
            report(f"run      {run.folder}, on {device}, by {processes.size} process(es)")
            sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in corpus.splits.items())
            report(f"data     {corpus.name}: {corpus.why}; {sizes}")

            def prepared() -> TextContext:
                context = prepare_context(settings, run, corpus, device, processes)
                show_parameters(context, report)
                return context

            run_stages(run, stages(settings), prepared, report)
            processes.wait()
    return run


def _begin(
    settings: TextSettings, corpus: Corpus, device: torch.device, processes: Group
) -> RunDirectory:
    """Start or resume the run in the first process, which locks it, and read it in the others."""
    environment = {
        "study": settings.STUDY,
        **machine(torch.device(device.type), "transformers", "tokenizers"),
        "data": corpus.name,
        "data_why": corpus.why,
        "data_digest": corpus.digest,
        "labels": list(corpus.labels),
        "majority": corpus.majority(),
        **{f"{split}_texts": len(rows) for split, rows in corpus.splits.items()},
        "autocast": autocast_dtype(settings, device) is not None,
        "processes": processes.size,
        "commit": commit(),
    }
    folder = Path(settings.folder)
    if not processes.first:
        processes.wait()
        return RunDirectory.read(folder)
    run = RunDirectory.start(folder, result_settings(settings), environment, RESULT_KEYS)
    processes.wait()
    return run


def tune(method: str, seed: int, context: TextContext) -> None:
    """Fine-tune parameters of the model itself, without an adapter. Row: "tuned"."""
    model = context.model(seed)
    prepare(model, method, context.settings, torch.Generator())
    learned = fine_tune(context, model, method, seed)
    scored = {**context.scored(model, "test"), **kept(context, model)}
    scored |= _spectra(context, model, seed)
    context.record("tuned", method, seed, **learned, **_of_base(model), **scored)


def tune_attached(method: str, seed: int, context: TextContext) -> None:
    """Fine-tune an adapter, save it, and evaluate it off, on and merged. Rows: ATTACHED.

    A sharded model cannot be merged. The evaluation therefore loads the saved adapter into a new,
    unsharded model.
    """
    model = context.model(seed)
    before, digest = context.logits(model, "validation"), pl.fingerprint(model)
    size = _of_base(model)
    prepare(model, method, context.settings, torch.Generator().manual_seed(seed))
    same_before_training = torch.equal(context.logits(model, "validation"), before)
    learned = fine_tune(context, model, method, seed)
    path = adapter_path(context.run.folder, f"{method}-{seed}")
    pl.save(model, path, ADAPTER)
    scored = {**context.scored(model, "test"), **kept(context, model)}
    scored |= _spectra(context, model, seed)

    # The others must not read the file before the first process has written it.
    context.group.wait()
    model = context.model(seed)
    pl.load(model, path)
    on = context.logits(model, "validation")
    with pl.disabled(model):
        off = context.logits(model, "validation")
    with pl.merged(model):
        merged = context.logits(model, "validation")
    checks = {
        "same_at_first": same_before_training,
        "same_logits": torch.equal(off, before),
        "same_fingerprint": pl.fingerprint(model) == digest,
    }
    context.record("off", method, seed, **checks)
    context.record("on", method, seed, **learned, **size, **scored, adapter_bytes=_size(path))
    distance = float((merged - on).abs().max() / on.abs().max())
    context.record("merged", method, seed, distance_from_on=distance)


def try_strengths(method: str, seed: int, context: TextContext) -> None:
    """Record the accuracy, retrieval and agreement at each strength λ. Row: "strengths".

    The row has the validation accuracy as well, so that λ is not chosen on the test rows.
    """
    model = context.model(seed)
    base = similarity(context, model)
    load_adapter(model, context.run.folder, f"{method}-{seed}")
    validation, accuracy, found = [], [], []
    for strength in STRENGTHS:
        with pl.using(model, **{ADAPTER: strength}):
            validation.append(context.accuracy(model, "validation"))
            accuracy.append(context.accuracy(model, "test"))
            found.append(similarity(context, model))
    with pl.disabled(model):
        off = similarity(context, model)
    context.record(
        "strengths",
        method,
        seed,
        strengths=list(STRENGTHS),
        validation=validation,
        accuracy=accuracy,
        retrieval=[one.retrieval for one in found],
        agreement=[one.agreement(base) for one in found],
        base_retrieval=base.retrieval,
        same_embeddings=torch.equal(off.embeddings, base.embeddings),
    )


def show_parameters(context: TextContext, say: Callable[[str], None]) -> None:
    """Report the number of parameters that each method trains."""
    settings = context.settings
    total = _of_base(context.model(0))["parameters"]
    say(f"model    {settings.model}: {total:,} parameters as a classifier")
    for method in settings.chosen_methods:
        trained = prepare(context.model(0), method, settings, torch.Generator())
        count = sum(p.numel() for p in trained)
        targets = (
            f" {spec_of(settings.adapter)} at {globs(settings.adapter.targets)}"
            if "lora" in method
            else ""
        )
        say(f"{method:<12} trains {count:,}, {count / total:.2%}{targets}")


@torch.no_grad()
def _spectra(context: TextContext, model: nn.Module, seed: int) -> dict[str, Any]:
    """Return the intruder dimensions and the sizes of a tuned model's linear layers, for its row.

    Layers with unchanged weights do not count, nor do embeddings and the new head.
    """
    if not context.settings.spectra:
        return {}
    plain, head = context.model(seed), head_of(model)
    base, tuned = dict[str, Tensor](), dict[str, Tensor]()
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear) and f"{path}.weight" not in head:
            weight: Any = model.get_submodule(path).weight  # W', with an adapter
            if not torch.equal(weight, module.weight):
                base[path], tuned[path] = module.weight, weight
    return compared(base, tuned)


def _of_base(model: nn.Module) -> dict[str, Any]:
    return {"parameters": pl.summary(model).total}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _silent(line: str) -> None:
    pass
