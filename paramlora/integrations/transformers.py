"""A Trainer of transformers whose checkpoints contain one adapter instead of the model."""

from pathlib import Path
from typing import Any

import transformers

from ..errors import AdapterNameError, CheckpointError
from ..files.checkpoint import load, save
from .trained import FILE, only_trained


class AdapterTrainer(transformers.Trainer):
    """A Trainer that saves, resumes and reloads one adapter instead of the whole model.

    Checkpoints and `save_model` write the adapter to `adapter.safetensors`, as `paramlora.save`
    does, with the tokenizer beside it. `resume_from_checkpoint` and `load_best_model_at_end` copy
    its values into the attached adapter. As the first base class it also changes other trainers:

        class AdapterSFTTrainer(AdapterTrainer, trl.SFTTrainer):
            pass

    Args:
        *args, **kwargs: as for the Trainer. The model has the adapter attached.
        adapter: the adapter to train and save; by default the only one.

    Raises:
        AdapterNameError: in training, the model has no adapter of this name; or no name is given,
            and the model has several adapters or none.
        NotImplementedError: FSDP or DeepSpeed is on, which save the model by themselves.
        StateError: in training, parameters that do not belong to the adapter require a gradient.
            The checkpoints would lack them.
        FileNotFoundError, CheckpointError: a checkpoint to resume from has no adapter, or one with
            other sites, kinds or ranks.
    """

    def __init__(self, *args: Any, adapter: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = adapter
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError(
                "AdapterTrainer supports one process and DistributedDataParallel; with FSDP or "
                "DeepSpeed, use the library's own Trainer, whose checkpoints have the whole model"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        only_trained(self.model, self.adapter)
        return super().create_optimizer(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save(self.model, folder / FILE, self.adapter)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        name, path = only_trained(model, self.adapter), Path(resume_from_checkpoint, FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; AdapterTrainer wrote none there")
        try:
            load(model, path, name=name)
        except AdapterNameError as error:
            raise CheckpointError(
                f"{path} has other sites, kinds or ranks than adapter {name!r}: attach it with the "
                "spec and targets of that checkpoint, which `paramlora summary` prints"
            ) from error

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
