"""What every timing shares: turns, quartiles, the machine, results as CSV."""

import csv
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = pathlib.Path(__file__).parent / "results"
PAUSE = 2e-3  # seconds
PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch")


def take_turns(
    runs: Mapping[str, Callable[[], object]], repetitions: int, warm_up: int = 3
) -> dict[str, NDArray[np.float64]]:
    """Seconds of each run, which blocks until it is ready; the order is another every time.

    What ran before decides how much memory is at hand, so no run may have one predecessor. Before
    each is a pause, in which the threads of the library before come to rest.
    """
    for _ in range(warm_up):
        for run in runs.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    random = np.random.default_rng(0)
    for _ in range(repetitions):
        for name in random.permutation(list(runs)):
            time.sleep(PAUSE)
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in taken.items()}


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = np.percentile(list(values), (25, 50, 75))
    return float(lower), float(median), float(upper)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing."""
    logarithms = np.log(list(values))
    return float(np.exp(logarithms.mean())) if logarithms.size else float("nan")


def machine() -> dict[str, str]:
    """What a result depends on: processor, cores, platform, versions, and the command."""
    about = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    program = [os.path.relpath(sys.argv[0])]
    if program[0].startswith("benchmarks" + os.sep):  # a module, which runs by its name
        program = ["-m", program[0].removesuffix(".py").replace(os.sep, ".")]
    about["command"] = shlex.join(["python", *program, *sys.argv[1:]])
    return about


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_csv(path: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Writes the rows under a header, and above it a comment line for everything about the run."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | pathlib.Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The rows that `write_csv` wrote, as text, and what it said about the run."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return list(csv.DictReader(line for line in lines if not line.startswith("#"))), about
