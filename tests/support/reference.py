"""Kinds of adapters, host modules, and a plain dense reference to compare them with.

The reference shares no code with paramlora. It is a copy of the host from before attaching, run by
`torch.func.functional_call` with W' computed by the formula of each kind, written out below. A new
kind of adapter is one line in `KINDS`, a new host one entry in `HOSTS`.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import paramlora as pl

Strength = float | Tensor
Formula = Callable[[Tensor, dict[str, Tensor], Strength], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: its spec, and the formula of W' from W, the factors and the strength."""

    spec: pl.kinds.Spec
    formula: Formula
    dimensions: int = 2
    # The largest possible rank of the update; None if it is not limited.
    rank: int | None = None
    # Whether two blocks of each tensor are adapted, not the whole; they leave some of it.
    blocks: bool = False
    # Whether the settings fit a tensor of enough dimensions.
    fits: Callable[[Tensor], bool] = lambda tensor: True

    def sites(self, path: str, tensor: Tensor) -> list[str]:
        """Return the sites at which a kind is tested in a tensor."""
        rows, *rest = tensor.shape
        if not self.blocks:
            return [path]
        columns = "1:" if rest and rest[0] > 1 else ":"
        lower = f"{path}[{rows // 2}:" + (f", {columns}]" if rest else "]")
        return [f"{path}[:{rows // 2}]", lower] if rows > 1 else [lower]

    def takes(self, tensor: Tensor) -> bool:
        return tensor.dim() >= self.dimensions and self.fits(tensor)


