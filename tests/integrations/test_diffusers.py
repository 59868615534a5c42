"""`save_diffusers` and `load_diffusers` against diffusers itself, on tiny models in float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.integrations.diffusers import load_diffusers, save_diffusers
from tests.support.reference import shake

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FILE = "pytorch_lora_weights.safetensors"
# Ranks, alphas and kinds of layers differ.
SPECS = {
    "*attn1.to_q": pl.LoRA(2, alpha=3),
    "*attn1.to_out.0": pl.LoRA(2, alpha=3),
    "*attn2.to_k": pl.LoRA(3, alpha=1),
    "*proj_in": pl.LoRA(1, alpha=5),
    "*conv1": pl.LoRA(2, alpha=1),
    "conv_in": pl.LoRA(1, alpha=7),
    "*time_emb_proj": pl.LoRA(2),
    "*ff.net.2": pl.LoRA(2, alpha=3, rank_stabilized=True),
}


def unet(**settings: Any) -> Any:
    """Return a U-Net with convolutions, attention and 17,028 parameters."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,)}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
    }
    attention = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    model = diffusers.UNet2DConditionModel(**{**sizes, **blocks, **attention, **settings})
    return model.double().eval()


def flux() -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    others = {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    model = diffusers.FluxTransformer2DModel(**sizes, **others, axes_dims_rope=(2, 2, 4))
    return model.double().eval()


def text_encoder() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPTextConfig(num_attention_heads=2, **sizes, **special)
    return transformers.CLIPTextModel(config).double().eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """Return the outputs of a tiny model for fixed inputs."""
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(random(2, 4, 8, 8), torch.tensor([3, 5]), random(2, 3, 8)).sample
    if isinstance(model, diffusers.FluxTransformer2DModel):
        return model(
            hidden_states=random(1, 4, 4),
            encoder_hidden_states=random(1, 3, 8),
            pooled_projections=random(1, 8),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample
    return model(torch.tensor([[0, 5, 3, 1]])).last_hidden_state


def pipeline(unet: Any = None, text_encoder: Any = None) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux_pipeline(transformer: Any) -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def adapted(plain: nn.Module, specs: Any = SPECS) -> nn.Module:
    model = copy.deepcopy(plain)
    pl.attach(model, specs)
    shake(model)
    pl.scale(model, 0.5)
    return model


FLUX_SPECS = {
    "*to_q": pl.LoRA(2, alpha=3),
    "*.proj_mlp": pl.LoRA(1, alpha=5),
    "x_embedder": pl.LoRA(3),
}
DORA = {"*attn1.to_q": pl.DoRA(2, alpha=3), "*conv1": pl.DoRA(1, alpha=5)}


@pytest.mark.parametrize(
    ("make", "specs", "around"),
    [(unet, SPECS, pipeline), (unet, DORA, pipeline), (flux, FLUX_SPECS, flux_pipeline)],
    ids=["unet", "unet, DoRA", "transformer"],
)
def test_diffusers_loads_what_paramlora_has_trained(
    make: Callable[[], Any], specs: Any, around: Callable[[Any], Any], tmp_path: Path
) -> None:
    """A pipeline and a model compute with a saved file what the adapter computes, and so does a
    copy that loads it."""
    plain = make()
    model = adapted(plain, specs)
    save_diffusers(model, tmp_path)
    expected = run(model)
    assert not torch.allclose(expected, run(plain))

    piped, alone, back = (copy.deepcopy(plain) for _ in range(3))
    around(piped).load_lora_weights(tmp_path)
    assert_close(run(piped), expected)
    prefix = "unet" if make is unet else "transformer"
    alone.load_lora_adapter(tmp_path / FILE, prefix=prefix, use_safetensors=True)
    assert_close(run(alone), expected)
    load_diffusers(back, tmp_path)
    assert_close(run(back), expected)


@pytest.mark.parametrize("prefix", ["", "unet"])
def test_paramlora_loads_what_diffusers_has_saved(prefix: str, tmp_path: Path) -> None:
    """A file of `save_lora_adapter` or `save_lora_weights` gives the outputs that diffusers has."""
    plain = unet()
    theirs = copy.deepcopy(plain)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "to_out.0", "conv1", "conv_in"],
        rank_pattern={"conv_in": 3, "mid_block.*to_q": 1},
        alpha_pattern={"conv1": 5},
        init_lora_weights=False,
    )
    theirs.add_adapter(config)
    theirs.double().eval()
    if prefix:
        pipeline(theirs).save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(theirs),
            unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        )
    else:
        theirs.save_lora_adapter(tmp_path)
    model = copy.deepcopy(plain)
    summary = load_diffusers(model, tmp_path, name="style")
    assert_close(run(model), run(theirs))
    assert {(site.rank, site.scale) for site in summary.sites} == {
        (2, 1.5),
        (2, 2.5),
        (3, 1.0),
        (1, 3.0),
    }
    assert summary.active == ("style",)


