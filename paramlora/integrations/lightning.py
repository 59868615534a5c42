"""A callback of Lightning for checkpoints that contain one adapter instead of the module."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import nn

from ..files.state import load_state_dict, state_dict
from .trained import only_trained


class AdapterCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose checkpoints contain one adapter instead of the whole module.

    While a trainer with this callback runs, the module's state dict is that of the adapter, as
    `paramlora.state_dict` returns it. So all checkpoints of the trainer contain the adapter alone,
    and `ckpt_path=` of `fit`, `validate`, `test` and `predict` copies its values into the adapter
    that the module has attached. Outside of a trainer, load one with
    `paramlora.load_state_dict(module, torch.load(path, weights_only=True)["state_dict"])`.

    Args:
        *args, **kwargs: as for ModelCheckpoint.
        adapter: the adapter to save; by default the only one.

    Raises:
        AdapterNameError: in training, the module has no adapter of this name; or no name is given,
            and the module has several adapters or none.
        CheckpointError: when it loads a checkpoint whose state dict is not that of the adapter.
        ValueError: the trainer has an AdapterCheckpoint of another adapter.
        NotImplementedError: the strategy saves the module by itself, as for FSDP and DeepSpeed.
        StateError: in training, parameters that do not belong to the adapter require a gradient.
            The checkpoints would lack them.
    """

    def __init__(self, *args: Any, adapter: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = adapter
        self._hooks: list[Any] = []

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        strategy = type(trainer.strategy)
        if strategy.load_model_state_dict is not Strategy.load_model_state_dict:
            raise NotImplementedError(
                f"AdapterCheckpoint does not support {strategy.__name__}, which saves the module "
                "by itself; use ModelCheckpoint, whose checkpoints have the whole module"
            )
        super().setup(trainer, pl_module, stage)
        self._remove_hooks()  # if the last run ended before its teardown
        first = next(one for one in trainer.callbacks if isinstance(one, AdapterCheckpoint))
        if first.adapter != self.adapter:
            raise ValueError(
                "the checkpoints of a trainer contain one adapter: the AdapterCheckpoints of this "
                f"one name {first.adapter!r} and {self.adapter!r}"
            )
        if first is not self:
            return

        # Functions, because torch sets an attribute of a hook, which a method cannot have.
        def reduce(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            if not prefix and self._hooks:
                state.clear()
                state.update(state_dict(module, self.adapter))

        def complete(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            # Load the adapter, and pass on what the module has, since a strict load needs all keys.
            if not prefix:
                load_state_dict(module, state, self.adapter)
                hooks, self._hooks = self._hooks, []
                state.clear()
                state.update(module.state_dict())
                self._hooks = hooks

        self._hooks = [
            pl_module.register_state_dict_post_hook(reduce),
            pl_module.register_load_state_dict_pre_hook(complete),
        ]

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        only_trained(pl_module, self.adapter)
        super().on_train_start(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self._remove_hooks()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
