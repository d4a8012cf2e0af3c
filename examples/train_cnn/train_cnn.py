"""Trains a small network with batch norm, then classifies in inference mode.

    cd examples/train_cnn
    python train_cnn.py                            # handwritten digits, on all devices
    python train_cnn.py --output digits            # writes checkpoints, metrics and figures
    python train_cnn.py --output digits --resume   # continues after an interruption
    python train_cnn.py --data photos.npz          # your own images
    python train_cnn.py --compare                  # jaxbn, Flax, ghost batch norm and none
    python train_cnn.py --dataset fashion-mnist --model resnet20 --dtype bfloat16
    python train_cnn.py --processes 2              # two processes on this host

`docs/trainer.md` describes the flags, the data and the output.
"""

import interruption

if __name__ == "__main__":  # before the other imports, which take seconds
    interruption.leave_at_once()

import argparse
import contextlib
import sys
from typing import Any, NamedTuple

import data
import figures
import folders
import jax
import jax.numpy as jnp
import processes
from batches import training_sizes
from checkpoints import CheckpointError, Checkpoints, hush
from command_line import BATCH_SIZE, LARGEST, check_comparison, is_started_here, parse
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import LOOKED_AT, comparison_table, explanation, inspected, layer_table, told_apart
from model import MODELS, NORMS, Layers, Norm
from rich.console import Console
from steps import Recipe, optimizer
from trainer import Trained, Trainer, TrainingError

DESCRIPTION = __doc__.partition("\n")[0]
PREFIX = "train_cnn.py: error"
EXPECTED = (data.DataError, CheckpointError, TrainingError, OSError)


def fail(reason: object) -> int:
    """Prints the reason in one line; the exit status."""
    print(f"{PREFIX}: {reason}", file=sys.stderr)
    return 1


def load_data(flags: argparse.Namespace) -> data.Dataset:
    """The data set that the flags select."""
    if flags.dataset in data.PACKAGES:
        return data.load_idx(flags.dataset, flags.data_dir, flags.range)
    if flags.data is not None:
        return data.load(flags.data, flags.range)
    return data.load(data.DIGITS, flags.range or data.DIGITS_RANGE)


