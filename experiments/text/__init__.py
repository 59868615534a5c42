"""The text study: fine-tune a transformers checkpoint on texts by several methods."""
