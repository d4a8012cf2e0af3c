"""Trains a small network with batch norm, then classifies in inference mode.

python examples/train_cnn.py                      # handwritten digits, on all devices there are
python examples/train_cnn.py --output digits      # with checkpoints, metrics and figures
python examples/train_cnn.py --output digits --resume  # after an interruption
python examples/train_cnn.py --compare            # jaxbn, Flax, ghost batch norm and none
python examples/train_cnn.py --dataset fashion-mnist --model resnet20 --dtype bfloat16

In several processes, on one host or more, the same with an address of process 0 and each one's id:

python examples/train_cnn.py --coordinator localhost:1234 --processes 2 --process-id 0 &
python examples/train_cnn.py --coordinator localhost:1234 --processes 2 --process-id 1
"""

import interruption

if __name__ == "__main__":  # before the imports, which take seconds
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
from command_line import BATCH_SIZE, LARGEST, check_comparison, parse
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
    """Says in one line why there is no result."""
    print(f"{PREFIX}: {reason}", file=sys.stderr)
    return 1


def load_data(flags: argparse.Namespace) -> data.Dataset:
    """The data set that the flags choose."""
    if flags.dataset in data.PACKAGES:
        return data.load_idx(flags.dataset, flags.data_dir, flags.range)
    if flags.data is not None:
        return data.load(flags.data, flags.range)
    return data.load(data.DIGITS, flags.range or data.DIGITS_RANGE)


