"""Adapter folders in the format of Hugging Face's PEFT: written and read."""
