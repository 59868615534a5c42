"""Remedies against forgetting: in the loss, on the update, in the batches, and at prediction.

    z   logits with the adapter on, (n, classes)      x   inputs, (n, …)
    z⁰  logits with the adapter off, (n, classes)     y   labels, (n,)
    C   the tuned classes                             λ   strength of `pl.scale`

Each remedy is one function. The terms of the loss are added in one objective for the training loop.
The teacher z⁰ is the model with its adapter off, evaluated on the tuned images. Only replay, and
remedies that are documented to use old images, use examples of other classes.

The strength needs no training: `pl.scale` sets W' = W + λ·ΔW. Weights between the base's and the
fine-tuned ones can serve both tasks (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
models", WiSE-FT, arXiv 2109.01903).
"""
