"""A model with layers that PEFT can adapt and layers that it cannot."""

import torch
from torch import nn

import paramlora as pl
from paramlora import Delta, LoRA

# The prefix of the keys in a PEFT file.
PREFIX = "base_model.model."


class Net(nn.Module):
    """Layers that PEFT can adapt and layers that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.bounded = nn.Embedding(5, 4, max_norm=1.0)
        self.mha = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3)
        self.dilated = nn.Conv1d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.rnn = nn.LSTM(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)
        self.last_fc = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.head.weight
        self.gain = nn.Parameter(torch.ones(3, 3))


def net() -> nn.Module:
    """Return a `Net` without adapters, always with the same weights."""
    torch.manual_seed(0)
    return Net()


def attached() -> nn.Module:
    """Return a `Net` with a low-rank update, a bias and a whole module."""
    model = net()
    pl.attach(model, {"fc": LoRA(2, 3), "fc.bias": Delta(), "norm.*": Delta()})
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model