def test_without_metadata_alpha_is_the_rank(tmp_path: Path) -> None:
    """A file without settings, with the keys of today or of years ago, has scale 1 in diffusers."""
    plain = unet()
    model = adapted(plain, {"*attn1.to_q": pl.LoRA(2), "*attn1.to_out.0": pl.LoRA(3)})
    pl.scale(model, 1.0)
    save_diffusers(model, tmp_path)
    today = load_file(tmp_path / FILE)
    old = {
        key.replace("to_out.0", "to_out")
        .replace(".attn1.to_", ".attn1.processor.to_")
        .replace(".lora_A.", "_lora.down.")
        .replace(".lora_B.", "_lora.up."): tensor
        for key, tensor in today.items()
    }
    newer = {key.replace("_A.", ".down.").replace("_B.", ".up."): t for key, t in today.items()}
    for state in (today, old, newer):
        save_file(state, tmp_path / "old.safetensors")
        theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
        pipeline(theirs).load_lora_weights(tmp_path / "old.safetensors")
        load_diffusers(ours, tmp_path / "old.safetensors")
        for loaded in (theirs, ours):
            assert_close(run(loaded), run(model))


def test_several_models_in_one_file(tmp_path: Path) -> None:
    """A pipeline loads a U-Net and a text encoder from one file, and so do the models by name."""
    plain = {"unet": unet(), "text_encoder": text_encoder()}
    specs = {"unet": SPECS, "text_encoder": {"*q_proj": pl.LoRA(1, alpha=3), "*fc1": pl.LoRA(2)}}
    models = {name: adapted(model, specs[name]) for name, model in plain.items()}
    save_diffusers(models, tmp_path)
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    pipeline(**theirs).load_lora_weights(tmp_path)
    for name, model in models.items():
        load_diffusers(ours[name], tmp_path)
        assert_close(run(theirs[name]), run(model))
        assert_close(run(ours[name]), run(model))