def dora(s: float, dim: int = 0, *, constant: bool = True) -> Formula:
    """Return W' = (‖W‖ + k·d) ⊙ V / ‖V‖ with V = W + k·s·BA, norms over all but `dim`."""

    def formula(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        V = W + k * s * (f["B"] @ f["A"]).reshape(W.shape)
        reduced = [i for i in range(W.dim()) if i != dim]
        before, after = (torch.linalg.vector_norm(M, dim=reduced, keepdim=True) for M in (W, V))
        if constant:
            before, after = before.detach(), after.detach()
        return (before + k * f["d"].view(before.shape)) * V / after

    return formula


def kronecker(s: float) -> Formula:
    """Return W' = W + k·s·W1 ⊗ W2, computed block by block."""

    def formula(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        W1 = f["W1"] if "W1" in f else f["B1"] @ f["A1"]
        W2 = f["W2"] if "W2" in f else f["B2"] @ f["A2"]
        W2 = W2.reshape(W.shape[0] // len(W1), W.shape[1] // len(W1.T), *W.shape[2:])
        rows = [torch.cat([entry * W2 for entry in row], dim=1) for row in W1]
        return W + k * s * torch.cat(rows)

    return formula


def moved(f: dict[str, Tensor]) -> Tensor:
    """Return BA − B₀A₀, written so that it does not cancel near the start."""
    left, right = [f["B"] - f["B0"], f["B0"]], [f["A"], f["A"] - f["A0"]]
    return torch.cat(left, dim=1) @ torch.cat(right)


def rotated(turn: Callable[[Tensor, Tensor], Tensor], largest: float | None = None) -> Formula:
    """Return W' = W Rᵀ with R of blocks turn(I, k·Q), and Q of two rows, as one dense matrix."""

    def formula(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        blocks = []
        for (q,) in f["Q"]:
            if largest is not None:
                bound = largest / len(f["Q"]) ** 0.5
                size = (2 * q * q).sqrt()
                q = q * bound / size if size > bound else q
            Q = q * torch.tensor([[0, 1], [-1, 0]], dtype=W.dtype)
            blocks.append(turn(torch.eye(2, dtype=W.dtype), k * Q))
        return (W.flatten(1) @ torch.block_diag(*blocks).T).reshape(W.shape)

    return formula


def cayley(eye: Tensor, Q: Tensor) -> Tensor:
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def pairs_of_inputs(tensor: Tensor) -> bool:
    return tensor[0].numel() % 2 == 0


def shared(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
    """Return W with column i of its matrix moved by k times row i mod r of D."""
    D, inputs = f["D"], W[0].numel()
    columns = [W.flatten(1)[:, i] + k * D[i % len(D)] for i in range(inputs)]
    return torch.stack(columns, dim=1).reshape(W.shape)


KINDS = {
    "lora": Kind(
        pl.LoRA(rank=2, alpha=3),
        lambda W, f, k: W + k * 3 / 2 * (f["B"] @ f["A"]).reshape(W.shape),
        rank=2,
    ),
    "lora_stabilized": Kind(
        pl.LoRA(rank=4, rank_stabilized=True),
        lambda W, f, k: W + k * 2 * (f["B"] @ f["A"]).reshape(W.shape),
        rank=4,
    ),
    "dora": Kind(pl.DoRA(rank=2, alpha=3), dora(3 / 2)),
    "loha": Kind(
        pl.LoHa(rank=2, alpha=3),
        lambda W, f, k: (
            W + k * 3 / 2 * ((f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"])).reshape(W.shape)
        ),
        rank=4,
    ),
    "lokr": Kind(pl.LoKr(rank=1, alpha=3), kronecker(3)),
    "ia3": Kind(
        pl.IA3(),
        lambda W, f, k: W * (1 + k * (f["l"] - 1)).view(-1, *[1] * (W.dim() - 1)),
        dimensions=1,
    ),
    "oft": Kind(pl.OFT(2), rotated(cayley), fits=pairs_of_inputs),
    "hira": Kind(pl.HiRA(rank=2), lambda W, f, k: W * (1 + k * (f["B"] @ f["A"]).reshape(W.shape))),
    "miss": Kind(pl.MiSS(rank=2), shared, rank=2, fits=lambda tensor: tensor[0].numel() > 1),
    "loraxs": Kind(
        pl.LoRAXS(rank=2, alpha=3),
        lambda W, f, k: W + k * 3 / 2 * (f["B"] @ f["R"] @ f["A"]).reshape(W.shape),
        rank=2,
        fits=lambda tensor: min(len(tensor), tensor[0].numel()) > 1,
    ),
    "delta": Kind(pl.Delta(), lambda W, f, k: W + k * f["D"], dimensions=1),
}
TRANSPOSED = Kind(
    pl.LoRA(rank=2, alpha=3, transposed=True),
    lambda W, f, k: W + k * 3 / 2 * (f["B"] @ f["A"]).T.reshape(W.shape),
    rank=2,
)
BLOCKS = {f"{name}_blocks": replace(KINDS[name], blocks=True) for name in ("lora", "dora", "delta")}
# Settings of kinds that take another code path.
VARIANTS = {
    "ia3_inputs": Kind(
        pl.IA3(dim=1),
        lambda W, f, k: (W.transpose(1, -1) * (1 + k * (f["l"] - 1))).transpose(1, -1),
    ),
    "lokr_both": Kind(pl.LoKr(rank=1, decompose_both=True, factor=3), kronecker(1)),
    "lokr_full": Kind(pl.LoKr(rank=None), kronecker(1)),
    "dora_exact": Kind(pl.DoRA(rank=3, dim=1, exact_gradient=True), dora(1, dim=1, constant=False)),
    "oft_constrained": Kind(pl.OFT(2, eps=0.3), rotated(cayley, 0.3), fits=pairs_of_inputs),
    "oft_series": Kind(
        pl.OFT(2, terms=5),
        rotated(lambda eye, Q: eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q),
        fits=pairs_of_inputs,
    ),
    "pissa": Kind(
        pl.LoRA(rank=1, alpha=2, init="pissa"),
        lambda W, f, k: W + k * 2 * moved(f).reshape(W.shape),
        rank=2,
    ),
}


@dataclass(frozen=True)
class Host:
    """A module with tensors to adapt, and inputs for it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


class Table(nn.Module):
    """A module with a bare parameter, which its forward reads twice."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.table, dims=1).tanh() + self.table.square().mean()


class Listed(nn.Module):
    """A module with parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(5, 6), torch.randn(6, 4)])
        self.heads = nn.ParameterDict({"one": torch.randn(4, 3), "two": torch.randn(2, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = (x @ weight).tanh()
        return x @ self.heads["one"] @ torch.ones(3, 2, dtype=x.dtype) + x @ self.heads["two"].T


class Transposed(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight @ input.T).T.tanh()


class Swap(nn.Module):
    """Swaps the last two dimensions, so that the next layer gets a strided input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Bags(nn.Module):
    """An EmbeddingBag with bags of three entries, none, and the rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, **options)
        self.offsets = [0, 3, 3, 8] if self.bag.include_last_offset else [0, 3, 3]

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.bag(ids, torch.tensor(self.offsets), weights)


class Packed(nn.Module):
    """An LSTM without biases, called with a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 4, bias=False)

    def forward(self, x: Tensor) -> Any:
        lengths = torch.tensor([4, 2, 3])
        return self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))


def _conv1d(out: int, into: int) -> nn.Module:
    """Return transformers' Conv1D, a Linear that stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D  # takes a third of a second

    return Conv1D(out, into)


def _x(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def _ids(*shape: int, high: int = 11) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(high, shape),)


def _pair(one: Sequence[int], two: Sequence[int]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(one), torch.randn(two))


def _three(*width: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(5, 3, w) for w in width)


def _embedding(**options: Any) -> Host:
    return Host(lambda: nn.Embedding(11, 6, **options), _ids(4, 5))


def _bag(*, weighted: bool = False, **options: Any) -> Host:
    inputs = (lambda: (torch.randint(11, (8,)), torch.randn(8))) if weighted else _ids(8)
    return Host(lambda: Bags(**options), inputs)


def _attention(inputs: Callable[[], tuple[Tensor, ...]], **options: Any) -> Host:
    return Host(lambda: nn.MultiheadAttention(8, 2, **options), inputs)


def _encoder_layer(**options: Any) -> Host:
    return Host(
        # Not ReLU: in low precision inputs near zero change sign, and gradients jump.
        lambda: nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, **options
        ),
        _x(3, 5, 8),
    )


HOSTS = {
    "linear": Host(lambda: nn.Linear(7, 5), _x(3, 7)),
    "linear_no_bias": Host(lambda: nn.Linear(7, 5, bias=False), _x(2, 3, 7)),
    "linear_one_row": Host(lambda: nn.Linear(7, 5), _x(7)),
    # So many rows that W' is built in the forward, in the backward, or in both.
    "linear_wide": Host(lambda: nn.Linear(3, 16), _x(5, 8, 3)),
    "linear_narrow": Host(lambda: nn.Linear(16, 3), _x(40, 16)),
    "linear_small": Host(lambda: nn.Linear(4, 3), _x(40, 4)),
    "linear_strided": Host(lambda: nn.Sequential(Swap(), nn.Linear(7, 5), Swap()), _x(2, 7, 3)),
    "linear_no_rows": Host(lambda: nn.Linear(7, 5), _x(0, 7)),
    "linear_own_forward": Host(lambda: Transposed(7, 5), _x(3, 7)),
    "linear_in_place": Host(
        lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), _x(3, 7)
    ),
    "transformers_conv1d": Host(lambda: _conv1d(5, 7), _x(2, 3, 7)),
    "conv1d": Host(lambda: nn.Conv1d(4, 6, 3), _x(2, 4, 9)),
    "conv1d_groups": Host(lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), _x(2, 4, 9)),
    "conv2d": Host(lambda: nn.Conv2d(3, 5, (2, 3), stride=2), _x(2, 3, 6, 7)),
    "conv2d_groups": Host(
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), _x(2, 4, 5, 5)
    ),
    "conv2d_depthwise": Host(lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2), _x(2, 4, 6, 6)),
    "conv3d": Host(lambda: nn.Conv3d(2, 3, 2), _x(2, 2, 4, 4, 4)),
    "conv3d_groups": Host(lambda: nn.Conv3d(4, 6, 2, groups=2), _x(1, 4, 3, 4, 3)),
    "conv_transpose1d": Host(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), _x(2, 4, 5)),
    "conv_transpose2d": Host(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), _x(2, 4, 4, 3)
    ),
    "conv_transpose3d": Host(lambda: nn.ConvTranspose3d(3, 2, 2), _x(2, 3, 3, 2, 3)),
    "embedding": _embedding(),
    "embedding_padding": _embedding(padding_idx=3),
    "embedding_sparse": _embedding(sparse=True),
    "embedding_sparse_padding": _embedding(sparse=True, padding_idx=-1),
    "embedding_max_norm": _embedding(max_norm=1.5, padding_idx=2),
    "embedding_by_freq": _embedding(scale_grad_by_freq=True),
    "bag_sum": _bag(mode="sum"),
    "bag_mean": _bag(padding_idx=3),
    "bag_max": _bag(mode="max"),
    "bag_weighted": _bag(weighted=True, mode="sum", padding_idx=1),
    "bag_sparse": _bag(sparse=True, mode="sum"),
    "bag_max_norm": _bag(max_norm=1.5),
    "bag_by_freq": _bag(scale_grad_by_freq=True, mode="mean"),
    "bag_last_offset": _bag(include_last_offset=True, mode="sum"),
    "bilinear": Host(lambda: nn.Bilinear(4, 3, 5), _pair((6, 4), (6, 3))),
    "lstm": Host(lambda: nn.LSTM(5, 4), _x(3, 2, 5)),
    "lstm_deep": Host(
        lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True, proj_size=3, batch_first=True),
        _x(2, 3, 5),
    ),
    "lstm_packed": Host(Packed, _x(4, 3, 5)),
    "gru": Host(lambda: nn.GRU(5, 4), _x(3, 2, 5)),
    "gru_deep": Host(lambda: nn.GRU(5, 4, num_layers=2, bidirectional=True), _x(3, 2, 5)),
    "rnn": Host(lambda: nn.RNN(5, 4, nonlinearity="relu"), _x(3, 2, 5)),
    "lstm_cell": Host(lambda: nn.LSTMCell(5, 4), _x(3, 5)),
    "gru_cell": Host(lambda: nn.GRUCell(5, 4), _pair((3, 5), (3, 4))),
    "attention": _attention(_three(8, 8, 8)),
    "attention_separate": _attention(_three(8, 6, 7), kdim=6, vdim=7),
    "attention_bias_kv": _attention(_three(8, 8, 8), add_bias_kv=True, batch_first=True),
    "encoder_layer": _encoder_layer(),
    "encoder_layer_norm_first": _encoder_layer(norm_first=True),
    "bare_2d": Host(lambda: Table(5, 4), _x(3, 5)),
    "bare_3d": Host(lambda: Table(5, 4, 2), _x(3, 5)),
    "bare_4d": Host(lambda: Table(5, 1, 3, 2), _x(3, 5)),
    "bare_listed": Host(Listed, _x(3, 5)),
    "layer_norm": Host(lambda: nn.LayerNorm((4, 3)), _x(5, 4, 3)),
    "layer_norm_1d": Host(lambda: nn.LayerNorm(4), _x(5, 4)),
    "group_norm": Host(lambda: nn.GroupNorm(2, 4), _x(3, 4, 5)),
    "batch_norm": Host(lambda: nn.BatchNorm1d(4), _x(6, 4)),
    "batch_norm_eval": Host(lambda: nn.BatchNorm2d(4).eval(), _x(2, 4, 3, 3)),
    "prelu": Host(lambda: nn.PReLU(4), _x(3, 4)),
}


def floats(found: Any) -> list[Tensor]:
    """Return the floating tensors in the outputs of a module, in order."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    return [x for item in found for x in floats(item)] if isinstance(found, tuple | list) else []


def parted(site: str) -> tuple[str, Any]:
    """Split a site into the path of its tensor and the index of its block, as a Python index."""
    path, bracket, index = site.partition("[")
    return path, eval(f"Index()[{index}", {"Index": Index}) if bracket else ...


class Index:
    """Returns the index that it is given."""

    def __getitem__(self, index: Any) -> Any:
        return index


def loss(outputs: Iterable[Tensor]) -> Tensor:
    """Return a sum of the outputs, with weights that each dtype represents exactly."""
    parts = []
    for out in outputs:
        weights = (torch.arange(out.numel(), device=out.device) % 7 - 2.5) / 2
        parts.append((out * weights.to(out.dtype).view(out.shape)).sum())
    return torch.stack(parts).sum()


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor in strided layout."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def shake(model: nn.Module, *names: str) -> None:
    """Fill the factors with random numbers; a B of zeros would hide errors in A."""
    with torch.no_grad():
        for parameter in pl.parameters(model, *names):
            parameter.copy_(torch.randn(parameter.shape) / 4)


def move(model: nn.Module, name: str) -> None:
    """Add random numbers to the factors, as training does."""
    with torch.no_grad():
        for parameter in pl.parameters(model, name):
            parameter.add_(torch.randn(parameter.shape) / 4)


@dataclass
class Result:
    """The outputs of a model, and gradients by the name of their tensor."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


@dataclass
class Case:
    """A host with adapters, and the plain copy of it that the reference runs on."""

    host: Host
    plain: nn.Module
    model: nn.Module
    inputs: tuple[Tensor, ...]
    kinds: dict[str, Kind] = field(default_factory=dict)
    strengths: dict[str, Strength] = field(default_factory=dict)

    @staticmethod
    def of(host: Host, dtype: torch.dtype = torch.float64) -> "Case":
        torch.default_generator.manual_seed(0)  # five times as fast as torch.manual_seed
        plain = host.make().to(dtype)
        with torch.no_grad():
            for parameter in plain.parameters():  # some start at 0 or 1
                parameter.add_(torch.randn(parameter.shape) / 4)
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in host.inputs())
        return Case(host, plain, copy.deepcopy(plain), inputs)

    def sites(self, kind: Kind) -> list[str]:
        """Return the sites of a kind in all tensors that it can adapt."""
        tensors = self.plain.named_parameters()
        return [site for path, p in tensors if kind.takes(p) for site in kind.sites(path, p)]

    def attach(
        self, kind: Kind, name: str = "one", strength: Strength = 1.0, **options: Any
    ) -> None:
        """Attach an adapter to all tensors that it takes, its factors random, beside the others."""
        defaults = {"targets": self.sites(kind), "activate": "no"}  # which freezes no other adapter
        pl.attach(self.model, kind.spec, name=name, **(defaults | options))
        pl.enable(self.model, name)
        move(self.model, name)
        pl.scale(self.model, strength, name)
        self.kinds[name], self.strengths[name] = kind, strength

    def trained(self, name: str) -> list[str]:
        """Return the keys of the trained factors of an adapter."""
        constants = self.kinds[name].spec.constants
        keys = pl.state_dict(self.model, name)
        return [key for key in keys if key.rpartition(".")[2] not in constants]

    def leaves(self) -> dict[str, Tensor]:
        """Return the factors and the parameters of the base, by the keys of their gradients."""
        leaves: dict[str, Tensor] = {
            f"{name} {key}": parameter
            for name in self.kinds
            for key, parameter in zip(
                self.trained(name), pl.parameters(self.model, name), strict=True
            )
        }
        for name, strength in self.strengths.items():
            if isinstance(strength, Tensor):
                leaves[f"{name} strength"] = strength
        # The parameters of the base, by their names from before attaching.
        base = dict(self.plain.named_parameters())
        for path, parameter in self.model.named_parameters():
            if path in base:
                leaves[path] = parameter
        return leaves

    def actual(self, call: Callable[..., Any] | None = None) -> Result:
        """Return the outputs of the model, and the gradients of all tensors that require one.

        `call` runs the model, such as the compiled model; by default it is the model itself.
        """
        return _run(self.model if call is None else call, self.inputs, self.leaves())

    def base(self) -> Result:
        """Return the outputs of the base, frozen as attaching freezes it."""
        return _run(copy.deepcopy(self.plain).requires_grad_(False), self.inputs, {})

    def expected(self, *active: str, dtype: torch.dtype = torch.float64) -> Result:
        """Return the outputs and gradients of the dense reference with these adapters, in order.

        In half precision W' is computed in float32, the dtype of the factors.
        """
        wide = torch.promote_types(dtype, torch.float32)
        plain = copy.deepcopy(self.plain).to(dtype)
        for module in plain.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # torch has no sparse gradient through a computed tensor
        leaves: dict[str, Tensor] = dict(plain.named_parameters())
        weights = dict(leaves)
        strengths = dict(self.strengths)
        for name, strength in strengths.items():
            if isinstance(strength, Tensor):
                leaves[f"{name} strength"] = strengths[name] = strength.detach().requires_grad_()
        for name in self.kinds:
            factors: dict[str, dict[str, Tensor]] = {}
            trained = self.trained(name)
            for key, value in pl.state_dict(self.model, name).items():
                site, _, factor = key.rpartition(".")
                value = value.to(wide, copy=True)
                if key in trained:
                    leaves[f"{name} {key}"] = value.requires_grad_()
                factors.setdefault(site, {})[factor] = value
            for site, site_factors in factors.items() if name in active else ():
                path, index = parted(site)
                W = weights[path].to(wide)
                # A copy: the gradient of the formula may need W.
                weights[path] = W.clone()
                weights[path][index] = self.kinds[name].formula(
                    W[index], site_factors, strengths[name]
                )
        weights = {path: weight.to(dtype) for path, weight in weights.items()}
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]
        return _run(lambda *x: functional_call(plain, weights, x), inputs, leaves)


def _run(call: Callable[..., Any], inputs: Iterable[Tensor], leaves: dict[str, Tensor]) -> Result:
    arguments = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    leaves = leaves | {f"input {i}": x for i, x in enumerate(arguments)}
    leaves = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    outputs = floats(call(*arguments))
    total = loss(outputs)
    if not total.requires_grad:
        return Result(outputs, {key: torch.zeros_like(leaf) for key, leaf in leaves.items()})
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return Result(
        [out.detach() for out in outputs], dict(zip(leaves, map(dense, found), strict=True))
    )
