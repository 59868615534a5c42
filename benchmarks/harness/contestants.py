"""The contestants: implementations of LoRA on the linear layers of a model.

    y = x (W + s · B A)ᵀ + b        at every nn.Linear, A: (r, k), B: (m, r), s = alpha / r

A contestant takes a frozen model, a rank and alpha. It returns the adapted model and the factors of
each layer, so that all contestants can get the same values and be checked before they are timed.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paramlora as pl

Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]
Built = tuple[nn.Module, Factors]


@dataclass(frozen=True)
class Contestant:
    """An implementation of LoRA, or one setting of it.

    Args:
        name: its name in rows and tables.
        build: adapts a model with a rank and alpha.
        package: the package that it needs.
        finish: called with the model after the factors have been set, for example to merge them.
        active: whether the factors contribute to the outputs after `finish`.
        trained: whether the factors get gradients after `finish`.
        dora: whether it computes DoRA, in which the rows of W + s · B A get the norms of W's rows.
    """

    name: str
    build: Callable[[nn.Module, int, float], Built]
    package: str = "torch"
    finish: Callable[[nn.Module], None] | None = None
    active: bool = True
    trained: bool = True
    dora: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        distribution = {"lycoris": "lycoris-lora"}.get(self.package, self.package)
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            return pl.__version__


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def floor(model: nn.Module, rank: int, alpha: float) -> Built:
    """Return the frozen model itself, without factors."""
    return model, {}


def paramlora(
    model: nn.Module, rank: int, alpha: float, kind: type[pl.LoRA] | type[pl.DoRA] = pl.LoRA
) -> Built:
    """Adapt by `paramlora.attach`, with factors in float32."""
    paths = list(linears(model))
    pl.attach(model, kind(rank, alpha), nn.Linear)
    state = dict(model.named_parameters())
    prefix = "parametrizations.weight.0.factors.default"
    return model, {p: (state[f"{p}.{prefix}.A"], state[f"{p}.{prefix}.B"]) for p in paths}


def paramlora_one_dtype(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt by `paramlora.attach`, with factors in the dtype of the model."""
    adapted, factors = paramlora(model, rank, alpha)
    dtype = next(p.dtype for p in adapted.parameters() if not p.requires_grad)
    # Set .data, so that the parameters keep their identity.
    for A, B in factors.values():
        A.data, B.data = A.to(dtype), B.to(dtype)
    return adapted, factors


def merge_frozen(model: nn.Module) -> None:
    """Merge the adapter. Its factors are frozen, as a backward through them would raise."""
    pl.merge(model)
    pl.freeze(model)


def peft(
    model: nn.Module, rank: int, alpha: float, upcast: bool = True, dora: bool = False
) -> Built:
    """Adapt by PEFT; `upcast` keeps its default of float32 factors beside half precision."""
    from peft import LoraConfig, get_peft_model

    paths = list(linears(model))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, use_dora=dora)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=upcast)
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in paths}
    return wrapped, {
        path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for path, layer in layers.items()
    }


def peft_one_dtype(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt by PEFT, with factors in the dtype of the model."""
    return peft(model, rank, alpha, upcast=False)


def loralib(model: nn.Module, rank: int, alpha: float) -> Built:
    """Replace each linear layer by loralib's, which is not merged for inference."""
    import loralib as lora

    factors: Factors = {}
    for path, linear in linears(model).items():
        layer = lora.Linear(
            linear.in_features,
            linear.out_features,
            r=rank,
            lora_alpha=alpha,
            bias=linear.bias is not None,
            merge_weights=False,
        )
        layer.to(linear.weight)
        layer.weight, layer.bias = linear.weight, linear.bias
        _replace(model, path, layer)
        factors[path] = (layer.lora_A, layer.lora_B)
    return model, factors


def lycoris(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt by LyCORIS' LoCon modules."""
    from lycoris.modules.locon import LoConModule

    factors: Factors = {}
    for path, linear in linears(model).items():
        module = LoConModule(path.replace(".", "_"), linear, 1.0, lora_dim=rank, alpha=alpha)
        module.to(linear.weight)
        module.apply_to()
        linear.lycoris = module  # registers its parameters in the model
        factors[path] = (module.lora_down.weight, module.lora_up.weight)
    return model, factors


class _Naive(nn.Module):
    """The parametrization W + s · BA, written plainly."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.s = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.s * (self.B @ self.A)


def naive(model: nn.Module, rank: int, alpha: float) -> Built:
    """Adapt by a plain parametrization, which builds W + s · BA in every forward."""
    factors: Factors = {}
    for path, linear in linears(model).items():
        update = _Naive(linear.weight, rank, alpha)
        parametrize.register_parametrization(linear, "weight", update, unsafe=True)
        factors[path] = (update.A, update.B)
    return model, factors


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


CONTESTANTS = (
    Contestant("floor", floor),
    Contestant("floor, again", floor),
    Contestant("paramlora", paramlora, "paramlora"),
    Contestant("paramlora, one dtype", paramlora_one_dtype, "paramlora"),
    Contestant("paramlora, merged", paramlora, "paramlora", merge_frozen, trained=False),
    Contestant("paramlora, off", paramlora, "paramlora", pl.disable, active=False, trained=False),
    Contestant("PEFT", peft, "peft"),
    Contestant("PEFT, one dtype", peft_one_dtype, "peft"),
    Contestant("loralib", loralib, "loralib"),
    Contestant("LyCORIS", lycoris, "lycoris"),
    Contestant("naive", naive),
    Contestant("paramlora, DoRA", partial(paramlora, kind=pl.DoRA), "paramlora", dora=True),
    Contestant("PEFT, DoRA", partial(peft, dora=True), "peft", dora=True),
)


@torch.no_grad()
def set_factors(factors: Factors, values: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy values into the factors of a contestant, by the path of the layer."""
    for path, (A, B) in factors.items():
        A.copy_(values[path][0])
        B.copy_(values[path][1])


# Both compute the same as the floor. If their times differ from the floor's, the cause is a bias or
# noise, and equally small differences between contestants mean nothing.
CONTROLS = ("floor, again", "paramlora, off")


def select(names: list[str] | None, controls: bool = False) -> list[Contestant]:
    """Return the floor and the installed contestants with these names; all if None.

    Args:
        names: names of contestants.
        controls: add all controls. Otherwise "floor, again" is left out.
    """
    always = ("floor", *CONTROLS) if controls else ("floor",)
    return [
        contestant
        for contestant in CONTESTANTS
        if contestant.name in always
        or (
            contestant.installed
            and contestant.name != CONTROLS[0]
            and (names is None or contestant.name in names)
        )
    ]
