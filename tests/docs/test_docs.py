"""Every snippet in the documentation runs as it stands, where the libraries that it shows are."""

import ast
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
DOCS = sorted(set((ROOT / "docs").glob("*.md")) - {TUTORIAL})
SNIPPETS = {
    f"{path.stem}, {i}": snippet
    for path in DOCS
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), 1)
}
OPTIONAL = ("equinox", "haiku", "keras", "safetensors", "torch")


def imported(snippet):
    """The top-level names of the libraries that a snippet imports."""
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, monkeypatch):
    assert "assert " in SNIPPETS[snippet]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for name in imported(SNIPPETS[snippet]):
        if name in OPTIONAL:
            pytest.importorskip(name, reason=f"{name} is not installed")
    with jax.numpy_dtype_promotion("standard"):
        exec(SNIPPETS[snippet], {})


def test_tutorial(monkeypatch, tmp_path):
    """Its snippets run one after the other, at the top of the repository; its figures are there."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text()
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            assert "assert " in snippet
            exec(snippet, names)
    assert (tmp_path / "modes.png").stat().st_size > 1000
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(figures) == 5
    for figure in figures:
        assert (TUTORIAL.parent / figure).read_bytes().startswith(b"\x89PNG")


def test_every_way_to_distribute_has_a_snippet():
    assert len([name for name in SNIPPETS if name.startswith("distributed")]) == 7


def test_other_libraries_take_few_lines():
    snippets = {name: text for name, text in SNIPPETS.items() if name.startswith("ecosystem")}
    shown = [name for text in snippets.values() for name in imported(text)]
    assert {"equinox", "haiku", "keras"} <= set(shown)
    assert all(len(text.splitlines()) <= 25 for text in snippets.values())
