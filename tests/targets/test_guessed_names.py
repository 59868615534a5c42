"""Targets as people guess them: plain names, all linear layers, heads, shared modules."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from paramlora import Delta, LoRA
from paramlora.kinds import arguments
from tests.support.helpers import refuses
from tests.support.reference import shake


class Conv1D(nn.Module):
    """A Linear with a weight of (in, out), stored and called as in transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_lin, self.v_lin = nn.Linear(4, 4), Conv1D(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_lin(x) + self.v_lin(x)
        return x + self.attention(x, x, x)[0] + self.mlp(x)


class Model(nn.Module):
    """Two blocks, a head of two layers, and output embeddings, tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.lm_head = nn.Linear(4, 9, bias=False)
        if tied:
            self.lm_head.weight = self.emb.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x), self.lm_head(x)


def sites(model: nn.Module, spec: Any, targets: Any = None, **options: Any) -> list[str]:
    return [row.site for row in pl.attach(model, spec, targets, **options).sites]


def reasons(summary: pl.Summary) -> dict[str, str]:
    return {one.tensor: one.reason for one in summary.skipped}


def test_plain_names() -> None:
    """A name without wildcards matches every module or tensor whose path ends with it."""
    assert sites(Model(), LoRA(1), ["q_lin", "v_lin"]) == [
        "layers.0.q_lin.weight",
        "layers.0.v_lin.weight",
        "layers.1.q_lin.weight",
        "layers.1.v_lin.weight",
    ]
    assert sites(Model(), LoRA(1), "mlp.0") == ["layers.0.mlp.0.weight", "layers.1.mlp.0.weight"]
    assert sites(Model(), Delta(), "q_lin.bias") == ["layers.0.q_lin.bias", "layers.1.q_lin.bias"]
    assert sites(Model(), LoRA(1), "layers.1.q_lin") == ["layers.1.q_lin.weight"]
    assert sites(Model(), LoRA(1), "q_lin[:2]")[0] == "layers.0.q_lin.weight[:2]"
    assert len(sites(Model(), LoRA(1), "q_lin", exclude="0.q_lin")) == 1


def test_a_name_ends_at_a_dot() -> None:
    """A name does not match the end of another name."""
    refuses(
        Model(),
        lambda m: pl.attach(m, LoRA(1), "lin"),
        pl.TargetError,
        "no tensor matches 'lin'; did you mean '*.v_lin' (2 modules), '*.q_lin' (2 modules)?",
    )


LINEAR = [
    f"layers.{i}.{path}.weight"
    for i in (0, 1)
    for path in ("q_lin", "v_lin", "attention.out_proj", "mlp.0", "mlp.2")
] + ["head.0.weight", "head.2.weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [None, "all-linear", ["all-linear"]])
def test_all_linear(targets: Any, tied: bool) -> None:
    """By default all linear layers are adapted; the summary lists what is left out, and why."""
    summary = pl.attach(Model(tied), LoRA(1), targets)
    assert [row.site for row in summary.sites] == LINEAR
    found = reasons(summary)
    why = "shared with an embedding" if tied else "of the output embeddings"
    assert found["lm_head.weight"] == f"{why}; name it to adapt it"
    assert found["layers.1.attention.in_proj_weight"] == "in no linear layer; name it to adapt it"
    assert f"1 {why}; name it to adapt it (lm_head.weight)" in str(summary)


class Stem(nn.Conv1d):
    """A layer with an attribute that Conv1D has too, and no Linear."""

    nf = 4


class Squeeze(nn.Module):
    """A layer that shares its class's name with transformers' Conv1D, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


Squeeze.__name__ = "Conv1D"


def test_layers_that_are_half_a_conv1d() -> None:
    """Neither the name Conv1D nor an attribute `nf` alone makes a layer a linear one."""
    model = nn.ModuleDict({"stem": Stem(4, 4, 1), "squeeze": Squeeze(), "fc": nn.Linear(4, 4)})
    assert sites(model, LoRA(1)) == ["fc.weight"]


def test_a_type_means_every_layer_of_it() -> None:
    """nn.Linear as a target means every nn.Linear; a head that is left out can be named."""
    assert "lm_head.weight" in sites(Model(), LoRA(1), nn.Linear)
    assert "lm_head.weight" in sites(Model(), LoRA(1), ["all-linear", "lm_head"])
    assert sites(Model(), LoRA(1), "lm_head") == ["lm_head.weight"]


def test_only_layers_that_are_left_out() -> None:
    """If all linear layers are left out, the error says why."""
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["emb"].weight
    refuses(
        model,
        lambda m: pl.attach(m, LoRA(1)),
        pl.TargetError,
        "no tensor matches 'all-linear'; out.weight is shared with an embedding; name it to adapt "
        "it",
    )


CLOSE = {
    "a misspelt name": ("q_lyn", "; did you mean '*.q_lin' (2 modules), '*.v_lin' (2 modules)?"),
    "a misspelt glob": ("*.q_lyn", "; did you mean '*.q_lin' (2 modules), '*.v_lin' (2 modules)?"),
    "the name in another model": ("q_proj", "; did you mean '*.q_lin' (2 modules), "),
    "a glob from the top": ("[qv]_lin", "; did you mean '*.[qv]_lin' (4 tensors)?"),
    "a block of a glob": ("[qv]_lin[:2]", "; did you mean '*.[qv]_lin[:2]' (4 tensors)?"),
    "a glob that ends with digits": ("[02]", "; did you mean '*.[02].weight' (6 tensors)?"),
    "a tensor": ("q_lin.bais", "; did you mean '*.q_lin.bias' (2 tensors), "),
    "a single module": ("lm_heat", "; did you mean lm_head"),
}


@pytest.mark.parametrize(("target", "hint"), CLOSE.values(), ids=CLOSE.keys())
def test_close_patterns_are_counted(target: str, hint: str) -> None:
    """The error names close patterns, with the number of modules that each would match."""
    expected = f"no tensor matches {target!r}{hint}"
    with pytest.raises(pl.TargetError, match=f"^{re.escape(expected)}"):
        pl.attach(Model(), LoRA(1), target)
    if glob := re.search(r"'(\S+)' \((\d+) tensors", hint):
        spec = Delta() if "bias" in glob[1] else LoRA(1)
        assert len(sites(Model(), spec, glob[1])) == int(glob[2])


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (r".*\.(q|v)_lin", "4 modules"),
        (r".*q_lin$", "2 modules"),
        (r"layers\.\d+\.q_lin", "2 modules"),
        (r".*\.mlp\.[02]", "4 modules"),
        ("^lm_head", "1 module"),
        ("(q_lin", None),
    ],
)
def test_regular_expressions_are_refused(target: str, count: str | None) -> None:
    """A target that is a regular expression raises, and says what to write instead."""
    expected = (
        f"no tensor matches {target!r}; targets are names and globs, not regular expressions: "
        r"write ['q_proj', 'v_proj'] and not '.*\.(q|v)_proj', or pass a callable"
    )
    if count is not None:
        expected += f", lambda path, module: re.fullmatch({target!r}, path) ({count})"
    refuses(Model(), lambda m: pl.attach(m, LoRA(1), target), pl.TargetError, expected)