def test_kohya_file_whose_layers_have_other_alphas(tmp_path: Path) -> None:
    """A pipeline computes the same with kohya's format, and so does a copy that loads it."""
    plain = unet()
    model, theirs, ours = adapted(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    save_diffusers(model, tmp_path / "style.safetensors", format="kohya")
    assert "lora_unet_mid_block_resnets_0_conv1.alpha" in load_file(tmp_path / "style.safetensors")
    pipeline(theirs).load_lora_weights(tmp_path / "style.safetensors")
    assert_close(run(theirs), run(model))
    load_diffusers(ours, tmp_path / "style.safetensors")
    assert_close(run(ours), run(model))


def test_kohya_file_of_a_unet_and_its_text_encoder(tmp_path: Path) -> None:
    """Each layer computes with W + alpha / r · up down, in kohya's names and half precision.

    A slot of a higher rank takes the same update.
    """
    models = {"lora_unet_": unet(), "lora_te1_": text_encoder()}
    layers: dict[str, dict[str, float | None]] = {
        "lora_unet_": {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 3.0,
            "mid_block.resnets.0.conv1": None,
        },
        "lora_te1_": {"encoder.layers.1.self_attn.out_proj": 0.5},
    }
    state: dict[str, Tensor] = {}
    weights = {}
    for start, alphas in layers.items():
        for path, alpha in alphas.items():
            key = start + ("text_model_" if "te1" in start else "") + path.replace(".", "_")
            weight = models[start].get_submodule(path).weight
            down = random(2, *weight.shape[1:]).half()
            up = random(weight.shape[0], 2, *[1 for _ in weight.shape[2:]]).half()
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(alpha).half()
            update = (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)
            weights[start, path] = weight + update * (1 if alpha is None else alpha / 2)
    save_file(state, tmp_path / "kohya.safetensors", {"ss_network_dim": "2"})
    for start, model in models.items():
        slotted = copy.deepcopy(model)
        pl.attach(slotted, pl.LoRA(4), [*layers[start]], name="slot")
        load_diffusers(model, tmp_path / "kohya.safetensors")
        load_diffusers(slotted, tmp_path / "kohya.safetensors", into="slot")
        assert pl.names(slotted) == ["slot"]
        for path in layers[start]:
            assert_close(model.get_submodule(path).weight, weights[start, path])
            assert_close(slotted.get_submodule(path).weight, weights[start, path])


@pytest.mark.parametrize("kind", ["SDXL", "Flux"])
def test_pipeline_converts_other_names(kind: str, tmp_path: Path) -> None:
    """With `pipeline=`, names of the repositories that models came from give diffusers' outputs."""
    around: Any = diffusers.StableDiffusionXLPipeline if kind == "SDXL" else diffusers.FluxPipeline
    if kind == "SDXL":
        plain = unet(
            layers_per_block=2,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        shapes = {
            "input_blocks_4_1_transformer_blocks_0_attn2_to_v": ([2, 8], [8, 2]),
            "middle_block_0_in_layers_2": ([2, 8, 3, 3], [8, 2, 1, 1]),
        }
    else:
        plain = flux()
        shapes = {
            "double_blocks_0_img_attn_qkv": ([3, 16], [48, 3]),
            "double_blocks_0_img_mlp_2": ([2, 64], [16, 2]),
        }
    state = {}
    for name, (down, up) in shapes.items():
        state[f"lora_unet_{name}.lora_down.weight"] = random(*down)
        state[f"lora_unet_{name}.lora_up.weight"] = random(*up)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(3.0)
    file = tmp_path / "original.safetensors"
    save_file(state, file)
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    if kind == "SDXL":
        state, alphas = around.lora_state_dict(file, unet_config=plain.config)
        around.load_lora_into_unet(state, alphas, theirs)
    else:
        around.load_lora_into_transformer(around.lora_state_dict(file), None, theirs)
    with pytest.raises(pl.CheckpointError, match=f"it has {next(iter(shapes))}.*no module here"):
        load_diffusers(ours, file)
    load_diffusers(ours, file, pipeline=around)
    assert not torch.allclose(run(ours), run(plain))
    assert_close(run(ours), run(theirs))


REFUSED = [
    ({"conv_in.weight": pl.LoRA(1), "conv_in.bias": pl.Delta()}, "diffusers", "conv_in.*bias"),
    ({"*conv1": pl.LoRA(1), "*norm1.weight": pl.Delta()}, "diffusers", "norm1.weight"),
    ({"*to_q": pl.OFT(block_size=2)}, "diffusers", "to_q.oft"),
    ({"*to_q": pl.IA3()}, "diffusers", "IA3 is not a low-rank update"),
    ({"*to_q": pl.DoRA(1)}, "kohya", "to_q.lora_.* in the format 'kohya'"),
    ({"*linear_1": pl.LoRA(1)}, "kohya", "class_embedding.linear_1"),
]


@pytest.mark.parametrize(("specs", "format", "said"), REFUSED)
def test_adapter_that_a_file_cannot_express(
    specs: Any, format: str, said: str, tmp_path: Path
) -> None:
    """What diffusers would ignore or misread is refused by name, and nothing is written."""
    model = unet(class_embed_type="projection", projection_class_embeddings_input_dim=8)
    pl.attach(model, specs)
    with pytest.raises(pl.TargetError, match=said):
        save_diffusers(model, tmp_path, format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("component", "format"), [("transformer", "kohya"), ("unet", "a1111")])
def test_format_for_another_model(component: str, format: str, tmp_path: Path) -> None:
    """A format that does not exist, or not for a transformer, is refused."""
    model = nn.Sequential(nn.Linear(2, 2))
    pl.attach(model, pl.LoRA(1))
    with pytest.raises(ValueError, match=f"'kohya' for a U-Net alone; got '{format}' for"):
        save_diffusers({component: model}, tmp_path, format=format)
    with pytest.raises(TypeError, match=r"an nn\.Module, comes first.* got a DDIMScheduler"):
        save_diffusers(diffusers.DDIMScheduler(), tmp_path)


def factors(path: str, rank: int = 1) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": random(rank, 4), f"{path}.lora_B.weight": random(3, rank)}


SETTINGS = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc"]}
DAMAGED = [
    (
        factors("transformer.other"),
        {},
        "it has other.lora_A.weight, .*, which no module here takes",
    ),
    (factors("text_encoder.fc"), {}, "has no factors; component= names another"),
    (factors("fc") | {"fc.dora_scale": random(3)}, {}, "it has fc.dora_scale, which no module"),
    (factors("fc") | {"fc.alpha": random(2)}, {}, "it has fc.alpha, which no module"),
    ({"fc.alpha": torch.tensor(1.0)}, {}, "it has fc.alpha, which no module"),
    (factors("fc") | {"gone.alpha": torch.tensor(1.0)}, {}, "it has gone.alpha, which no module"),
    (factors("fc") | {"lora_unet_fc.lora_down.weight": random(1, 4)}, {}, "a factor in two ways"),
    (factors("fc") | {"fc.alpha": torch.tensor(float("inf"))}, {}, "'lora_alpha' must be a finite"),
    ({"fc.lora_A.weight": random(1, 4)}, {}, "fc.lora_B.weight"),
    (factors("fc", 2), SETTINGS, r"\(1, 4\)"),
    (factors("fc"), {**SETTINGS, "lora_bias": True}, "not support: lora_bias=True"),
    (factors("fc"), [], "must hold an object"),
]


@pytest.mark.parametrize(("state", "settings", "said"), DAMAGED)
def test_file_that_does_not_fit(state: Any, settings: Any, said: str, tmp_path: Path) -> None:
    """A file with another model's keys or with damage is refused, and the model does not change."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    before = copy.deepcopy(model.state_dict())
    metadata = {} if settings == {} else {"lora_adapter_metadata": json.dumps(settings)}
    save_file(state, tmp_path / "other.safetensors", metadata)
    with pytest.raises(pl.CheckpointError, match=said):
        load_diffusers(model, tmp_path / "other.safetensors")
    assert type(model["fc"]) is nn.Linear
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=FILE):
        load_diffusers(model, tmp_path)