def configuration(
    flags: argparse.Namespace, dataset: data.Dataset, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint says of its run: enough to go on with it, and to classify by it."""
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
    """The network, its optimizer, whose cycles end after these epochs, and the augmentation."""
    norm = Norm(flags.norm, flags.momentum, flags.ghost_size)
    model = MODELS[flags.model](dataset.classes, norm, jnp.dtype(flags.dtype))
    images, size = len(dataset.x_train), flags.batch_size
    if size > images:
        raise TrainingError(
            f"{batch_size(size)} is more than the {images} training images; give a smaller one"
        )
    if flags.norm == "ghost" and flags.ghost_size > images:
        raise TrainingError(f"--ghost-size {norm.samples} is more than the {images} images")
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
    """The flag in words, which may not have been given."""
    return f"{'the default ' if size == BATCH_SIZE else ''}--batch-size {size}"


def check_sizes(model: Layers, dataset: data.Dataset, sizes: list[int]) -> None:
    """Refuses batches, or groups of ghost batch norm, in which a channel has one value."""
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
    """The checkpoints of the output folder; there are some only where a run is resumed.

    The folder is that of this run until the context ends.
    """
    if flags.output is None:
        return None
    first = jax.process_index() == 0
    if first:
        context.enter_context(folders.held(flags.output))
    checkpoints = Checkpoints(flags.output / folders.CHECKPOINTS, write=first)
    if checkpoints.steps and not flags.resume:
        raise CheckpointError(
            f"{checkpoints.folder}: holds a run already; go on with it by --resume, or give "
            "another --output"
        )
    return checkpoints


def check_start(flags: argparse.Namespace, begun: bool) -> None:
    """Refuses to resume what has not begun, unless the flags say which data to begin with."""
    if flags.resume and not begun and flags.data is None and flags.dataset is None:
        raise CheckpointError(
            f"{flags.output}: no checkpoint to go on from; to begin a run there give its --data or "
            "--dataset"
        )


class Prepared(NamedTuple):
    """What a run begins with, read and checked."""

    flags: argparse.Namespace
    dataset: data.Dataset
    checkpoints: Checkpoints | None
    config: dict[str, Any]
    recipe: Recipe


def prepare(
    flags: argparse.Namespace, arguments: list[str], context: contextlib.ExitStack
) -> Prepared:
    """Reads the data and the newest checkpoint, whose flags stand where none are given."""
    check_start(flags, flags.output is not None and folders.is_own(flags.output))
    checkpoints = open_checkpoints(flags, context)
    saved = checkpoints.run()["config"] if checkpoints and checkpoints.steps else None
    check_start(flags, saved is not None)
    if saved is not None:
        flags = parse(DESCRIPTION, arguments, saved)
    dataset = load_data(flags)
    config = configuration(flags, dataset, saved)
    if saved is not None and saved["digest"] != config["digest"]:
        raise CheckpointError(f"{flags.output}: was trained on other images than these; give those")
    recipe = recipe_of(flags, dataset, config["cycles"])
    return Prepared(flags, dataset, checkpoints, config, recipe)


def prepare_together(
    flags: argparse.Namespace,
    arguments: list[str],
    sharding: NamedSharding,
    context: contextlib.ExitStack,
) -> Prepared:
    """The same in each process, none of which goes on if one fails or has something else."""
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
    """Trains one network on these devices, and reports."""
    with contextlib.ExitStack() as context:
        prepared = prepare_together(flags, arguments, sharding, context)
        trainer = Trainer(**prepared._asdict(), sharding=sharding)
        introduce(trainer, sharding, console)
        trained = trainer.run(console)
        report(trainer, console)
        return trained


def introduce(trainer: Trainer, sharding: NamedSharding, console: Console) -> None:
    """Says what is trained on what, and what will be begun or gone on with."""
    flags, dataset = trainer.flags, trainer.dataset
    device = jax.devices()[0]
    console.print(
        f"{len(dataset.x_train)} training and {len(dataset.x_test)} test images of "
        f"{dataset.x_train.shape[1:]}, {dataset.classes} classes, {flags.model}, {flags.norm}, "
        f"{flags.dtype}, on {sharding.num_devices} × {device.device_kind}",
        soft_wrap=True,
    )
    console.print(f"{dataset.pixels}", soft_wrap=True)
    if damaged := trainer.lines.damaged:
        console.print(f"{trainer.lines.path}: left out {damaged} damaged lines", soft_wrap=True)
    if flags.resume:
        console.print(
            f"goes on after step {trainer.done}" if trainer.done else "nothing to resume yet"
        )
    *ended, last = trainer.config["cycles"]
    if ended:
        console.print(f"after epoch {ended[-1]} the learning rate rises anew, to fall until {last}")


def report(trainer: Trainer, console: Console) -> None:
    """Compares inference mode with batch statistics, tells of the layers, and draws figures."""
    flags, dataset, history = trainer.flags, trainer.dataset, trainer.history
    model = trainer.recipe.model
    results = trainer.results()
    inference, batch = history[-1].test_accuracy, history[-1].batch_accuracy
    console.print(f"test accuracy in inference mode, running statistics: {inference:7.2%}")
    if batch is None:
        console.print("without batch norm both modes are the same")
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
    """Says why the modes differ, where they do by more than the choice of the images explains."""
    apart = told_apart(batch, inference, len(trainer.dataset.x_test))
    if not apart or trainer.flags.norm == "flax":  # whose layers cannot be asked
        return
    feeds = trainer.train, trainer.test
    model, variables = trainer.recipe.model, trainer.state.variables
    scores = batch, inference
    found = explanation(model, variables, feeds, max(trainer.sizes), trainer.multiple, scores)
    title = "why inference mode differs from the statistics of batches"
    console.print(f"{title}: {found}", soft_wrap=True, highlight=False, markup=False)


def run_all(flags: argparse.Namespace, arguments: list[str], sharding: NamedSharding) -> None:
    """Trains the network, or one with each norm to compare them."""
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    if flags.compare is None:
        run(flags, arguments, sharding, console)
        return
    histories = {}
    if flags.output:
        owned = any(folders.is_own(flags.output / norm) for norm in NORMS)
        folders.refuse_others(flags.output, [folders.COMPARISON], owned)
    for norm in flags.compare or NORMS:
        chosen = [*arguments, "--norm", norm]
        if flags.output:
            chosen += ["--output", str(flags.output / norm)]
            flags.output.mkdir(exist_ok=True)  # each process checks its flags
        console.rule(norm)
        parsed = parse(DESCRIPTION, chosen)
        histories[norm] = run(parsed, chosen, sharding, console).history
    console.print(comparison_table(histories))
    if flags.output and first:
        figures.draw_comparison(flags.output / folders.COMPARISON, histories)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when it went well."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse(DESCRIPTION, arguments)
    check_comparison(flags, arguments)
    try:
        if flags.coordinator or flags.cluster:
            return processes.joined(flags, PREFIX, lambda: train(flags, arguments))
        return train(flags, arguments)
    except KeyboardInterrupt:  # where this is no program of its own
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
