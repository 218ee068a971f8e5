"""What mkdocs does beside reading docs/ (hooks of mkdocs.yml).

Pages link to files of the repository, which lie in no folder of the site: those that are linked to go into it as
`repository/...`, so that each link of the site leads to a file of the same commit. Nothing of a page may come from the
network.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(?P<label>[^][]*)\]\((?P<file>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
TEXTS = {".py", ".yaml", ".sh", ".cff", ".toml", ""}  # a browser shows them when it is told so, and else saves them


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to."""
    pages = [file.src_uri for file in files.documentation_pages()]
    for uri in pages:
        for match in LINK.finditer(_source(uri).read_text(encoding="utf-8")):
            path = _linked(uri, match["file"])
            if path is None or not path.is_file() or files.get_file_from_path(linked := _uri(path)):
                continue
            files.append(File.generated(config, linked, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
            pages += [linked] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they lead inside the site; a folder without a page of its own is named and not linked."""

    def inside(match: re.Match[str]) -> str:
        path = _linked(page.file.src_uri, match["file"])
        if path is None:
            return match[0]
        if path.is_dir():
            return match["label"]
        uri = os.path.relpath(_uri(path), Path(page.file.src_uri).parent)
        return f"[{match['label']}]({uri}{match['anchor'] or ''})"

    return LINK.sub(inside, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page of which a browser would fetch a part from elsewhere."""
    if fetched := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: from the network: {fetched[0]}")
    return output


def _source(uri: str) -> Path:
    """The file that a page is made of."""
    inside = uri.removeprefix("repository/")
    return ROOT / inside if inside != uri else ROOT / "docs" / uri


def _linked(uri: str, link: str) -> Path | None:
    """The file or folder that a page links to; None for an address. A folder's page is its README."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = Path(os.path.normpath(_source(uri).parent / link))
    return path / "README.md" if (path / "README.md").is_file() else path


def _uri(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    uri = f"repository/{path.relative_to(ROOT).as_posix()}"
    return f"{uri}.txt" if path.suffix in TEXTS else uri
