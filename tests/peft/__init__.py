"""Tests of reading and writing PEFT's folders."""
