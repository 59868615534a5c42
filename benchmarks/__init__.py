"""Benchmarks of speed and memory beside PEFT and other libraries; run from a checkout.

One file per subcommand; `harness/` has their common code.
"""
