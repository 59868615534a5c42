"""PEFT's folders of OFT, HiRA and MiSS: their settings, keys and factors, read and written.

    PEFT                     key of the factor             ours
    OFT, Linear              oft_R.weight                  Q
    OFT, Embedding           oft_embedding_R.weight        −Q, because PEFT has W R, and R(−Q) = Rᵀ
    HIRA, Linear             hira_A, hira_B                A, B
    HIRA, Embedding          hira_embedding_A, …_B         Bᵀ, Aᵀ, because PEFT has (B A)ᵀ
    MISS, Linear             miss_block                    D

Such a folder has one kind. paramlora reads and writes no trained biases and no `modules_to_save`
beside these kinds. LoRA's folders are in the other files.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.plan import check_dtypes, check_site, plan_site
from ..files.state import compare
from ..kinds.hira import HiRA
from ..kinds.miss import MiSS
from ..kinds.oft import OFT
from ..kinds.spec import Spec
from ..layers.install import PlannedSite
from ..site.find import Site
from ..site.place import Place
from ..stack.factors import Factors
from .config_file import Content
from .layout import Part, cannot_store
from .read import check_untied, targets_of
from .whole import Folder

# By PEFT's name: our kind, and our factors with the ends of PEFT's keys. "{}" is "embedding_" at an
# Embedding, else empty.
OTHER_TYPES: dict[str, tuple[type[Spec], dict[str, str]]] = {
    "OFT": (OFT, {"Q": "oft_{}R.weight"}),
    "HIRA": (HiRA, {"A": "hira_{}A", "B": "hira_{}B"}),
    "MISS": (MiSS, {"D": "miss_block"}),
}


def other_kind(here: list[Site], name: str) -> str | None:
    """Return PEFT's type of an adapter of a kind in this file at all its sites, or None."""
    kinds = {type(part.spec) for site in here for part in site.stack.parts(name)}
    return next((key for key, (kind, _) in OTHER_TYPES.items() if kinds == {kind}), None)


