"""The API reference has each public name once, and what docstrings refer to is there."""

import ast
import pathlib
import re

from jaxbn._diagnosis.texts import TEXTS

ROOT = pathlib.Path(__file__).parents[2]
NAMESPACES = {
    f"jaxbn.{path.stem}": path / "__init__.py" if path.is_dir() else path
    for path in (ROOT / "jaxbn").iterdir()
    if path.stem.isidentifier() and path.stem[0] != "_" and path.name != "py.typed"
} | {"jaxbn": ROOT / "jaxbn/__init__.py"}


def public(source):
    """What a module exports, by `from … import name as name`, and what it defines."""
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name == alias.asname)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node.name


def test_each_public_name_is_on_one_page():
    names = {f"{module}.{name}" for module, path in NAMESPACES.items() for name in public(path)}
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(names) > 40
    assert sorted({*shown} - {"jaxbn"}) == sorted(names | {*NAMESPACES} - {"jaxbn"})
    assert len(shown) == len({*shown})


def test_docstrings_name_pages_and_headings_that_exist():
    sources = "".join(source.read_text() for source in (ROOT / "jaxbn").rglob("*.py"))
    named = set(re.findall(r"`(docs/\w+\.md)#([\w-]+)`", sources))
    assert len(named) >= 2
    for page, anchor in named:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings]


def test_the_guide_lists_every_kind_of_finding():
    symptoms = (ROOT / "docs/evaluation.md").read_text().partition("## Symptoms")[2]
    symptoms = symptoms.partition("\n## ")[0]
    assert [kind for kind in TEXTS if f"`{kind}`" not in symptoms] == []
