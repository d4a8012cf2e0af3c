"""The API reference has each public name once."""

import ast
import pathlib
import re

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
