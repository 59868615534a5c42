"""A tiny transformers checkpoint with its tokenizer, and texts of two learnable classes."""

import json
from pathlib import Path
from typing import Any

import torch

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "awful", "poor", "dull"]
FILLER = ["the", "film", "was", "a", "story", "of", "some", "people", "and", "long", "day", "in"]


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of text and label (0 bad, 1 good): filler words, and three telling words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str], n: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (n,), generator=generator).tolist()]

    rows = []
    for i in range(count):
        length = int(torch.randint(8, 20, (), generator=generator))
        words = [*draw(FILLER, length), *draw(GOOD if i % 2 else BAD, 3)]
        rows.append({"id": i, "rating": 1 + 8 * (i % 2), "label": i % 2, "text": " ".join(words)})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def world(folder: Path, train: int, test: int, other: int) -> Path:
    """Write a checkpoint and three files with so many texts; return the folder."""
    checkpoint(folder / "bert")
    for seed, (name, count) in enumerate({"train": train, "test": test, "other": other}.items()):
        write_jsonl(folder / f"{name}.jsonl", texts(count, seed))
    return folder


def checkpoint(folder: Path, kind: str = "bert") -> Path:
    """Write a small random model (bert, distilbert, gpt2 or mpnet) and a tokenizer.

    GPT-2 has its published width, because the targets of its preset are columns of it.

    Returns:
        the folder.
    """
    import transformers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*specials, *GOOD, *BAD, *FILLER]
    torch.manual_seed(0)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=len(vocabulary), dim=16, hidden_dim=32, n_layers=2, n_heads=2
        )
        model = transformers.DistilBertModel(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(vocabulary), n_embd=768, n_inner=16, n_layer=1, n_head=2, n_positions=64
        )
        model = transformers.GPT2Model(config)
    elif kind == "mpnet":
        config = transformers.MPNetConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = transformers.MPNetModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _tokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: dict[str, int]) -> Any:
    """Return a tokenizer of whole words, with the special tokens of BERT."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