def configuration(
    flags: argparse.Namespace, dataset: data.Dataset, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint stores about its run, to resume it and to classify with it."""
    paths = {"data": flags.data, "data_dir": flags.data_dir}
    return {
        "flags": processes.shared(flags),
        "cycles": sorted({*(saved["cycles"] if saved else ()), flags.epochs}),
        "paths": {name: path and str(path.absolute()) for name, path in paths.items()},
        "digest": dataset.digest(),
        "shape": list(dataset.x_train.shape[1:]),
        "pixels": dataset.pixels._asdict(),
        "names": list(dataset.names),
    }


def recipe_of(flags: argparse.Namespace, dataset: data.Dataset, cycles: list[int]) -> Recipe:
    """The network, the augmentation, and an optimizer whose cycles end after these epochs."""
    norm = Norm(flags.norm, flags.momentum, flags.ghost_size)
    model = MODELS[flags.model](dataset.classes, norm, jnp.dtype(flags.dtype))
    images, size = len(dataset.x_train), flags.batch_size
    if size > images:
        raise TrainingError(
            f"{batch_size(size)} is more than the {images} training images; give a smaller one"
        )
    if flags.norm == "ghost" and flags.ghost_size > images:
        raise TrainingError(
            f"--ghost-size {norm.samples} is more than the {images} training images; give a "
            "smaller one"
        )
    sizes = training_sizes(images, size)
    if flags.epochs * len(sizes) > LARGEST:
        raise TrainingError(
            f"--epochs {flags.epochs} of {len(sizes)} steps are more than {LARGEST} steps"
        )
    check_sizes(model, dataset, sizes)
    flip = flags.dataset in data.MIRRORED if flags.flip is None else flags.flip
    height = dataset.x_train.shape[1]
    shift = max(1, height // 28) if flags.shift is None else flags.shift
    if shift >= height:
        raise TrainingError(f"--shift {shift} must be less than the {height} pixels of an image")
    ends = [epochs * len(sizes) for epochs in cycles]
    return Recipe(model, optimizer(flags.learning_rate, *ends), shift, flip)


def batch_size(size: int) -> str:
    """The flag as an error names it."""
    return f"{'the default ' if size == BATCH_SIZE else ''}--batch-size {size}"


def check_sizes(model: Layers, dataset: data.Dataset, sizes: list[int]) -> None:
    """Refuses batches, or ghost batches, that leave one value per channel."""
    norm = model.norm
    groups = {each % norm.samples if norm.kind == "ghost" else each for each in sizes}
    if norm.kind == "none" or 1 not in groups:
        return

    def train_alone(image: jax.Array) -> Any:
        alone = model.clone(norm=Norm("jaxbn"))
        variables = alone.init(jax.random.key(0), image, train=False)
        return alone.apply(variables, image, train=True, mutable=["batch_stats"])

    try:
        jax.eval_shape(train_alone, dataset.x_train[:1])
    except ValueError as error:
        raise TrainingError(f"{batch_size(sizes[0])} leaves one image over: {error}") from None


def open_checkpoints(
    flags: argparse.Namespace, context: contextlib.ExitStack
) -> Checkpoints | None:
    """The checkpoints in the output folder, if the run may start there.

    Other runs cannot use the folder until the context ends.
    """
    if flags.output is None:
        return None
    first = jax.process_index() == 0
    if first:
        context.enter_context(folders.held(flags.output))
    check_start(flags)
    return Checkpoints(flags.output / folders.CHECKPOINTS, write=first)


def check_start(flags: argparse.Namespace) -> None:
    """Refuses to begin a run where there is one, and to resume one that has not begun.

    --resume begins a run only if the flags name its data.
    """
    if flags.output is None:
        return
    if folders.has_checkpoints(flags.output):
        if not flags.resume:
            raise CheckpointError(
                f"{flags.output}: holds a run already; continue it with --resume, or give another "
                "--output"
            )
    elif any(folders.is_own(flags.output / norm) for norm in NORMS):
        raise CheckpointError(
            f"{flags.output}: holds the runs of --compare; add --compare, or give the folder of "
            "one of them or another --output"
        )
    elif flags.resume and flags.data is None and flags.dataset is None:
        raise CheckpointError(
            f"{flags.output}: holds no checkpoint to continue from; to begin a run there, give its "
            "--data or --dataset"
        )


class Prepared(NamedTuple):
    """What a run starts from, read and checked."""

    flags: argparse.Namespace
    dataset: data.Dataset
    checkpoints: Checkpoints | None
    config: dict[str, Any]
    recipe: Recipe


def prepare(
    flags: argparse.Namespace, arguments: list[str], context: contextlib.ExitStack
) -> Prepared:
    """Reads the data and the newest checkpoint, whose flags are the defaults of a resumed run."""
    checkpoints = open_checkpoints(flags, context)
    saved = checkpoints.run()["config"] if checkpoints and checkpoints.steps else None
    if saved is not None:
        output = flags.output
        flags = parse(DESCRIPTION, arguments, saved)
        flags.output = output
    dataset = load_data(flags)
    config = configuration(flags, dataset, saved)
    if saved is not None and saved["digest"] != config["digest"]:
        raise CheckpointError(
            f"{flags.output}: was trained on other images or labels than these; give those"
        )
    recipe = recipe_of(flags, dataset, config["cycles"])
    return Prepared(flags, dataset, checkpoints, config, recipe)


def prepare_together(
    flags: argparse.Namespace,
    arguments: list[str],
    sharding: NamedSharding,
    context: contextlib.ExitStack,
) -> Prepared:
    """Calls `prepare` in each process; all fail if one fails or the results differ."""
    try:
        prepared = prepare(flags, arguments, context)
    except (*EXPECTED, SystemExit) as error:
        if jax.process_count() > 1:
            processes.agree(error, sharding)
        raise
    checkpoints = prepared.checkpoints
    start = checkpoints.steps[-1:] if checkpoints else []
    config = prepared.config
    if not processes.agree((config["flags"], config["digest"], start), sharding):
        raise TrainingError(
            "the processes have different flags, data or checkpoints, or another one failed, as it "
            "says; start them all with the same"
        )
    return prepared


def run(
    flags: argparse.Namespace, arguments: list[str], sharding: NamedSharding, console: Console
) -> Trained:
    """Trains one network on these devices and reports the result."""
    with contextlib.ExitStack() as context:
        prepared = prepare_together(flags, arguments, sharding, context)
        trainer = Trainer(**prepared._asdict(), sharding=sharding)
        introduce(trainer, sharding, console)
        trained = trainer.run(console)
        report(trainer, console)
        return trained


def introduce(trainer: Trainer, sharding: NamedSharding, console: Console) -> None:
    """Prints what is trained on which data and devices, and where it continues."""
    flags, dataset = trainer.flags, trainer.dataset
    device = jax.devices()[0]
    console.print(
        f"{len(dataset.x_train)} training and {len(dataset.x_test)} test images of "
        f"{dataset.x_train.shape[1:]}, {dataset.classes} classes, {flags.model}, {flags.norm}, "
        f"{flags.dtype}, on {sharding.num_devices} × {device.device_kind}",
        soft_wrap=True,
    )
    console.print(f"classes: {data.listed(dataset.names)}", soft_wrap=True, markup=False)
    console.print(f"{dataset.pixels}", soft_wrap=True)
    if damaged := trainer.lines.damaged:
        console.print(f"{trainer.lines.path}: removed {damaged} damaged lines", soft_wrap=True)
    if flags.resume:
        console.print(
            f"continues after step {trainer.done}" if trainer.done else "nothing to resume yet"
        )
    *ended, last = trainer.config["cycles"]
    if ended:
        console.print(f"after epoch {ended[-1]} a new cycle of the learning rate begins, to {last}")


def report(trainer: Trainer, console: Console) -> None:
    """Compares inference mode with batch statistics, prints the layers and draws the figures."""
    flags, dataset, history = trainer.flags, trainer.dataset, trainer.history
    model = trainer.recipe.model
    results = trainer.results()
    inference, batch = history[-1].test_accuracy, history[-1].batch_accuracy
    console.print(f"test accuracy in inference mode, running statistics: {inference:7.2%}")
    if batch is None:
        console.print("without batch norm, both modes are the same")
    else:
        images = len(dataset.x_test)
        console.print(f"test accuracy by the statistics of test batches:     {batch:7.2%}")
        console.print(f"difference: {abs(inference - batch) * 100:.2f} points over {images} images")
        variables = trainer.state.variables
        seen = inspected(model, variables, trainer.train, trainer.multiple)
        console.print(layer_table(seen, min(LOOKED_AT, len(dataset.x_train))))
        explain(trainer, batch, inference, console)
    seconds = sum(epoch.seconds for epoch in history)
    waited = sum(epoch.waited for epoch in history) / seconds
    console.print(f"{seconds:.1f} seconds of training, {waited:.1%} of them waiting for data")
    if flags.output and trainer.first:
        title = f"{flags.model}, {flags.norm}, {flags.dtype}"
        figures.draw_run(flags.output, title, history, results, dataset)
        kept = f"checkpoints, metrics.jsonl and figures are in {flags.output}"
        console.print(kept, soft_wrap=True)


def explain(trainer: Trainer, batch: float, inference: float, console: Console) -> None:
    """Prints why the modes differ, if the difference is more than chance."""
    apart = told_apart(batch, inference, len(trainer.dataset.x_test))
    if not apart or trainer.flags.norm == "flax":  # explain_gap takes jaxbn's layers
        return
    feeds = trainer.train, trainer.test
    model, variables = trainer.recipe.model, trainer.state.variables
    scores = batch, inference
    found = explanation(model, variables, feeds, max(trainer.sizes), trainer.multiple, scores)
    title = "why inference mode differs from the statistics of batches"
    console.print(f"{title}: {found}", soft_wrap=True, highlight=False, markup=False)


def variant(
    flags: argparse.Namespace, arguments: list[str], norm: str
) -> tuple[argparse.Namespace, list[str]]:
    """The flags and the command line of one of the runs of --compare."""
    chosen = [*arguments, "--norm", norm]
    parsed = parse(DESCRIPTION, chosen)
    parsed.output = flags.output and flags.output / norm
    return parsed, chosen


def run_all(flags: argparse.Namespace, arguments: list[str], sharding: NamedSharding) -> None:
    """Trains the network once, or with each norm to compare them."""
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    if flags.compare is None:
        run(flags, arguments, sharding, console)
        return
    variants = {norm: variant(flags, arguments, norm) for norm in flags.compare or NORMS}
    if flags.output:
        owned = any(folders.is_own(flags.output / norm) for norm in NORMS)
        folders.refuse_others(flags.output, [folders.COMPARISON], owned)
    for parsed, _ in variants.values():  # before the first of them trains
        check_start(parsed)
    histories = {}
    for norm, chosen in variants.items():
        console.rule(norm)
        histories[norm] = run(*chosen, sharding, console).history
    console.print(comparison_table(histories))
    if flags.output and first:
        figures.draw_comparison(flags.output / folders.COMPARISON, histories)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse(DESCRIPTION, arguments)
    check_comparison(flags, arguments)
    try:
        started_here = is_started_here(flags)
        if not (started_here or flags.coordinator or flags.cluster):
            return train(flags, arguments)
        command = [sys.executable, __file__, *arguments]
        others = processes.start_others(flags, command) if started_here else []
        status = processes.joined(flags, PREFIX, lambda: train(flags, arguments))
        return max([status, *(other.wait() != 0 for other in others)])
    except KeyboardInterrupt:  # if another program calls this
        fail(interruption.words)
        return interruption.STATUS


def train(flags: argparse.Namespace, arguments: list[str]) -> int:
    """Trains on all devices; the exit status."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    try:
        with jax.set_mesh(mesh):
            run_all(flags, arguments, NamedSharding(mesh, PartitionSpec("batch")))
    except EXPECTED as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    hush()
    sys.exit(main())