def test_vectors_that_a_glob_matches() -> None:
    """A glob with a low-rank spec skips vectors and says so; a later target may take them."""
    summary = pl.attach(Model(), LoRA(1), "*.mlp.*")
    assert [row.site for row in summary.sites] == [
        f"layers.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)
    ]
    few = "with too few dimensions for LoRA"
    assert reasons(summary)["layers.0.mlp.1.weight"] == few
    assert f"8 {few} (layers.0.mlp.0.bias, " in str(summary)
    both = pl.attach(Model(), {"*.mlp.*": LoRA(1), "*.mlp.*.bias": Delta()})
    assert sum(row.kind == "Delta" for row in both.sites) == 6
    assert sum(reason == few for reason in reasons(both).values()) == 2
    with pytest.raises(pl.TargetError, match=r"adapt 'layers\.0\.mlp\.0\.bias' with LoRA"):
        pl.attach(Model(), LoRA(1), "*.mlp.*.bias")


def test_a_head_is_one_target() -> None:
    """`Delta()` on a module takes all its parameters, also those of the modules inside it."""
    head = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    found = sites(Model(), {"q_lin": LoRA(1), "head": Delta()})
    assert found == ["layers.0.q_lin.weight", "layers.1.q_lin.weight", *head]
    assert sites(Model(), Delta(), "head.2") == head[2:]
    assert sites(Model(), Delta(), lambda path, module: path == "head") == head
    assert sites(Model(), Delta(), "head.2[:1]") == ["head.2.weight[:1]"]
    assert sites(Model(), Delta(), ["lm_head", "head"], exclude="head.0") == [
        *head[2:],
        "lm_head.weight",
    ]
    assert sites(nn.Sequential(nn.LSTM(2, 2)), Delta(), nn.LSTM)[0] == "0.weight_ih_l0"


