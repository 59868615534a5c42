"""Switchable low-rank adapters for any tensor of any PyTorch model, by parametrization.

>>> import torch
>>> import paramlora as pl
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> x = torch.randn(3, 8)
>>> before = model(x)
>>> summary = pl.attach(model, pl.LoRA(rank=2), name="digits")
>>> torch.equal(model(x), before)
True
>>> optimizer = torch.optim.Adam(pl.parameters(model))
>>> model(x).sum().backward()
>>> optimizer.step()
>>> with pl.disabled(model):
...     torch.equal(model(x), before)
True
"""

from typing import TYPE_CHECKING, NoReturn

from . import kinds
from .errors import AdapterNameError, CheckpointError, ParamloraError, StateError, TargetError
from .files.base import base_state_dict, fingerprint, load_base_state_dict
from .files.checkpoint import load, save
from .files.merged import merged_state_dict
from .files.state import load_state_dict, state_dict
from .kinds import IA3, OFT, Delta, DoRA, HiRA, LoHa, LoKr, LoRA, LoRAXS, MiSS
from .kinds.arguments import our_name as _our_name
from .layers.statistics import hold_statistics
from .methods.combine import combine
from .methods.eva import eva
from .methods.extract import extract
from .methods.from_data import corda, lora_null
from .methods.lora_plus import parameter_groups
from .peft.folder import load_peft, save_peft
from .stack.overlay import keep_blocks
from .verbs.attach import attach, detach, freeze, parameters, unfreeze
from .verbs.audit import AuditReport, audit
from .verbs.audit_checks import Finding
from .verbs.merge import bake, merge, merged, unmerge
from .verbs.route import routed
from .verbs.summary import SiteSummary, Skipped, Summary, summary
from .verbs.toggle import activate, disable, disabled, enable, enabled, names, scale, using

__version__ = "0.2.0"

__all__ = [
    "IA3",
    "OFT",
    "AdapterNameError",
    "AuditReport",
    "CheckpointError",
    "Delta",
    "DoRA",
    "Finding",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MiSS",
    "ParamloraError",
    "SiteSummary",
    "Skipped",
    "StateError",
    "Summary",
    "TargetError",
    "activate",
    "attach",
    "audit",
    "bake",
    "base_state_dict",
    "combine",
    "corda",
    "detach",
    "disable",
    "disabled",
    "enable",
    "enabled",
    "eva",
    "extract",
    "fingerprint",
    "freeze",
    "hold_statistics",
    "keep_blocks",
    "kinds",
    "load",
    "load_base_state_dict",
    "load_peft",
    "load_state_dict",
    "lora_null",
    "merge",
    "merged",
    "merged_state_dict",
    "names",
    "parameter_groups",
    "parameters",
    "routed",
    "save",
    "save_peft",
    "scale",
    "state_dict",
    "summary",
    "unfreeze",
    "unmerge",
    "using",
]

if not TYPE_CHECKING:  # with it, type checkers would accept every name

    def __getattr__(name: str) -> NoReturn:
        ours = _our_name(name, __all__)
        raise AttributeError(f"module 'paramlora' has no attribute {name!r}{ours}", name=name)
