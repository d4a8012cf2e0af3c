"""Versions, dates and folders are the same wherever the project's files name them."""

import fnmatch
import re

from helpers.reader import PROJECT, ROOT

REPOSITORY = PROJECT["urls"]["Repository"]
PARENTS = ("jaxbn", "tests", "examples", "benchmarks", "docs")


def text(name):
    return (ROOT / name).read_text()


def test_the_changelog_and_the_citation_have_this_version():
    citation = dict(re.findall(r"^([\w-]+): (.+)$", text("CITATION.cff"), re.MULTILINE))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == REPOSITORY
    assert citation["url"] == PROJECT["urls"]["Documentation"]
    titles = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert titles[:2] == ["[Unreleased]", f"[{PROJECT['version']}] - {citation['date-released']}"]


def test_the_readme_installs_this_version():
    named = re.findall(r"@v([\d.]+)\"|jaxbn-([\d.]+)-py3|version = \{([\d.]+)\}", text("README.md"))
    assert [max(names) for names in named] == [PROJECT["version"]] * 3


def test_each_version_of_the_changelog_has_its_link():
    changelog = text("CHANGELOG.md")
    names = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    tags = ["HEAD", *(f"v{name}" for name in names[1:])]
    links = [
        f"[{name}]: {REPOSITORY}/compare/{before}...{tag}"
        for name, tag, before in zip(names, tags, tags[1:], strict=False)
    ]
    links += [f"[{names[-1]}]: {REPOSITORY}/releases/tag/{tags[-1]}"]
    assert changelog.rstrip().split("\n")[-len(links) :] == links


def test_contributing_names_the_folders():
    """Each folder of a parent, but those that git ignores."""
    named = {*re.findall(r"^\| `([\w./]+)/` \|", text("CONTRIBUTING.md"), re.MULTILINE)}
    ignored = [line.rstrip("/") for line in text(".gitignore").split()]
    folders = {
        f"{parent}/{path.name}"
        for parent in PARENTS
        for path in (ROOT / parent).iterdir()
        if path.is_dir() and not any(fnmatch.fnmatch(path.name, line) for line in ignored)
    }
    assert named >= {*PARENTS, ".ci", ".github", *folders}
