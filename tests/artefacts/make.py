"""Make the files in this folder: `python -m tests.artefacts.make`; files that exist stay.

    1/<case>.safetensors        a file of `paramlora.save`, in format version 1
    save_peft/<case>/           a folder of `paramlora.save_peft`
    peft/<case>/                a folder of PEFT's `save_pretrained`
    expected.safetensors        W' of each changed tensor, under "<folder>/<case>:<path>"

All values are small integers, divided by powers of two. So every product and sum is exact, and W'
has the same bits on each machine; `make` checks this in float64. A file is never made again:
it shows that what an older version wrote still loads. For a new kind or format, add a case.
"""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paramlora as pl
from paramlora import IA3, OFT, Delta, DoRA, HiRA, LoHa, LoKr, LoRA, LoRAXS, MiSS

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.safetensors"


class Net(nn.Module):
    """Tensors of several shapes; the rows of `turn.weight` have the norms 5, 10, 20 and 5."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.turn = nn.Linear(6, 4), nn.Linear(4, 4)
        self.emb, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 2, 3)
        self.mha = nn.MultiheadAttention(4, 2)
        self.experts = nn.Parameter(torch.empty(2, 3, 4))
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(dyadic(tensor, 3))
            self.turn.weight.copy_(
                torch.tensor([1.0, 2, 4, 1])[:, None] * torch.tensor([3.0, 4, 0, 0])
            )


def dyadic(like: Tensor, step: int) -> Tensor:
    """Return multiples of 1/4 from −3/4 to 3/4 in the shape of a tensor."""
    return ((torch.arange(like.numel()) * step % 7 - 3) / 4).view(like.shape)


CASES: dict[str, Any] = {
    "LoRA": {"fc": LoRA(2, 4), "emb": LoRA(1, rank_stabilized=True), "conv": LoRA(4, 2)},
    "LoRA-blocks": {
        "fc.weight[:2]": LoRA(1),
        "fc.weight[2:, 1:]": LoRA(2),
        "*.in_proj_weight": LoRA(1),
    },
    "LoRA-experts": {"experts": LoRA(2, batch_dims=1), "fc": LoRA(2, transposed=True)},
    "LoRA-pissa": {"fc": LoRA(2, init="pissa"), "turn": LoRA(1, 2, init="milora")},
    "LoRA-olora": {"fc": LoRA(1, init="olora")},
    "LoRA-dropout": {"fc": LoRA(2, dropout=0.25)},
    "LoRA-data": {"fc": LoRA(2, init="corda"), "turn": LoRA(2, init="null")},
    "DoRA": {"turn": DoRA(1)},
    "LoHa": {"fc": LoHa(2, 4), "conv": LoHa(1)},
    "LoKr": {"fc": LoKr(1, 2, factor=2), "turn": LoKr(None)},
    "IA3": {"fc": IA3(), "emb": IA3(dim=1), "conv.bias": IA3()},
    "OFT": {"fc": OFT(2), "turn": OFT(4, terms=4), "emb": OFT(2, eps=1e6)},
    "HiRA": {"fc": HiRA(2), "emb": HiRA(1)},
    "MiSS": {"fc": MiSS(4), "turn": MiSS(2)},
    "LoRAXS": {"fc": LoRAXS(2, 4)},
    "Delta": {"fc.bias": Delta(), "conv.weight": Delta(), "experts": Delta()},
}
# The folders of `save_peft`: the same adapters where PEFT's format can have them.
TO_PEFT: dict[str, Any] = {
    "LoRA": {**CASES["LoRA"], "*.in_proj_weight": LoRA(1), "fc.bias": Delta()},
    **{case: CASES[case] for case in ("LoRA-olora", "LoRA-pissa", "LoRAXS")},
    "HiRA": {"fc": HiRA(2), "emb": HiRA(2)},
    "MiSS": {"fc": MiSS(2), "turn": MiSS(2)},
    "LoRA-saved": {"fc": LoRA(2, 4), "conv.*": Delta()},
    "LoRA-dropout": CASES["LoRA-dropout"],
    "DoRA": CASES["DoRA"],
    "OFT": {"fc": OFT(2), "turn": OFT(2)},
}
# PEFT's own settings, by the name of its class.
FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, "lora_alpha": 4, "target_modules": ["fc", "emb", "conv"]}),
    "LoRA-patterns": (
        "LoraConfig",
        {"r": 2, "target_modules": "fc|turn", "rank_pattern": {"^turn": 1}, "lora_dropout": 0.25}
        | {"alpha_pattern": {"fc": 1}, "bias": "all", "modules_to_save": ["conv"]},
    ),
    "LoRA-attention": ("LoraConfig", {"r": 1, "target_modules": ["mha"]}),
    "DoRA": ("LoraConfig", {"r": 1, "lora_alpha": 1, "target_modules": ["turn"], "use_dora": True}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 2, "target_modules": ["fc", "turn"]}),
    "HiRA": ("HiraConfig", {"r": 2, "target_modules": ["fc", "emb"]}),
    "MiSS": ("MissConfig", {"r": 2, "target_modules": ["fc", "turn"]}),
}
# DoRA's m / ‖V‖ is exact if B A are multiples of the rows of `turn.weight`: here it is 2, ½, 1, 4.
EXACT_DORA = {
    "A": torch.tensor([[3.0, 4, 0, 0]]),
    "B": torch.tensor([[1.0], [2], [-2], [0]]),
    "d": torch.tensor([15.0, 0, -10, 15]),
}
EXACT_TURNS = torch.tensor([1.0, -1, 0])  # quarter turns


def adapted(spec: Mapping[Any, Any]) -> nn.Module:
    """Return a `Net` with an adapter of exact values, at strength ½ where that is exact."""
    model = Net()
    pl.attach(model, spec, name="kept")
    with torch.no_grad():
        for number, (key, tensor) in enumerate(pl.state_dict(model).items()):
            tensor.copy_(exact(key, tensor, number, spec))
    if not any(isinstance(one, DoRA | OFT) for one in spec.values()):
        pl.scale(model, 0.5)
    return model


def exact(key: str, like: Tensor, number: int, spec: Mapping[str, Any]) -> Tensor:
    factor = key.rpartition(".")[2]
    if any(isinstance(one, DoRA) for one in spec.values()):
        return EXACT_DORA[factor]
    if factor == "Q":
        return EXACT_TURNS[torch.arange(like.numel()) % 3].view(like.shape)
    return dyadic(like, 2 + number % 4)


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return W' of each tensor that a file or folder of this folder changes."""
    model = Net().to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    (pl.load_peft if path.is_dir() else pl.load)(model, path)
    after = pl.merged_state_dict(model)
    return {key: after[key] for key in before if not torch.equal(before[key], after[key])}


