"""The trainer's flags. A bad flag gives an error of one line."""

import argparse
import functools
import os
import pathlib
import re
from typing import Any, NoReturn

import data
from model import MODELS, NORMS
from processes import TIMEOUT

LARGEST = 2**31 - 1
BATCH_SIZE = 64
# Flags that may change when a run is resumed. `epochs` may grow, too.
CHANGEABLE = ("save_every", "steps_per_call", "stream", "range")


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind: type, low: float, high: float | None = None, *, above: bool = False) -> Any:
    """An argparse type: a number from `low`, or above it, to `high`, by default `LARGEST`."""
    most = LARGEST if high is None else high

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= most or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}"
            large = value is not None and value > most
            bounds += f" and at most {most}" if large or high is not None else ""
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {word} {bounds}; got {text!r}")
        return value

    return convert


def folder(text: str) -> pathlib.Path:
    """An argparse type: a folder, or a new one in a folder that exists."""
    path = pathlib.Path(text)
    if not (path if path.exists() else path.absolute().parent).is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a folder, or a new one in an existing folder; got {text!r}"
        )
    return path


def address(text: str) -> str:
    """An argparse type: HOST:PORT."""
    match = re.fullmatch(r"(?:\[[^\]\s]+\]|[^:\s]+):(\d{1,5})", text)
    if not match or not 0 < int(match[1]) < 2**16:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT; got {text!r}")
    return text


def parse(
    description: str, arguments: list[str] | None, saved: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Reads the command line; `saved` is the configuration of the run to resume."""
    description = f"{description} Defaults are in parentheses."
    parser = Parser(prog="train_cnn.py", description=description)
    add_training(parser)
    add_data(parser)
    add_output(parser)
    add_processes(parser)
    if saved is not None:
        paths = {name: path and pathlib.Path(path) for name, path in saved["paths"].items()}
        parser.set_defaults(**saved["flags"], **paths)
    flags = parser.parse_args(arguments)
    if saved is not None:
        check_resumed(parser, flags, saved["flags"])
    check_data(parser, flags)
    for name, given in (("--resume", flags.resume), ("--save-every", flags.save_every)):
        if given and flags.output is None:
            parser.error(f"{name} needs --output, the folder of the checkpoints")
    read_environment(parser, flags)
    check_processes(parser, flags)
    return flags


def check_comparison(flags: argparse.Namespace, arguments: list[str]) -> None:
    """Refuses --norm beside --compare."""
    if flags.compare is not None and any(v.partition("=")[0] == "--norm" for v in arguments):
        Parser(prog="train_cnn.py").error(
            "--compare and --norm exclude each other; to compare some norms only, list them after "
            "--compare"
        )


def check_resumed(parser: Parser, flags: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Refuses flags that would have changed the steps already taken."""
    if flags.epochs < saved["epochs"]:
        parser.error(
            f"--epochs is {saved['epochs']} in the run to be resumed and cannot be less; got "
            f"{flags.epochs}"
        )
    for name, value in saved.items():
        given = getattr(flags, name)
        if given != value and name not in (*CHANGEABLE, "epochs"):
            flag = name.replace("_", "-")
            was = "is not given" if value is None else f"is {value}"
            got = f"--{'' if given else 'no-'}{flag}" if isinstance(given, bool) else given
            parser.error(
                f"--{flag} {was} in the run to be resumed; got {got}: leave it out, or give "
                "another --output"
            )


def add_training(parser: Parser) -> None:
    """The flags of the network and its training."""
    parser.add_argument(
        "--model", choices=list(MODELS), default="cnn", help="network (%(default)s)"
    )
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="jaxbn",
        help="normalization: jaxbn's, Flax's, jaxbn's ghost batch norm, or none (%(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs="*",
        choices=NORMS,
        metavar="NORM",
        help=f"train the network with each of these norms (all: {', '.join(NORMS)})",
    )
    add = functools.partial(parser.add_argument, metavar="N")
    add("--ghost-size", type=number(int, 2), default=16, help="size of a ghost batch (%(default)s)")
    add("--epochs", type=number(int, 1), default=30, help="passes over the data (%(default)s)")
    add(
        "--batch-size",
        type=number(int, 2),
        default=BATCH_SIZE,
        help="images per step (%(default)s)",
    )
    add(
        "--learning-rate",
        type=number(float, 0, 1e3, above=True),
        default=3e-3,
        help="the peak of the schedule (%(default)s)",
    )
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="random seed (%(default)s)")
    add(
        "--momentum",
        type=number(float, 0, 1),
        default=0.1,
        help="weight of a batch in the running statistics, as in torch (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the computation; parameters and statistics are float32 (%(default)s)",
    )
    add(
        "--steps-per-call",
        type=number(int, 1),
        help="steps in one compiled loop (an epoch, or 16 with --stream; 1 on CPUs)",
    )


