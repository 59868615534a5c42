"""Add the project's addresses to this checkout, for the project page on a package index.

The release workflow runs it before the build, because a repository does not know its own address:

    python .ci/urls.py https://github.com/OWNER/NAME v0.2.0

Relative links and images of README.md become absolute, and setup.cfg gets `project_urls`.
"""

import re
import sys
from pathlib import Path

url, tag = sys.argv[1].rstrip("/"), sys.argv[2]


def absolute(link: re.Match[str]) -> str:
    """Return a Markdown link to a file as one to the code host; "raw" serves an image itself."""
    kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
    return f"]({url}/{kind}/{tag}/{link[1]})"


readme, config = Path("README.md"), Path("setup.cfg")
text = readme.read_text(encoding="utf-8")
readme.write_text(re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text), encoding="utf-8")
urls = {"Source": "", "Issues": "/issues", "Changelog": f"/blob/{tag}/CHANGELOG.md"}
lines = "".join(f"    {name} = {url}{path}\n" for name, path in urls.items())
text = config.read_text(encoding="utf-8")
text = text.replace("\nauthor =", f"\nproject_urls =\n{lines}author =", 1)
config.write_text(text, encoding="utf-8")
