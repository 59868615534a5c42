"""The settings of the text study, and its presets."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    DEVICE,
    FINITE,
    NATURAL,
    POSITIVE,
    Check,
    Settings,
    SettingsGroup,
    option,
)

METHODS = ("full", "last-layers", "lora", "lora+head")
INITS = ("kaiming", "gaussian", "gaussian/sqrt_r", "orthogonal")


# all-MiniLM-L6-v2: 22.7 M parameters, small enough to be studied in minutes.
MINILM: dict[str, Any] = {
    "model": "sentence-transformers/all-MiniLM-L6-v2",
    "targets": "*.query,*.key,*.value,*.dense",
    "methods": "full,last-layers,lora,lora+head",
    "rank": 8,
    "alpha": 16.0,
    "scale": "alpha/r",
    "init": "kaiming",
}


_PRESETS: dict[str, dict[str, Any]] = {
    # Raschka, "Code LoRA From Scratch": its default setting, and the best that it found.
    "distilbert-imdb": {},
    "distilbert-imdb-best": {
        "alpha": 1.0,
        "targets": "*.q_lin,*.v_lin,*.ffn.lin1,*.ffn.lin2",
    },
    # LLMs-from-scratch, appendix E. Its padding to the longest text changes no result here.
    "gpt2-spam": {
        "model": "gpt2",
        "data": "spam",
        "balanced": True,
        "methods": "full,lora",
        "targets": "*.c_attn.weight[:, :768],*.c_attn.weight[:, 768:1536],"
        "*.c_attn.weight[:, 1536:],*.c_proj,*.c_fc,score",
        "rank": 16,
        "alpha": 16.0,
        "scale": "alpha/r",
        "init": "kaiming",
        "lr": 8e-4,
        "full_lr": 5e-5,
        "weight_decay": 0.1,
        "schedule": "constant",
        "batch": 8,
        "epochs": 5,
        "patience": 0,
        "max_length": 120,
    },
    "minilm-imdb": MINILM,
    "minilm-spam": {**MINILM, "data": "spam", "max_length": 128, "epochs": 5},
}


def _known_methods(text: str) -> bool:
    names = [name for name in text.split(",") if name]
    return bool(names) and set(names) <= set(METHODS) and len(set(names)) == len(names)


PART = Check("a share between 0 and 1", lambda value: 0 < value < 1)
KNOWN_METHODS = Check(f"a list of {', '.join(METHODS)}, each at most once", _known_methods)


@dataclass(frozen=True)
class DatasetSettings(SettingsGroup):
    """The data set: its files, columns and splits."""

    data: str = option(
        "imdb", "imdb, spam, or the path of a .csv or a .jsonl file (.gz, .bz2 and .xz, too)"
    )
    text_column: str = option("text", "column of a CSV or JSON-lines file with the text")
    label_column: str = option("label", "column of it with the label: any two or more values")
    balanced: bool = option(False, "leave out rows until each label has as many as the rarest")
    validation: float = option(
        0.1, "share of the training rows held out to choose settings by", PART
    )
    test: float = option(
        0.2, "share of all rows for the test, where the data have no test set", PART
    )
    rows: int = option(
        0, "maximum rows of each split, drawn by the seed of the split; 0: all", NATURAL
    )
    max_length: int = option(256, "maximum tokens of a text; longer texts are cut off", COUNT)
    data_dir: str = option(
        "data",
        "folder with the data sets; else that of PARAMLORA_IMDB or PARAMLORA_SPAM",
        affects_results=False,
    )


@dataclass(frozen=True)
class AdapterSettings(SettingsGroup):
    """The adapter: its targets, rank and scale."""

    targets: str = option(
        "*.q_lin,*.v_lin",
        "targets of lora: a list of globs over paths of modules or tensors",
        Check("a list of globs, such as *.query,*.value", bool),
    )
    rank: int = option(8, "rank r of the update, columns of B", COUNT)
    alpha: float = option(16.0, "alpha of the update, a plain number; see --scale", FINITE)
    scale: str = option(
        "alpha", "what multiplies B A", choices=("alpha", "alpha/r", "alpha/sqrt_r")
    )
    init: str = option("gaussian/sqrt_r", "how A starts; B starts at zero", choices=INITS)

    @property
    def scaling(self) -> float:
        """The factor of B A, by the convention that `scale` names."""
        divisor = {"alpha": 1.0, "alpha/r": self.rank, "alpha/sqrt_r": math.sqrt(self.rank)}
        return self.alpha / divisor[self.scale]


@dataclass(frozen=True)
class FinetuningSettings(SettingsGroup):
    """Fine-tuning."""

    lr: float = option(5e-4, "peak learning rate of lora and lora+head (AdamW)", POSITIVE)
    last_lr: float = option(1e-3, "learning rate of last-layers", POSITIVE)
    full_lr: float = option(5e-5, "learning rate of full", POSITIVE)
    weight_decay: float = option(
        0.01,
        "AdamW's weight decay, of all that is trained",
        Check("a finite number from 0", lambda value: 0 <= value < math.inf),
    )
    schedule: str = option(
        "linear",
        "linear: the rate falls to 0 at the last step, after a rise over the first 6 %",
        choices=("linear", "constant"),
    )
    batch: int = option(32, "batch size, texts; of all processes together", COUNT)
    accumulate: int = option(
        1, "parts of a batch that go through the model one after the other", COUNT
    )
    epochs: int = option(3, "length of training, passes over the training rows", COUNT)
    patience: int = option(
        1,
        "stop after this many evaluations without a better validation accuracy; 0: never",
        NATURAL,
    )
    evaluations: int = option(
        2, "evaluations on the validation rows in an epoch; the best is kept", COUNT
    )
    by_length: bool = option(True, "batches of texts of like length, in a random order")
    precision: str = option(
        "auto",
        "dtype of products; the weights stay float32. auto: bf16 on a GPU, else fp32",
        choices=("auto", "fp32", "bf16"),
    )


@dataclass(frozen=True)
class PlaceSettings(SettingsGroup):
    """The device, the processes and the folders."""

    device: str = option(
        "auto", "a torch device such as cpu or cuda:1; auto: a GPU if any, or cpu", DEVICE
    )
    parallel: str = option(
        "ddp",
        "under torchrun: ddp, each process has a whole model; fsdp, each has a part of it",
        choices=("ddp", "fsdp"),
        affects_results=False,
    )
    out: str = option(
        "",
        "folder of the run; else runs/text-PRESET and what differs from it",
        affects_results=False,
    )
    tokens: str = option(
        "runs/tokens", "folder of tokenized texts, which runs share", affects_results=False
    )


@dataclass(frozen=True)
class TextSettings(Settings):
    """All settings of the text study. The defaults are the preset "distilbert-imdb".

    Raises:
        StudyError: a value is not allowed; the message has the option, the value and the allowed
            values.

    >>> TextSettings.of_preset("gpt2-spam").adapter.scaling
    1.0
    """

    STUDY: ClassVar[str] = "text"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    preset: str = option(
        "distilbert-imdb",
        "the settings to start from",
        choices=tuple(_PRESETS),
    )
    model: str = option(
        "distilbert-base-uncased", "a transformers checkpoint: its name on the hub, or a folder"
    )
    dataset: DatasetSettings = DatasetSettings()
    methods: str = option(
        "full,last-layers,lora", f"a list of: {', '.join(METHODS)}", KNOWN_METHODS
    )
    adapter: AdapterSettings = AdapterSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    seeds: int = option(
        3, "number of seeds, counted from 0; each is one fine-tuning a method", COUNT
    )
    forgetting: bool = option(
        True, "measure what the checkpoint could do before, at several strengths of the adapter"
    )
    place: PlaceSettings = PlaceSettings()

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to run, in the order given."""
        return [name for name in self.methods.split(",") if name]
