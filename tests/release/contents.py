"""Checks what the built distributions hold: `python tests/release/contents.py dist`.

The wheel is the package alone. The source distribution has what tests and examples read. The
description is the README, with URLs in place of paths.
"""

import email
import pathlib
import re
import sys
import tarfile
import zipfile

JUNK = re.compile(r"__pycache__|\.pyc$|/\.|~$|\.orig$|\.egg-info")
WHEEL = {"jaxbn/__init__.py", "jaxbn/py.typed", "jaxbn/linen/__init__.py", "jaxbn/nnx/__init__.py"}
SOURCE = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO"),
    *("jaxbn/py.typed", "tests/conftest.py", "tests/helpers/torch_reference.npz"),
    *("tests/golden/golden.npz", "examples/train_cnn/digits.npz", "docs/tutorial.md"),
    *("examples/import_torch/mobilenet_features.npz", "benchmarks/measuring.py"),
}
CODE = re.compile(r"```.*?```", re.DOTALL)


def check_wheel(names: set[str]) -> None:
    """The package, its metadata and its license, and nothing else."""
    assert names >= WHEEL, WHEEL - names
    (info,) = {name.split("/")[0] for name in names} - {"jaxbn"}
    assert info.endswith(".dist-info"), info
    assert f"{info}/licenses/LICENSE" in names
    assert all(name.endswith((".py", "py.typed")) for name in names if name.startswith("jaxbn/"))
    assert not [name for name in names if JUNK.search(name)]


def check_source(names: set[str]) -> None:
    """All that the tests of a clone need."""
    assert names >= SOURCE, SOURCE - names
    assert not [name for name in names if JUNK.search(name)], names


def check_description(metadata: str, readme: str) -> None:
    """Every target is a URL of this version, and the code is as in the README."""
    message = email.message_from_string(metadata)
    version, description = message["Version"], message.get_payload()
    assert isinstance(description, str)
    assert CODE.findall(description) == CODE.findall(readme)
    text = CODE.sub("", description)
    targets = re.findall(r"\]\(\s*([^)\s]+)", text)
    targets += re.findall(r"^\s*\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)
    targets += re.findall(r"(?:src|href)=[\"']?([^\"'\s>]+)", text)
    assert len(targets) > 10, targets
    relative = [target for target in targets if not target.startswith("https://")]
    assert not relative, relative
    ours = [t for t in targets if re.match(r"https://\S+/jaxbn/jaxbn/(blob/)?v\d", t)]
    assert ours, targets
    assert all(f"/v{version}/" in target for target in ours), ours


def main(folder: str) -> None:
    """Checks the one wheel and the one source distribution of a folder."""
    (wheel,) = pathlib.Path(folder).glob("*.whl")
    (source,) = pathlib.Path(folder).glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        check_wheel(names)
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        readme = pathlib.Path("README.md").read_text(encoding="utf-8")
        check_description(archive.read(metadata).decode(), readme)
    with tarfile.open(source) as archive:
        check_source({name.partition("/")[2] for name in archive.getnames()})
    print(f"{wheel.name}: {len(names)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
