"""Regular expressions of a foreign file, which are cut off if they take more than a second.

    target_modules: "(.*.*)*x"        tries 2ⁿ ways to divide a path of n characters

`re` cannot be interrupted, and holds the lock of the interpreter while it searches. So expressions
that may take long are matched in a process of their own, which starts in about 20 ms, without
torch. The others, which nearly all folders have, are matched here.
"""

import functools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ..errors import CheckpointError
from .disk import CONFIG

SECONDS = 1.0
# Ways to match a path that are tried here: of one expression, and of all in a folder (0.5 s).
_MOST, _MOST_TOGETHER = 1e7, 3e8
_Groups = Sequence[str | None]
_REPEAT = re.compile(r"(?<!\()[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
# A packaged program would start itself instead of Python.
_CAN_START = bool(sys.executable) and not getattr(sys, "frozen", False)

# Answers each line, the name of a function of `re`, an expression and a path, by the groups of the
# match or null. A watchdog ends it, which is the only thing that can stop a search.
_PROGRAM = f"""
import faulthandler, json, re, sys, time
left = {SECONDS}
for line in sys.stdin:
    how, expression, path = json.loads(line)
    faulthandler.dump_traceback_later(left, exit=True)
    start = time.perf_counter()
    found = getattr(re, how)(expression, path)
    left -= time.perf_counter() - start
    faulthandler.cancel_dump_traceback_later()
    if left <= 0:
        sys.exit()
    print(json.dumps(None if found is None else found.groups()), flush=True)
"""


class _Matcher:
    """A process that matches the expressions of a file; it is started for the first of them."""

    process: subprocess.Popen[str] | None = None

    def __init__(self, file: Path) -> None:
        self.file, self.ways, self.left = file, 0.0, 5 * SECONDS

    def ask(self, *question: str) -> _Groups | None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        stdin, stdout = self.process.stdin, self.process.stdout
        start = time.perf_counter()
        print(json.dumps(question), file=stdin, flush=True)
        answer = stdout.readline()  # type: ignore[union-attr]
        self.left -= time.perf_counter() - start  # asking takes longer than most matches
        if not answer or self.left < 0:  # the watchdog has ended the process
            raise CheckpointError(
                f"{self.file} has regular expressions that take more than {SECONDS:g} s to match "
                "the modules of this model; list the names of the modules instead"
            )
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


_MATCHER: ContextVar[_Matcher | None] = ContextVar("paramlora_matcher", default=None)


@contextmanager
def cut_off(folder: Path) -> Iterator[None]:
    """Raise a CheckpointError if expressions in the block take over a second, or are not valid.

    Args:
        folder: the PEFT folder that has the expressions, for the message.
    """
    matcher = _Matcher(folder / CONFIG)
    token = _MATCHER.set(matcher)
    try:
        yield
    except re.error as error:
        raise CheckpointError(
            f"{folder} has a setting that is not a valid regular expression: {error}"
        ) from error
    finally:
        _MATCHER.reset(token)
        matcher.close()


def match(expression: str, path: str, *, whole: bool = False) -> _Groups | None:
    """Return the groups of `re.match`, or of `re.fullmatch` if `whole`; None without a match.

    Raises:
        re.error: the expression is not valid.
    """
    matcher, how = _MATCHER.get(), "fullmatch" if whole else "match"
    compiled, ways = _compiled(expression)
    if matcher is not None and _CAN_START:
        matcher.ways += ways  # many expressions may take long together
        if ways > _MOST or matcher.ways > _MOST_TOGETHER:
            return matcher.ask(how, expression, path)
    found = getattr(compiled, how)(path)
    return None if found is None else found.groups()


@functools.lru_cache(1 << 14)  # `re` itself keeps 512
def _compiled(expression: str) -> tuple[re.Pattern[str], float]:
    return re.compile(expression), _ways(expression)


def _ways(expression: str) -> float:
    """Return about how many ways to match a path an expression may try.

    A repeat of one character has as many ways as the path has characters, here 100. Groups with
    alternatives have the product of their numbers, which is largest if all have equally many.
    """
    if _REPEATED_GROUP.search(expression):
        return math.inf
    repeats = len(_REPEAT.findall(expression.replace("*?", "*").replace("+?", "+")))
    groups, bars = expression.count("("), expression.count("|")
    ways = groups * math.log10(1 + bars / groups) if groups else 0.0
    return 10.0 ** min(2 * repeats + ways, 300)
