"""docs/serve.md: its code runs, and its table of engines agrees with the rules of their loaders.

The rules are written out here, from the sources that the page names. They concern the config of a
folder, and the names and shapes of its tensors. No engine is run.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paramlora as pl

DOC = Path(__file__).parents[2] / "docs" / "serve.md"
TEXT = DOC.read_text(encoding="utf-8")
FACTOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_A\.weight")
ENGINES = ("vLLM", "SGLang", "LoRAX", "TGI")
# The adapters of the rows of the page's table, by the first cell.
ROWS: dict[str, Any] = {
    "one rank and alpha at q, k, v, o, gate, up, down of all layers": {"*_proj": pl.LoRA(8, 2)},
    "a rank above the limit": {"*_proj": pl.LoRA(32)},
    "a rank that is not 8 or a multiple of 16": {"*_proj": pl.LoRA(12)},
    "different ranks": {"*.[kqvo]_proj": pl.LoRA(8), "*.down_proj": pl.LoRA(16)},
    "different alphas or strengths": {"*.[kqvo]_proj": pl.LoRA(8), "*.down_proj": pl.LoRA(8, 1)},
    "`rank_stabilized=True`": {"*_proj": pl.LoRA(8, rank_stabilized=True)},
    "q_proj without v_proj, or up_proj without gate_proj": {"*.q_proj": pl.LoRA(8)},
    "a projection in some layers only": {"*.0.*_proj": pl.LoRA(8)},
    "the embedding (`LoRA`)": {"*.embed_tokens": pl.LoRA(8), "*_proj": pl.LoRA(8)},
    "lm_head (`LoRA`)": {"lm_head": pl.LoRA(8), "*_proj": pl.LoRA(8)},
    "`DoRA`": {"*_proj": pl.DoRA(8)},
    "`Delta` on biases": {"*_proj.weight": pl.LoRA(8), "*.q_proj.bias": pl.Delta()},
    "`Delta` on lm_head or a classifier": {"*_proj": pl.LoRA(8), "lm_head": pl.Delta()},
    "`Delta` on norms": {"*_proj": pl.LoRA(8), "*norm.weight": pl.Delta()},
}
NOT_ONE_FOLDER = {"float32 factors", "another base of the same shapes"}


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks run, one after the other, and its assertions pass.

    A request for an adapter without a file fails alone, and the server goes on after a request that
    is cancelled or has a wrong shape. The folder for all engines breaks no rule;
    that of the adapter from which it was made breaks rules of three engines.
    """
    pytest.importorskip("transformers", reason="the page serves a Llama")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page: dict[str, Any] = {"__name__": "__main__"}
    for block in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        padding = "\n" * TEXT.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(DOC), "exec"), page)

    server, folder, x = page["server"], page["folder"], torch.ones(8)
    with pytest.raises(RuntimeError, match="shape"):
        server.ask("user1", torch.ones(3)).result(timeout=20)
    server.ask("user2", x).cancel()
    for name in ("x\0", "../secret", ""):
        with pytest.raises(ValueError, match="no adapter can have the name"):
            server.ask(name, x)
    wrong, right = server.ask("nobody", x), server.ask("user1", x)
    with pytest.raises(FileNotFoundError, match="nobody"):
        wrong.result(timeout=20)
    alone = page["copy"].deepcopy(page["base"])
    pl.load(alone, folder / "user1.safetensors")
    torch.testing.assert_close(right.result(timeout=20), alone(x[None])[0].detach())

    assert problems(folder / "chat") == {engine: [] for engine in ENGINES}
    pl.save_peft(page["model"], folder / "as trained")
    broken = [engine for engine, found in problems(folder / "as trained").items() if found]
    assert broken == ["SGLang", "LoRAX", "TGI"]


@pytest.mark.parametrize("row", ROWS)
def test_table_of_engines(row: str, tmp_path: Path) -> None:
    """Each engine reads the adapter of a row if and only if its folder breaks none of the rules."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(  # a Llama with biases
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2ForCausalLM(config)
    pl.attach(model, ROWS[row])
    pl.save_peft(model, tmp_path / "folder")
    found = problems(tmp_path / "folder")
    cells = table()[row]
    reads = [cell.startswith(("reads", "no limit")) for cell in cells]
    assert reads == [not found[engine] for engine in ENGINES], found


def test_rows_of_the_table() -> None:
    """Each row of the table of engines has an adapter here, except for two that need none."""
    assert table().keys() == ROWS.keys() | NOT_ONE_FOLDER


def table() -> dict[str, list[str]]:
    """Return the cells of the table of engines, by the first cell of the row."""
    lines = TEXT[TEXT.index("| the adapter has |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, _, *rest in cells}


def problems(folder: Path) -> dict[str, list[str]]:
    """Return which rules of each engine a folder breaks."""
    config = json.loads((folder / "adapter_config.json").read_text())
    shapes = {k: t.shape for k, t in load_file(folder / "adapter_model.safetensors").items()}
    return {
        "vLLM": list(of_vllm(config, shapes)),
        "SGLang": list(of_sglang(config, shapes)),
        "LoRAX": list(of_lorax(config, shapes)),
        "TGI": list(of_lorax(config, shapes))
        + ["lm_head"] * any(".lm_head.lora" in key for key in shapes),
    }


def projections(shapes: dict[str, Any]) -> dict[str, dict[int, int]]:
    """Return the rank of each projection by layer."""
    found: dict[str, dict[int, int]] = {}
    for key, shape in shapes.items():
        if match := FACTOR.fullmatch(key):
            found.setdefault(match[2].removesuffix("_proj"), {})[int(match[1])] = shape[0]
    return found


def of_vllm(config: dict[str, Any], shapes: dict[str, Any], limit: int = 16) -> Iterator[str]:
    yield from {"r", "lora_alpha", "target_modules"} - config.keys()
    if max([config["r"], *config.get("rank_pattern", {}).values()]) > limit:
        yield "rank"
    yield from {"use_dora", "lora_bias"} & {key for key, value in config.items() if value}
    if config.get("bias", "none") != "none":
        yield "bias"
    yield from {*config.get("modules_to_save", ())} - {"classifier", "score"}
    known = r"(\w+_proj|lm_head)\.lora_[AB]\.weight|embed_tokens\.lora_embedding_[AB]"
    yield from (key for key in shapes if not re.search(rf"\.({known})$", key))


def of_sglang(config: dict[str, Any], shapes: dict[str, Any], limit: int = 16) -> Iterator[str]:
    if not isinstance(config["target_modules"], list):
        yield "target_modules"
    if config["r"] > limit:
        yield "rank"
    yield from {"use_dora", "use_rslora", "alpha_pattern", "bias", "modules_to_save"} & {*config}
    by_layer = projections(shapes)
    if any(rank != config["r"] for ranks in by_layer.values() for rank in ranks.values()):
        yield "ranks"
    layers = {name: {*ranks} for name, ranks in by_layer.items()}
    for one, other in ("qv", "vq", "kq", ("up", "gate")):
        if layers.get(one, set()) - layers.get(other, set()):
            yield f"{one} without {other}"


def of_lorax(config: dict[str, Any], shapes: dict[str, Any], layers: int = 2) -> Iterator[str]:
    if config["r"] != 8 and config["r"] % 16:
        yield "the scale of a padded rank"
    ignored = {"use_dora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"}
    yield from ignored & {*config}
    yield from (name for name, ranks in projections(shapes).items() if len(ranks) < layers)
    yield from (key for key in shapes if "lora_embedding" in key)