def other_content(
    here: list[Site], name: str, by_site: Mapping[str, Part], peft_type: str
) -> Content:
    """Return an adapter's settings and tensors, or raise a TargetError, as `folder_content`."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    for site in here:
        part = by_site.get(site.path)
        reason = _refusal(part, peft_type)
        if part is None or reason is not None:
            raise cannot_store(site.path, reason or "")
        (factors,) = site.stack.parts(name)
        specs[part.module_path] = factors.spec
        if _settings(factors.spec) != _settings(next(iter(specs.values()))):
            # PEFT to 0.21.2 ignores HiRA's setting rank_pattern.
            raise cannot_store(site.path, f"PEFT needs the same settings of {peft_type} everywhere")
        tensors |= _to_peft(part, peft_type, factors)
    return {
        "peft_type": peft_type,
        "target_modules": "|".join(re.escape(path) for path in specs),
        "inference_mode": True,
        **_settings(next(iter(specs.values()))),
    }, tensors


def plan_other(folder: Folder) -> list[PlannedSite]:
    """Return the factors of a folder, or raise a CheckpointError."""
    peft_type, path = folder.content["peft_type"], folder.path
    chosen: list[tuple[Part, Place, Spec]] = []
    expected: dict[str, Tensor] = {}
    for part in targets_of(folder):
        reason = _refusal(part, peft_type)
        if reason is not None or part.site not in folder.seen.places:
            raise CheckpointError(
                f"{path} adapts {part.module_path!r}, but {reason or 'no weight'}"
            )
        place = folder.seen.places[part.site]
        spec = _spec(part, place.value, folder)
        check_site(place, spec, path)
        blank = spec.create(torch.empty(place.value.shape, device="meta"))
        expected |= {
            key: _converted(part, peft_type, blank[ours])
            for ours, key in _keys(part, peft_type).items()
        }
        chosen.append((part, place, spec))
    compare(folder.state, expected, str(path))
    check_dtypes(folder.state, path)
    planned = []
    for part, place, spec in chosen:
        found = {ours: folder.state[key] for ours, key in _keys(part, peft_type).items()}
        factors = {ours: _converted(part, peft_type, tensor) for ours, tensor in found.items()}
        planned.append(plan_site(place, spec, factors))
    check_untied(planned, folder)
    return planned


def _spec(part: Part, weight: Tensor, folder: Folder) -> Spec:
    content, peft_type = folder.content, folder.content["peft_type"]
    # The first dimension of PEFT's first factor, or 0 if there is none.
    factor = folder.state.get(min(_keys(part, peft_type).values()))
    length = len(factor) if factor is not None and factor.dim() else 0
    try:
        if peft_type == "HIRA":
            # PEFT to 0.21.2 ignores `rank_pattern`, so the factor tells the rank.
            return HiRA(length or folder.config.r)
        if peft_type == "MISS":
            return MiSS(content.get("r", 64))
        # PEFT changes a block size that does not divide the inputs. The factor has the final one.
        inputs = weight.shape[1:].numel()
        block = inputs // length if length else content.get("oft_block_size")
        series = content.get("use_cayley_neumann", True)
        terms = content.get("num_cayley_neumann_terms", 5) if series else None
        eps = content.get("eps", 6e-5) if content.get("coft") else None
        if series and not _is_current(content.get("peft_version")):
            raise ValueError(
                "its series (use_cayley_neumann) is of a PEFT before 0.18, which computed another "
                "one; train it again"
            )
        return OFT(block, eps=eps, terms=terms)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.path} adapts {part.module_path!r}, but {error}") from error


def _is_current(version: object) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= (0, 18)


def _settings(spec: Spec) -> dict[str, Any]:
    """Return PEFT's settings for a spec."""
    if not isinstance(spec, OFT):
        return {"r": spec.rank}
    return {
        "r": 0,
        "oft_block_size": spec.block_size,
        "coft": spec.eps is not None,
        **({} if spec.eps is None else {"eps": spec.eps}),
        "use_cayley_neumann": spec.terms is not None,
        "num_cayley_neumann_terms": spec.terms or 5,
        # By the version PEFT tells which series it is; 0.18 has had today's form.
        "peft_version": "0.18.0",
    }


def _refusal(part: Part | None, peft_type: str) -> str | None:
    """Return why PEFT's folder of a kind cannot have a tensor, or None if it can."""
    types = (nn.Linear,) if peft_type == "MISS" else (nn.Linear, nn.Embedding)
    if part is None or not isinstance(part.module, types):
        names = " and ".join(kind.__name__ for kind in types)
        return f"folders of {peft_type} are supported for the weights of {names} submodules"
    return part.refusal()


def _keys(part: Part, peft_type: str) -> dict[str, str]:
    """Return PEFT's key of each of our factors."""
    names, embedding = OTHER_TYPES[peft_type][1], isinstance(part.module, nn.Embedding)
    ends = [end.format("embedding_" if embedding else "") for end in names.values()]
    pairs = zip(names, ends[::-1] if embedding else ends, strict=True)
    return {ours: f"{part.module_path}.{end}" for ours, end in pairs}


def _to_peft(part: Part, peft_type: str, factors: Factors) -> dict[str, Tensor]:
    """Return PEFT's tensors with the strength multiplied into the last factor."""
    strength, keys = float(factors.strength), _keys(part, peft_type)
    if getattr(factors.spec, "eps", None) is not None and strength != 1:
        raise cannot_store(part.site, f"PEFT has no strength, {strength:g}, beside eps")
    *_, last = keys
    scaled = {**factors.tensors, last: factors.tensors[last] * strength}
    return {key: _converted(part, peft_type, scaled[ours]) for ours, key in keys.items()}


def _converted(part: Part, peft_type: str, factor: Tensor) -> Tensor:
    """Return PEFT's factor for ours, or ours for PEFT's, which is the same conversion."""
    if not isinstance(part.module, nn.Embedding):
        return factor
    return -factor if peft_type == "OFT" else factor.T
