"""The source of the documentation is pleasant to read and to compare."""

import re

import pytest
from helpers.reader import PAGES, ROOT

LONGEST = 120


def prose(page):
    """The lines that are neither code, nor a table, nor one link or address that cannot break."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in text.split("\n"):
        if not line.startswith("|") and " " in line.strip(" -"):
            yield line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page):
    assert [line for line in prose(page) if len(line) > LONGEST] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_tables_have_as_many_cells_as_their_headers(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"^\|.*\n(?:\|.*\n)*", text, re.MULTILINE):
        rows = re.sub(r"`[^`\n]*`|\\\|", "", table).splitlines()
        assert {row.count("|") for row in rows} == {rows[0].count("|")}, table
