"""Published methods that use the verbs: EVA, LoRA+, combine, extract."""
