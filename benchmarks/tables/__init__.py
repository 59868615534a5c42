"""Make the tables of the documents again from the rows in docs/data.

A table of measurements in a document has a comment with its name on the line above it:

    <!-- table: text-imdb -->
    | method | rate | ... |

The command replaces the table below each such comment. A name is either that of a function with
`@table("text-imdb")` in a file of benchmarks/tables/, or that of a file docs/data/NAME.csv, whose
cells are then the table. docs/data/means/NAME.csv is the same for a table whose raw rows were not
kept, so that only the figures shown have survived. To add a table, write the comment, add the
function or the file, and run the command. `tests/docs/test_tables.py` fails if a document differs
from the command's output.

`--keep NAME=RUN` copies the run in the folder RUN to docs/data/NAME. It compresses the rows, and
leaves out the paths of this machine.
"""

import argparse
from pathlib import Path

from .documents import paths, rewritten
from .registry import found_table, keep_run, table

__all__ = ["add_options", "run", "table"]

EXAMPLES = """\
examples:
  python -m benchmarks tables
  python -m benchmarks tables --check
  python -m benchmarks tables --show digits-seeds
  python -m benchmarks tables --keep tasks-split=runs/tasks-split --without way,commit
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing, and fail if a document differs")
    add("--show", nargs="+", default=[], metavar="NAME", help="print these tables and stop")
    add("--keep", nargs="+", default=[], metavar="NAME=RUN", help="copy runs to docs/data and stop")
    add("--without", default="", metavar="KEY,KEY", help="keys of rows that --keep leaves out")


def run(options: argparse.Namespace) -> int:
    """Write, check or print tables, or keep runs. Return 1 if a checked document differs."""
    for word in options.keep:
        name, _, folder = word.partition("=")
        print(keep_run(name, Path(folder), options.without.split(",")))
    for name in options.show:
        print(f"{name}\n\n{found_table(name).text()}\n")
    if options.keep or options.show:
        return 0
    changed = []
    for path in paths():
        old = path.read_text(encoding="utf-8")
        if (new := rewritten(old, found_table)) != old:
            changed.append(path)
            print(f"{'differs' if options.check else 'written'}  {path}")
            if not options.check:
                path.write_text(new, encoding="utf-8")
    return int(bool(options.check and changed))
