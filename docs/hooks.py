"""What the site shows beside the pages of this folder: a hook of mkdocs.

The front page is README.md; results, CONTRIBUTING and CHANGELOG are the files of the repository; the tutorial is the
notebook as Markdown; and api.md gets each name's signature and docstring.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import notebooks  # noqa: E402

ELSEWHERE = {
    "index.md": "README.md",
    "results.md": "benchmarks/RESULTS.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "tutorial.md": "docs/tutorial.ipynb",
}
"""Page of the site -> file of the repository."""
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_NAME = re.compile(r"(### `(\w+)`\n)(.*?)(?=\n#|\Z)", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that are not in this folder."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        path = ROOT / source
        text = notebooks.as_markdown(notebooks.read(path)) if path.suffix == ".ipynb" else path.read_text()
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / "benchmarks").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages of the site, and put the reference of each name under its heading."""
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    if here == "api.md":
        markdown = _NAME.sub(r"\1\n::: optin_cli.\2\n", markdown)
    return _LINK.sub(lambda link: moved(*link.groups(), source=source, here=here, files=files), markdown)


def moved(mark: str, text: str, link: str, *, source: str, here: str, files: Any) -> str:
    """A link of the repository's file `source` as the page `here` has it; its text alone where the site lacks it."""
    if re.match(r"[a-z]+:|#", link):
        return f"{mark}[{text}]({link})"
    path, hash_, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = PAGE_OF.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(page) is None:
        if path.startswith("docs/"):
            return f"{mark}[{text}]({link})"  # broken: mkdocs says so
        return text
    return f"{mark}[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{hash_}{anchor})"
