"""The part of `big-model` that times each verb once and checks its result."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import paramlora as pl

from .harness.contestants import linears
from .harness.results import Row
from .harness.timing import Result, now, timed_call


class Timer:
    """Calls verbs of a library and keeps a row with the seconds of each."""

    def __init__(self, contestant: str, device: str) -> None:
        self.contestant, self.device = contestant, device
        self.rows: list[Row] = []

    def __call__(self, verb: str, act: Callable[[], Result]) -> Result:
        """Call `act`, keep a row for `verb`, and return the result."""
        result, seconds = timed_call(act, self.device)
        about = {"what": "verb", "contestant": self.contestant, "verb": verb}
        self.rows.append(about | {"seconds": seconds})
        return result


@torch.no_grad()
def paramlora_verbs(base: nn.Module, rank: int, ids: Tensor) -> list[Row]:
    """Return a row for each verb of paramlora, one for the file, and one for the checks.

    The checks compare logits and parameters bit for bit. The exception is "merged_off_by", the
    relative difference of the logits after merging, where W + ΔW is rounded to the weight's dtype.
    """
    model = copy.deepcopy(base)
    timed = Timer("paramlora", ids.device.type)

    def logits() -> Tensor:
        return model(input_ids=ids[:1]).logits

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        plain = logits()
        before = {name: p.clone() for name, p in model.named_parameters()}
        timed("attach", lambda: pl.attach(model, pl.LoRA(rank), nn.Linear))
        perturb(model)
        on = logits()
        timed("save", lambda: pl.save(model, path))
        timed("disable", lambda: pl.disable(model))
        proofs: Row = {"off_is_base": torch.equal(logits(), plain)}
        timed("enable", lambda: pl.enable(model))
        timed("scale", lambda: pl.scale(model, 1.0))
        timed("merge", lambda: pl.merge(model))
        proofs["merged_off_by"] = float((logits() - on).norm() / on.norm())
        timed("unmerge", lambda: pl.unmerge(model))
        proofs["on_again"] = torch.equal(logits(), on)
        timed("detach", lambda: pl.detach(model))
        after = dict(model.named_parameters())
        proofs["detached_is_base"] = after.keys() == before.keys() and all(
            torch.equal(after[name], value) for name, value in before.items()
        )
        timed("load", lambda: pl.load(model, path))
        proofs["loaded_is_saved"] = torch.equal(logits(), on)
        file = {"what": "file", "contestant": "paramlora", "bytes": path.stat().st_size}
    return [*timed.rows, file, {"what": "proofs", "contestant": "paramlora", **proofs}]


@torch.no_grad()
def peft_verbs(base: nn.Module, rank: int, ids: Tensor) -> list[Row]:
    """Return a row for each of PEFT's counterparts of the verbs."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = copy.deepcopy(base)
    timed = Timer("PEFT", ids.device.type)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(linears(model)))
    with tempfile.TemporaryDirectory() as folder:
        wrapped = timed("attach", lambda: get_peft_model(model, config))
        for layer in linears(model).values():
            if layer.in_features == rank or layer.out_features == rank:
                layer.weight.add_(torch.randn_like(layer.weight) * 0.01)
        timed("save", lambda: wrapped.save_pretrained(folder, save_embedding_layers=False))
        timed("disable", wrapped.disable_adapter_layers)
        timed("enable", wrapped.enable_adapter_layers)
        timed("merge", wrapped.merge_adapter)
        timed("unmerge", wrapped.unmerge_adapter)
        bare = timed("detach", wrapped.unload)
        timed("load", lambda: PeftModel.from_pretrained(bare, folder))
    return timed.rows


def attach_on_meta(
    build: Callable[[], nn.Module], base: nn.Module, rank: int, ids: Tensor
) -> list[Row]:
    """Return a row with the seconds of attaching on the meta device and of filling the model.

    Args:
        build: builds the model of `base` on the meta device.
        base: the model whose weights are loaded.
        rank: rank of the adapters.
        ids: tokens on which the logits are compared, bit for bit, with those of a model that was
            attached on the device itself.
    """
    device = ids.device.type
    reference = copy.deepcopy(base)
    pl.attach(reference, pl.LoRA(rank), nn.Linear)
    with torch.no_grad():
        perturb(reference)
        expected = reference(input_ids=ids[:1]).logits
    start = now(device)
    model = build()
    pl.attach(model, pl.LoRA(rank), nn.Linear)
    attached = now(device)
    buffers = dict(base.named_buffers())
    model.to_empty(device=ids.device)
    pl.load_base_state_dict(model, base.state_dict())
    pl.load_state_dict(model, pl.state_dict(reference))
    # Llama's inverse frequencies are buffers that no state dict holds.
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    filled = now(device)
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids[:1]).logits, expected)
    return [
        {
            "what": "meta",
            "contestant": "paramlora",
            "attach_s": attached - start,
            "materialise_s": filled - attached,
            "same_logits": same,
        }
    ]


def perturb(model: nn.Module) -> None:
    """Add noise to the factors, so that the adapter changes the outputs. Needs no_grad."""
    for factor in pl.parameters(model):
        factor.add_(torch.randn_like(factor) * 0.01)
