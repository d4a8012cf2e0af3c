"""Brings Markdown files outside of docs/ onto the site, and turns links to files into links of it.

In the repository every link leads to a file. On the site some files have another place, and files
without one are shown by the repository's host.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
FIGURES = "benchmarks/results/*.png"
LINK = re.compile(r"(?<=]\()[^)#:\s]+")  # the path in a relative link
CODE = re.compile(r"`[^`\n]+`")


def place_of(path: str) -> str:
    """The place on the site of a file of the repository."""
    return PAGES.get(path, path.removeprefix("docs/"))


def on_config(config: MkDocsConfig) -> None:
    """Makes the anchors of headings as GitHub does, for links that work there too."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages and figures outside of docs/."""
    figures = (figure.relative_to(ROOT).as_posix() for figure in ROOT.glob(FIGURES))
    for path in (*PAGES, *figures):
        files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page to files that exist; mkdocs reports the others.

    GitHub needs a backslash before a pipe in a table's code, and mkdocs would show it.
    """
    folder = Path(str(page.file.abs_src_path)).parent

    def rewritten(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[0]))
        if not target.exists():
            return link[0]
        path = target.relative_to(ROOT).as_posix()
        if files.get_file_from_path(place_of(path)):
            return os.path.relpath(place_of(path), Path(page.file.src_uri).parent)
        return f"{config.repo_url}/blob/main/{path}"

    markdown = CODE.sub(lambda code: code[0].replace(r"\|", "|"), markdown)
    return LINK.sub(rewritten, markdown)
