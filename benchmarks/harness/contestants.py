"""The contestants: who adapts the linear layers of a model, each by its own package.

    y = x (W + s · B A)ᵀ + b        at every nn.Linear, A: (r, k), B: (m, r), s = alpha / r

A contestant takes a frozen model and rank and alpha, and returns the adapted model with the factors
of each layer, so that all can be given the same values and be checked before anything is timed.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paramlora as pl

Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]
Built = tuple[nn.Module, Factors]


@dataclass(frozen=True)
class Contestant:
    """A way to adapt a model; `package` is what has to be installed for it.

    `then` is called with the model when it has its factors, which do not count in the outputs where
    it is `off`, and get no gradients where they are not `learned`.
    """

    name: str
    build: Callable[[nn.Module, int, float], Built]
    package: str = "torch"
    then: Callable[[nn.Module], None] | None = None
    off: bool = False
    learned: bool = True

    @property
    def there(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        distribution = {"lycoris": "lycoris-lora"}.get(self.package, self.package)
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            return pl.__version__


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def floor(model: nn.Module, rank: int, alpha: float) -> Built:
    return model, {}


def ours(model: nn.Module, rank: int, alpha: float) -> Built:
    paths = list(linears(model))
    pl.attach(model, pl.LoRA(rank, alpha), nn.Linear)
    state = dict(model.named_parameters())
    own = "parametrizations.weight.0.factors.default"
    return model, {p: (state[f"{p}.{own}.A"], state[f"{p}.{own}.B"]) for p in paths}


def ours_one_dtype(model: nn.Module, rank: int, alpha: float) -> Built:
    adapted, factors = ours(model, rank, alpha)
    # The factors in the base's dtype, too, in place: they stay the same parameters.
    for A, B in factors.values():
        A.data, B.data = A.to(adapted_dtype(adapted)), B.to(adapted_dtype(adapted))
    return adapted, factors


def adapted_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if not p.requires_grad)


def peft(model: nn.Module, rank: int, alpha: float, upcast: bool = True) -> Built:
    from peft import LoraConfig, get_peft_model

    paths = list(linears(model))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=upcast)
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in paths}
    return wrapped, {
        path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for path, layer in layers.items()
    }


def peft_one_dtype(model: nn.Module, rank: int, alpha: float) -> Built:
    return peft(model, rank, alpha, upcast=False)


def loralib(model: nn.Module, rank: int, alpha: float) -> Built:
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
    from lycoris.modules.locon import LoConModule

    factors: Factors = {}
    for path, linear in linears(model).items():
        module = LoConModule(path.replace(".", "_"), linear, 1.0, lora_dim=rank, alpha=alpha)
        module.to(linear.weight)
        module.apply_to()
        linear.lycoris = module  # so that its parameters are the model's
        factors[path] = (module.lora_down.weight, module.lora_up.weight)
    return model, factors


class _Naive(nn.Module):
    """W + s · BA as anyone would write it."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.s = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.s * (self.B @ self.A)


def naive(model: nn.Module, rank: int, alpha: float) -> Built:
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
    Contestant("paramlora", ours, "paramlora"),
    Contestant("paramlora, one dtype", ours_one_dtype, "paramlora"),
    Contestant("paramlora, merged", ours, "paramlora", pl.merge, learned=False),
    Contestant("paramlora, off", ours, "paramlora", pl.disable, off=True, learned=False),
    Contestant("PEFT", peft, "peft"),
    Contestant("PEFT, one dtype", peft_one_dtype, "peft"),
    Contestant("loralib", loralib, "loralib"),
    Contestant("LyCORIS", lycoris, "lycoris"),
    Contestant("naive", naive),
)


@torch.no_grad()
def give(factors: Factors, values: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy the same factors into every contestant."""
    for path, (A, B) in factors.items():
        A.copy_(values[path][0])
        B.copy_(values[path][1])
