"""The settings of the text study, and its presets."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    FINITE,
    NATURAL,
    POSITIVE,
    Check,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
)

METHODS = ("full", "last-layers", "lora", "lora+head", "joint", "joint-lora")
INITS = ("kaiming", "gaussian", "gaussian/sqrt_r", "uniform/sqrt_r", "orthogonal")
# The kinds of adapters (`models.spec_of`), and the learning rates among which `--kinds` chooses, in
# ascending order. Kinds that were not tuned on texts before have four, over a factor of 30.
KINDS: dict[str, tuple[float, ...]] = {
    "lora": (3e-4, 1e-3, 2e-3),
    "dora": (3e-4, 1e-3, 2e-3),
    "pissa": (3e-5, 1e-4, 3e-4, 1e-3),
    "olora": (3e-5, 1e-4, 3e-4, 1e-3),
    "loha": (3e-4, 1e-3, 3e-3, 1e-2),
    "lokr": (3e-4, 1e-3, 3e-3, 1e-2),
    "hira": (3e-3, 1e-2, 3e-2, 1e-1),
    "miss": (3e-5, 1e-4, 3e-4, 1e-3),
    "oft": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-xs": (1e-4, 3e-4, 1e-3, 3e-3),
    "ia3": (1e-3, 3e-3, 1e-2, 3e-2),
}
FULL_RATES = (3e-5, 1e-4, 2e-4)  # of full fine-tuning, beside the kinds


# all-MiniLM-L6-v2 has 22.7 M parameters, so a study takes minutes.
MINILM: dict[str, Any] = {
    "model": "sentence-transformers/all-MiniLM-L6-v2",
    "targets": "*.query,*.key,*.value,*.dense",
    "methods": "full,last-layers,lora,lora+head",
    "rank": 8,
    "alpha": 16.0,
    "scale": "alpha/r",
    "init": "kaiming",
}


# all-mpnet-base-v2 has 109 M parameters, the width of the published studies.
MPNET: dict[str, Any] = {
    **MINILM,
    "model": "sentence-transformers/all-mpnet-base-v2",
    "targets": "*.attn.q,*.attn.k,*.attn.v,*.attn.o,*.dense",
    "pooling": "mean",
}

_PRESETS: dict[str, dict[str, Any]] = {
    # Raschka, "Code LoRA From Scratch": the default settings, and the best ones found there.
    "distilbert-imdb": {},
    "distilbert-imdb-best": {
        "alpha": 1.0,
        "targets": "*.q_lin,*.v_lin,*.ffn.lin1,*.ffn.lin2",
    },
    # Raschka, "LLMs-from-scratch", appendix E. The book pads all texts to the longest one; this
    # study pads per batch, which does not change the results. It stores A as (in, r), fills it by
    # Kaiming's rule, and scales by alpha itself (`tests/docs/test_sources.py`).
    "gpt2-spam": {
        "model": "gpt2",
        "data": "spam",
        "balanced": True,
        "methods": "full,lora",
        "targets": "*.c_attn.weight[:, :768],*.c_attn.weight[:, 768:1536],"
        "*.c_attn.weight[:, 1536:],*.c_proj,*.c_fc,score",
        "rank": 16,
        "alpha": 16.0,
        "init": "uniform/sqrt_r",
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
    "mpnet-imdb": MPNET,
    "minilm-spam": {**MINILM, "data": "spam", "max_length": 128, "epochs": 5},
}


def _known_methods(text: str) -> bool:
    names = [name for name in text.split(",") if name]
    return bool(names) and set(names) <= set(METHODS) and len(set(names)) == len(names)


FRACTION = Check("a share between 0 and 1", lambda value: 0 < value < 1)
KNOWN_METHODS = Check(f"a list of {', '.join(METHODS)}, each at most once", _known_methods)


@dataclass(frozen=True)
class DatasetSettings(SettingsGroup):
    """The data set: its files, columns and splits."""

    data: str = option(
        "imdb",
        "imdb, spam, or the path of a .csv or .jsonl file, which may be packed (.gz, .bz2, .xz)",
    )
    text_column: str = option("text", "column of the texts in a CSV or JSON-lines file")
    label_column: str = option("label", "column of the labels in it; at least two different values")
    balanced: bool = option(False, "drop rows until all labels have as many as the rarest one")
    validation: float = option(
        0.1, "share of the training rows for validation, which chooses the settings", FRACTION
    )
    test: float = option(
        0.2, "share of all rows for the test, if the data set has no test set", FRACTION
    )
    rows: int = option(0, "maximum rows of each split, drawn with a fixed seed; 0: all", NATURAL)
    max_length: int = option(256, "maximum tokens of a text; longer texts are truncated", COUNT)
    data_dir: str = option(
        "data",
        "folder of the data sets; the variables PARAMLORA_IMDB and PARAMLORA_SPAM come first",
        affects_results=False,
    )


@dataclass(frozen=True)
class AdapterSettings(SettingsGroup):
    """The adapter: its targets, rank and scale."""

    targets: str = option(
        "*.q_lin,*.v_lin",
        "targets of lora: comma-separated globs over paths of modules or tensors",
        Check("comma-separated globs, such as *.query,*.value", bool),
    )
    kind: str = option("lora", "kind of the update; see models.spec_of", choices=tuple(KINDS))
    rank: int = option(8, "rank r of the update B A; it sets the size of other kinds, too", COUNT)
    alpha: float = option(16.0, "alpha of the update; see --scale", FINITE)
    scale: str = option("alpha", "factor of B A", choices=("alpha", "alpha/r", "alpha/sqrt_r"))
    init: str = option("gaussian/sqrt_r", "initialisation of A; B starts at zero", choices=INITS)

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
        "AdamW's weight decay of all trained parameters",
        Check("a finite number of at least 0", lambda value: 0 <= value < math.inf),
    )
    schedule: str = option(
        "linear",
        "learning rate; linear: it rises over the first 6 % of the steps, then falls to 0",
        choices=("linear", "constant"),
    )
    batch: int = option(32, "batch size of all processes together, texts", COUNT)
    accumulate: int = option(
        1, "split each batch into this many parts, which run one after the other", COUNT
    )
    epochs: int = option(3, "passes over the training rows", COUNT)
    patience: int = option(
        1,
        "stop after this many evaluations without a better validation accuracy; 0: never",
        NATURAL,
    )
    evaluations: int = option(
        2, "evaluations on the validation rows per epoch; the best parameters are kept", COUNT
    )
    by_length: bool = option(True, "form batches of texts of similar length, in random order")
    precision: str = option(
        "auto",
        "dtype of products; the weights stay float32. auto: bf16 on a GPU, else fp32",
        choices=("auto", "fp32", "bf16"),
    )


@dataclass(frozen=True)
class TextPlaceSettings(PlaceSettings):
    """Device, processes and folders."""

    parallel: str = option(
        "ddp",
        "under torchrun; ddp: each process has the whole model, fsdp: a shard of it",
        choices=("ddp", "fsdp"),
        affects_results=False,
    )
    tokens: str = option(
        "runs/tokens", "folder of tokenized texts, shared by all runs", affects_results=False
    )


@dataclass(frozen=True)
class TextSettings(Settings):
    """All settings of the text study. The defaults are the preset "distilbert-imdb".

    Raises:
        StudyError: a value is not allowed. The message names the option, the value and the
            condition.

    >>> TextSettings.of_preset("gpt2-spam").adapter.scaling
    16.0
    """

    STUDY: ClassVar[str] = "text"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    preset: str = option(
        "distilbert-imdb",
        "the settings to start from",
        choices=tuple(_PRESETS),
    )
    model: str = option(
        "distilbert-base-uncased",
        "a transformers checkpoint: a name on the Hugging Face Hub, or a folder",
    )
    pooling: str = option(
        "checkpoint",
        "input of the head; checkpoint: what transformers' classifier of this checkpoint reads, "
        "such as the pooled first token; mean: the mean over all tokens",
        choices=("checkpoint", "mean"),
    )
    dataset: DatasetSettings = DatasetSettings()
    methods: str = option(
        "full,last-layers,lora", f"comma-separated list of {', '.join(METHODS)}", KNOWN_METHODS
    )
    adapter: AdapterSettings = AdapterSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    seeds: int = option(3, "number of seeds; each method is fine-tuned once per seed", COUNT)
    seed_from: int = option(0, "the first seed", NATURAL)
    forgetting: bool = option(
        True, "measure the checkpoint's remaining ability at several strengths of the adapter"
    )
    retention: str = option(
        "",
        "another data set, as for --data, to measure what a model keeps of it, and for the joint "
        "methods to train on as well",
    )
    spectra: bool = option(
        False,
        "record the intruder dimensions of the tuned weights and the size of their updates",
        affects_results=False,
    )
    place: TextPlaceSettings = TextPlaceSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        joint = [method for method in self.chosen_methods if method.startswith("joint")]
        self.require(
            "retention",
            self.retention or not joint,
            f"a second data set for {' and '.join(joint)}, such as spam",
        )

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to run, in the order given."""
        return [name for name in self.methods.split(",") if name]


@dataclass(frozen=True)
class FrontGrid:
    """The learning rates of the arms, in ascending order, and the ranks of LoRA."""

    ranks: tuple[int, ...] = (1, 8, 64)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
    head_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3)
    full_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 2e-4, 4e-4)
    joint_rates: tuple[float, ...] = (1e-3, 2e-3)
    joint_full_rates: tuple[float, ...] = (1e-4, 2e-4)
