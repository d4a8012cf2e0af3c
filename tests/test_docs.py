"""Every snippet in the documentation runs as it stands."""

import pathlib
import re

import jax
import pytest

DOCS = sorted((pathlib.Path(__file__).parents[1] / "docs").glob("*.md"))
SNIPPETS = {
    f"{path.stem}, {i}": snippet
    for path in DOCS
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), 1)
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet):
    assert "assert " in SNIPPETS[snippet]
    with jax.numpy_dtype_promotion("standard"):
        exec(SNIPPETS[snippet], {})


def test_every_way_to_distribute_has_a_snippet():
    assert len([name for name in SNIPPETS if name.startswith("distributed")]) == 7