class Shared(nn.Module):
    """One Linear under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"proj": nn.Linear(3, 3)})
        self.decoder = nn.ModuleDict({"proj": self.encoder["proj"], "out": nn.Linear(3, 2)})
        self.around = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder["out"](self.decoder["proj"](self.encoder["proj"](x)))


@pytest.mark.parametrize(
    "target",
    ["decoder.proj", "decoder.proj.weight", "decoder.p*", lambda path, _: path == "decoder.proj"],
)
def test_both_paths_of_a_shared_module(target: Any) -> None:
    """A shared module can be named by each of its paths; its site has the first one."""
    model: Any = Shared()
    plain = copy.deepcopy(model)
    assert sites(model, LoRA(1), target) == ["encoder.proj.weight"]
    shake(model)
    factors = pl.state_dict(model)
    W = (
        plain.encoder["proj"].weight
        + factors["encoder.proj.weight.B"] @ factors["encoder.proj.weight.A"]
    )
    torch.testing.assert_close(model.decoder["proj"].weight, W)
    assert sites(Shared(), LoRA(1), nn.Linear, exclude=target) == ["decoder.out.weight"]


def test_a_module_that_contains_itself() -> None:
    """Paths are found in a model whose modules lead back to themselves."""
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].owner = model  # a cycle
    assert sites(model, LoRA(1), "0") == ["0.weight"]
    pl.detach(model)


ARGUMENTS: list[tuple[Any, dict[str, Any], str]] = [
    (LoRA, {"r": 4}, "LoRA() has no argument 'r': write rank="),
    (LoRA, {"rank": 4, "lora_alpha": 8}, "LoRA() has no argument 'lora_alpha': write alpha="),
    (
        LoRA,
        {"lora_dropout": 0.1},
        "LoRA() has no argument 'lora_dropout': write dropout=",
    ),
    (LoRA, {"target_modules": []}, "LoRA() has no argument 'target_modules': pass the targets to"),
    (LoRA, {"use_dora": True}, "LoRA() has no argument 'use_dora': use DoRA()"),
    (pl.DoRA, {"r": 4}, "DoRA() has no argument 'r': write rank="),
    (pl.LoHa, {"alpha": 4, "r": 2}, "LoHa() has no argument 'r': write rank="),
    (pl.LoKr, {"target_modules": []}, "LoKr() has no argument 'target_modules': pass the"),
    (pl.IA3, {"target_modules": []}, "IA3() has no argument 'target_modules': pass the targets to"),
    (pl.IA3, {"r": 4}, "IA3() has no argument 'r': this kind has no rank"),
    (Delta, {"lora_alpha": 4}, "Delta() has no argument 'lora_alpha': this kind has no alpha"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), ARGUMENTS)
def test_arguments_of_other_libraries(kind: Any, arguments: dict[str, Any], message: str) -> None:
    """An argument of PEFT raises TypeError with ours, or says that there is none."""
    with pytest.raises(TypeError, match=re.escape(message)):
        kind(**arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("get_peft_model", "; its name here is attach"),
        ("disable_adapter", "; its name here is disabled"),
        ("merge_and_unload", "; its name here is bake"),
        ("add_lora", "; its name here is attach"),
        ("merge_lora", "; its name here is bake"),
        ("get_peft_model_state_dict", "; its name here is state_dict"),
        ("lora_state_dict", "; its name here is state_dict"),
        ("from_hub", "; its name here is integrations.hub.from_hub"),
        ("atach", "; did you mean attach"),
        ("zzz", ""),
    ],
)
def test_functions_of_other_libraries(name: str, message: str) -> None:
    """A function of another library or in a submodule, or a typing error, raises with ours."""
    expected = f"module 'paramlora' has no attribute {name!r}{message}"
    with pytest.raises(AttributeError, match=f"^{re.escape(expected)}"):
        getattr(pl, name)


def test_names_in_messages_exist() -> None:
    """Every function that a message names exists, in `paramlora` or in the submodule it says."""
    for ours in arguments._FUNCTIONS:
        module, _, name = ours.rpartition(".")
        if module:  # which needs its library, so it is read and not imported
            source = Path(pl.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
            assert re.search(rf"^(def|class) {name}\b", source.read_text("utf-8"), re.MULTILINE), (
                ours
            )
        else:
            assert name in pl.__all__, ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["q_lin"]},
            "has no argument 'target_modules': write targets=",
        ),
        ({"adapter_name": "a"}, "attach() has no argument 'adapter_name': write name="),
        ({"r": 4}, "attach() has no argument 'r': write LoRA(rank=...) as the spec"),
        ({"modules_to_save": ["head"]}, "has no argument 'modules_to_save': map the module to"),
        ({"nmae": "a"}, "attach() has no argument 'nmae'; did you mean name?"),
    ],
)
def test_arguments_of_other_libraries_to_attach(arguments: dict[str, Any], message: str) -> None:
    """An unknown argument of `attach` raises TypeError and changes nothing."""
    refuses(
        Model(),
        lambda m: pl.attach(m, LoRA(1), **arguments),
        TypeError,
        f"[...]{message}[...]",
    )


def test_the_signature_of_a_kind() -> None:
    """`help` and editors show the arguments of a kind, as of any dataclass."""
    assert list(inspect.signature(LoRA).parameters)[:3] == ["rank", "alpha", "init"]
    assert list(inspect.signature(pl.IA3).parameters) == ["dim"]


def test_default_target_on_transformers() -> None:
    """By default GPT-2 gets every Conv1D, Llama all but lm_head, and BERT its classifier too."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = small | {"hidden_size": 8, "intermediate_size": 8}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2)
    )
    found = pl.attach(gpt2, LoRA(1))
    ends = [row.site.removeprefix("transformer.h.0.") for row in found.sites]
    assert ends == [f"{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    )
    found = pl.attach(llama, LoRA(1))
    assert len(found.sites) == 7
    assert reasons(found)["lm_head.weight"] == "of the output embeddings; name it to adapt it"
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    assert sites(bert, LoRA(1))[-1] == "classifier.weight"
