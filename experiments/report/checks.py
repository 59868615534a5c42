"""The checks of a run: claims that a study verifies for each fine-tuning that it makes."""

from collections.abc import Iterable, Sequence

# A claim, and for each fine-tuning whether the claim is true.
Check = tuple[str, Sequence[bool]]


def check_lines(checks: Iterable[Check]) -> list[str]:
    """Return one line per check: how many fine-tunings passed, and the claim.

    >>> check_lines([("adapter off, logits unchanged", [True, True])])
    ['2/2 passed: adapter off, logits unchanged']
    >>> check_lines([("adapter off, logits unchanged", [True, False])])
    ['FAILED, 1/2 passed: adapter off, logits unchanged']
    """
    return [
        f"{'' if all(passed) else 'FAILED, '}{sum(passed)}/{len(passed)} passed: {claim}"
        for claim, passed in checks
    ]


def any_failed(checks: Iterable[Check]) -> bool:
    """Return whether any check failed for any fine-tuning."""
    return any(not all(passed) for _, passed in checks)
