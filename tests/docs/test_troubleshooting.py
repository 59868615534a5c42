"""docs/troubleshooting.md has every message of the library, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
TREES = {path: ast.parse(path.read_text("utf-8")) for path in (ROOT / "paramlora").rglob("*.py")}
# The messages that are constants, by name.
CONSTANTS = {
    target.id: node.value
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name) and target.id.isupper()
}


def text(node: ast.AST | None) -> str:
    """Return the text of an expression, with "…" for values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
        return re.sub(r"\{.*?\}", "…", text(node.func.value))  # type: ignore[attr-defined]
    return text(CONSTANTS[node.id]) if isinstance(node, ast.Name) and node.id in CONSTANTS else "…"


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each message that is raised, returned or warned."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            line = getattr(node, "lineno", 0)
            made = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
            if isinstance(node, ast.FunctionDef) and node.name == "refusal":
                returned = [
                    text(one.value) for one in ast.walk(node) if isinstance(one, ast.Return)
                ]
                # Other refusals are the reasons in messages of `cannot adapt`.
                found = " ".join(one for one in returned if re.search("rows|was asked", one))
            elif not isinstance(made, ast.Call) or not made.args:
                continue
            elif isinstance(node, ast.Raise):
                found = " ".join(text(part) for part in made.args)
            elif re.fullmatch(r"warnings\.warn|\w+Error", ast.unparse(made.func)):
                found = text(made.args[0])
            else:
                continue
            if re.search(r"\w{3}", found):
                yield f"{path.relative_to(ROOT)}:{line}", found


def test_every_message_is_on_the_page():
    """Each message of paramlora/ has a row that fits it, and each row fits a message."""
    rows = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    known = {row: re.compile(re.escape(row).replace("…", ".*")) for row in rows}
    found = list(messages())
    assert len(found) > 200
    missing = [one for one in found if not any(row.search(one[1]) for row in known.values())]
    assert not missing, f"messages without a row in docs/troubleshooting.md: {missing}"
    stale = [row for row, regex in known.items() if not any(regex.search(m) for _, m in found)]
    assert not stale, f"rows of docs/troubleshooting.md without a message: {stale}"
