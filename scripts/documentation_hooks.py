"""What scripts/docs does beyond mkdocs: a page may link to any file of the repository, such as
``../spattn_tvm/bands.py``.

Such a link works where the pages are read in the repository. In the site it leads to a copy of the file, so
that no address of the repository has to be known; a link to a file that does not exist is a warning.
Roles of reStructuredText in docstrings (``:func:`~module.name```) become the name alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
ROLE = re.compile(r":(?:func|class|attr|meth|mod):<code>(?:~(?:\w+\.)*)?([\w.]+)</code>")
FOLDER = "repository"


def on_files(files: Any, config: Any) -> Any:
    linked = set()
    for page in files.documentation_pages():
        linked |= set(LINK.findall(page.content_string))
    for name in sorted(linked):
        path = ROOT / name
        if path.is_file():
            # As text, which a browser shows: it would offer to store a .py file.
            copy = f"{FOLDER}/{name}" if path.suffix in (".png", ".json") else f"{FOLDER}/{name}.txt"
            files.append(File.generated(config, copy, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        text = "" if Path(name).suffix in (".png", ".json") else ".txt"
        return f"]({FOLDER}/{name}{text}"

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return ROLE.sub(r"<code>\1</code>", html)
