"""The environment that the README tells a reader to make: nothing else can be imported."""

import importlib.abc
import importlib.metadata
import pathlib
import re
import sys
import tomllib

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
# The snippets of each are one program. Tests run it in test_docs, test_state_dict and test_data.
PROGRAMS = [ROOT / "docs" / name for name in ("tutorial.md", "torch.md", "trainer.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(*extras):
    """The names of the distributions that `pip install -e '.[EXTRAS]'` installs."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][name] for name in extras)]
    found, left = set(), [Requirement(line) for lines in lists for line in lines]
    while left:
        requirement = left.pop()
        name = normalized(requirement.name)
        if name not in found:
            found.add(name)
            further = map(Requirement, importlib.metadata.requires(name) or ())
            left += [
                each
                for each in further
                if each.marker is None
                or any(each.marker.evaluate({"extra": e}) for e in (*requirement.extras, ""))
            ]
    return found


def importable(*extras):
    """The top-level modules that these distributions bring."""
    names = installed(*extras)
    brought = importlib.metadata.packages_distributions().items()
    return {module for module, owners in brought if names & {*map(normalized, owners)}}


class Refusal(importlib.abc.MetaPathFinder):
    """Finds nothing of the distributions that were not installed."""

    def __init__(self, *extras):
        self.absent = {*importlib.metadata.packages_distributions()} - importable(*extras)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent - {"jaxbn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def restrict(*extras):
    """Lets this process import what a reader has who installed these extras."""
    sys.meta_path.insert(0, Refusal(*extras))
