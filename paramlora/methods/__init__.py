"""Published methods on top of the verbs: EVA, LoRA+, combine, extract."""