def from_peft(case: str, path: Path) -> None:
    """Save an adapter of exact values with PEFT."""
    import peft

    kind, settings = FROM_PEFT[case]
    config = getattr(peft, kind)(**settings)
    wrapped: Any = peft.get_peft_model(Net(), config)
    trained = [(k, p) for k, p in wrapped.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for number, (key, parameter) in enumerate(trained):
            parameter.copy_(exact_of_peft(key, parameter, number, case))
    wrapped.save_pretrained(path)
    (path / "README.md").unlink()


def exact_of_peft(key: str, like: Tensor, number: int, case: str) -> Tensor:
    if case == "DoRA":
        factors = {**EXACT_DORA, "m": EXACT_DORA["d"] + torch.tensor([5.0, 10, 20, 5])}
        return factors[next(letter for letter in "ABm" if f"lora_{letter}" in key)]
    return dyadic(like, 2 + number % 4)


def main() -> None:
    expected = load_file(EXPECTED) if EXPECTED.exists() else {}
    todo: list[tuple[Path, Any]] = []
    for folder in ("1", "save_peft", "peft"):
        (HERE / folder).mkdir(exist_ok=True)
    todo += [(HERE / "1" / f"{case}.safetensors", pl.save) for case in CASES]
    todo += [(HERE / "save_peft" / case, pl.save_peft) for case in TO_PEFT]
    todo += [(HERE / "peft" / case, from_peft) for case in FROM_PEFT]
    for path, save in todo:
        if path.exists():
            continue
        if save is from_peft:
            from_peft(path.name, path)
        else:
            save(adapted((CASES if save is pl.save else TO_PEFT)[path.stem]), path)
        found, wide = loaded(path), loaded(path, torch.float64)
        if not found or any(not torch.equal(found[key].double(), wide[key]) for key in wide):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise ValueError(f"{path} is not exact, or changes nothing")
        before = f"{path.parent.name}/{path.stem}:"
        expected |= {before + key: tensor.contiguous() for key, tensor in found.items()}
        print("made", path.relative_to(HERE))
    save_file(copy.deepcopy(expected), EXPECTED)


if __name__ == "__main__":
    main()
