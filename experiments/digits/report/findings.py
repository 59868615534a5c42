"""The findings of a digit run in words, computed from its rows."""

from ...harness.rundir import Row, RunDirectory
from ...report.table import Sample, percent
from .tables import base_of, rows_of


def findings(run: RunDirectory, failed: bool) -> list[str]:
    """Return three sentences: the effect on the tuned digits, on the others, and with adapter off.

    Args:
        run: a run with a base and fine-tuned rows.
        failed: whether a check of the run failed.
    """
    tuned = ", ".join(map(str, base_of(run)["tuned"]))
    off = "With the adapter off, weights and answers are bit-for-bit the base's: nothing is lost."
    return [
        _effect(run, "tuned", ("learns", "unlearns"), f"the tuned digits ({tuned})") + ".",
        _effect(run, "other", ("gains", "forgets"), "the other digits") + _where(run) + ".",
        "A check failed, so these figures are not reliable. See the checks." if failed else off,
    ]


def _effect(run: RunDirectory, group: str, verbs: tuple[str, str], digits: str) -> str:
    """Return how the adapters change the accuracy on a group of digits.

    The change has a direction if its mean exceeds its standard deviation over the seeds.
    """
    key = f"{group}_accuracy"
    before, after = base_of(run)[key], tuple(row[key] for row in rows_of(run, "lora"))
    gains = Sample(tuple(100 * (value - before) for value in after))
    clear = abs(gains.mean) > (gains.sd or 0.0)
    verb = verbs[gains.mean < 0] if clear else "changes little"
    seeds = f"{len(after)} adapter seed{'s' if len(after) > 1 else ''}"
    return (
        f"The adapter {verb}: {percent((before,))} → {percent(after)} % of {digits} are right "
        f"({gains.mean:+.1f} points, {seeds})"
    )


def _where(run: RunDirectory) -> str:
    """Name the untuned digit that loses most and its most frequent wrong answer."""
    base, rows = base_of(run), rows_of(run, "lora")
    others = [digit for digit in range(10) if digit not in base["tuned"]]
    lost = {digit: _mean_wrong(rows, digit) - base["wrong_counts"][digit] for digit in others}
    worst = max(lost, key=lambda digit: lost[digit])
    if lost[worst] <= 0:
        return ""
    answers = [
        sum(row["confusion"][worst][answer] for row in rows) if answer != worst else -1
        for answer in range(10)
    ]
    return f"; most is lost on {worst}, which is taken for {answers.index(max(answers))}"


def _mean_wrong(rows: list[Row], digit: int) -> float:
    return Sample(tuple(row["wrong_counts"][digit] for row in rows)).mean