def add_output(parser: Parser) -> None:
    """The flags of what a run writes."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=folder,
        metavar="FOLDER",
        help="where to write checkpoints, metrics and figures (nothing is written)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --output, with its flags; more --epochs add a "
        "cycle of the learning rate",
    )
    group.add_argument(
        "--save-every",
        type=number(int, 1),
        metavar="STEPS",
        help="also write a checkpoint every so many steps of an epoch (only at its end)",
    )


def add_data(parser: Parser) -> None:
    """The flags that choose the data set."""
    group = parser.add_argument_group("data", "a known data set, or your own images")
    group.add_argument(
        "--dataset",
        choices=["digits", *data.PACKAGES],
        help="the digits are included; if another set is missing, the error says what to install "
        "(digits)",
    )
    group.add_argument(
        "--data-dir",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where the IDX files of --dataset are (the folder of its package)",
    )
    group.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="FILE.npz",
        help=f"images and labels: {', '.join(data.KEYS)}; {data.CLASS_NAMES} is optional",
    )
    group.add_argument(
        "--range",
        nargs=2,
        type=number(float, -1e18, 1e18),
        metavar=("BLACK", "WHITE"),
        help="the pixel values of black and white (0 255 for integers; 0 1, -1 1 or 0 255 for "
        "floats in that range; otherwise the smallest and the largest)",
    )
    group.add_argument(
        "--shift",
        type=number(int, 0),
        metavar="PIXELS",
        help="shift images at random by up to so many pixels (a 28th of the height, at least 1)",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help=f"mirror images at random (only for {', '.join(data.MIRRORED)})",
    )
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="read batches from the host's memory (only if the images do not fit on the device)",
    )


def check_data(parser: Parser, flags: argparse.Namespace) -> None:
    """Refuses data flags that exclude each other."""
    if flags.data is not None and flags.dataset is not None:
        parser.error(
            f"--data and --dataset exclude each other; got '{flags.data}' and {flags.dataset}"
        )
    if flags.data_dir is not None and flags.dataset not in data.PACKAGES:
        parser.error(f"--data-dir is for --dataset {' or '.join(data.PACKAGES)}")
    if flags.range is not None and flags.range[0] == flags.range[1]:
        parser.error(f"--range must be two numbers that differ; got {flags.range[0]:g} twice")


def add_processes(parser: Parser) -> None:
    """The flags of several processes, some of which environment variables can replace."""
    group = parser.add_argument_group(
        "several processes",
        "--processes alone starts all of them on this host; otherwise start each one with the same "
        "flags and its own --process-id",
    )
    group.add_argument(
        "--coordinator",
        type=address,
        metavar="HOST:PORT",
        help="address of process 0 (JAX_COORDINATOR_ADDRESS)",
    )
    group.add_argument(
        "--processes",
        type=number(int, 1),
        metavar="N",
        help="number of processes (JAX_NUM_PROCESSES)",
    )
    group.add_argument(
        "--process-id",
        type=number(int, 0),
        metavar="N",
        help="number of this process; 0 prints and writes (JAX_PROCESS_ID)",
    )
    group.add_argument(
        "--cluster",
        action="store_true",
        help="take these three from SLURM, Open MPI, Kubernetes or the TPU pod",
    )
    group.add_argument(
        "--timeout",
        type=number(int, 1),
        metavar="SECONDS",
        help=f"end if another process is missing, dead or silent for so long ({TIMEOUT})",
    )


VARIABLES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", address),
    "processes": ("JAX_NUM_PROCESSES", number(int, 1)),
    "process_id": ("JAX_PROCESS_ID", number(int, 0)),
}


def read_environment(parser: Parser, flags: argparse.Namespace) -> None:
    """Fills the flags of several processes that are not given from the environment."""
    for name, (variable, kind) in VARIABLES.items():
        if getattr(flags, name) is None and variable in os.environ:
            try:
                setattr(flags, name, kind(os.environ[variable]))
            except argparse.ArgumentTypeError as error:
                parser.error(f"{variable} {error}")


def check_processes(parser: Parser, flags: argparse.Namespace) -> None:
    """Refuses incomplete or contradictory flags of several processes."""
    three = {
        "--coordinator": flags.coordinator,
        "--processes": flags.processes,
        "--process-id": flags.process_id,
    }
    missing = [name for name, value in three.items() if value is None]
    # From the environment, which a launcher sets, the number alone is a mistake.
    here = is_started_here(flags) and VARIABLES["processes"][0] not in os.environ
    if not flags.cluster and not here:
        if 0 < len(missing) < len(three):
            parser.error(f"{', '.join(three)} go together; missing: {', '.join(missing)}")
        if missing and flags.timeout is not None:
            parser.error("--timeout is for several processes; give --processes too")
    if None not in (flags.processes, flags.process_id) and flags.process_id >= flags.processes:
        parser.error(
            f"--process-id must be below --processes {flags.processes}; got {flags.process_id}"
        )


def is_started_here(flags: argparse.Namespace) -> bool:
    """Whether this process starts the others: --processes is given alone."""
    alone = flags.coordinator is None and flags.process_id is None and not flags.cluster
    return alone and flags.processes is not None
