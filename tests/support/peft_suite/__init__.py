"""PEFT's tests of custom models on paramlora: `python -m tests.support.peft_suite PATH`."""
