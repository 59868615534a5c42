"""Remedies against forgetting: in the loss, on the update, in the batches, in the answer.

Letters: z the logits with the adapter on, z⁰ those with it off (the base's), C the tuned classes,
x: (n, …), y: (n,), λ the strength of `pl.scale`. Each remedy is one function; they add up in the
objective of the one training loop. Only replay, and what is said to take old images, sees examples
of other classes: the teacher z⁰ is the model itself, switched off, on the tuned images.

The strength needs no training and is `pl.scale`: W' = W + λ·ΔW. That weights between two trained
ones serve both tasks: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT),
arXiv 2109.01903.
"""
