"""Brings Markdown files outside of docs/ onto the site, and turns links to files into links of it.

In the repository every link leads to a file. On the site some files have another place, and files
without one are shown by the repository's host. Names of the library link to the API reference.
"""

import logging
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

API = {page.stem: page.read_text() for page in (ROOT / "docs/api").glob("*.md")}
NAMES = {name for text in API.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
NAMES -= {name.rpartition(".")[0] for name in NAMES}  # modules
ROWS = re.findall(r"^\| (`.*?) \|", API["index"], re.MULTILINE)
TYPES = {name for row in ROWS for name in re.findall(r"\w+", row)}
# Names and pages in code, but not in elements that are links, or should not be.
MENTION = re.compile(
    r"<(?P<other>a|b|h\d|pre)\b.*?</(?P=other)>"
    r"|<code>(?:docs/(?P<file>\w+\.md)(?:#(?P<anchor>[\w-]+))?|(?P<name>[\w.]+))</code>",
    re.DOTALL,
)
TYPE = re.compile(r'<autoref identifier="(?P<path>[\w.]*?)(?P<name>\w+)"[^>]*>[^<]*</autoref>')
CELL = re.compile(r"<td>(?:<code>\w+</code>(?:, )?)+</td>")
log = logging.getLogger("mkdocs.hooks")


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


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links names of the library to the reference, and types in signatures to the table of types.

    The reference leaves out the module of many names.
    """
    folder, _, module = page.file.src_uri.removesuffix(".md").rpartition("/")
    reference = folder == "api"

    def address(path: str, anchor: str) -> str | None:
        file = files.get_file_from_path(path)
        return f"{file.url_relative_to(page.file)}#{anchor}" if file else None

    def with_type(found: re.Match[str]) -> str:
        path, name = found["path"], found["name"]
        own = path.startswith("jaxbn.")
        if own and {path + name, f"jaxbn.{name}"} & NAMES:
            return found[0]
        if name in TYPES:
            return f'<a class="autorefs" href="{address("api/index.md", name)}">{name}</a>'
        if own and name[0].isupper():
            log.warning("%s: the table of types lacks %s", page.file.src_uri, name)
        return found[0]

    def with_link(found: re.Match[str]) -> str:
        if found["file"]:
            href = address(found["file"], found["anchor"] or "")
            return f'<a href="{href}">{found[0]}</a>' if href else found[0]
        names = [found["name"]]
        if reference and found["name"]:
            names += [f"jaxbn.{module}.{found['name']}"]
            if module == "functions" or found["name"][0].isupper():
                names += [f"jaxbn.{found['name']}"]
        known = next((name for name in names if name in NAMES), None)
        return f'<autoref identifier="{known}">{found[0]}</autoref>' if known else found[0]

    if reference:
        html = TYPE.sub(with_type, html)
        html = CELL.sub(lambda cell: re.sub(r"<code>(\w+)", r'<code id="\1">\1', cell[0]), html)
    return MENTION.sub(with_link, html)
