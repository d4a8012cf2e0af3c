"""The training loop: compiled steps, evaluation, checkpoints and records."""

import argparse
import math
import time
from typing import Any, NamedTuple

import interruption
import jax
import numpy as np
from batches import Feed, even_sizes, plan, training_sizes
from checkpoints import Checkpoints
from data import Dataset
from folders import METRICS
from jax.sharding import NamedSharding, PartitionSpec
from model import norm_layers
from records import Epoch, Lines, mean_drift, var_drift
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from steps import Recipe, Results, State, Sums, Variables, evaluated, initial_state, train_steps

EVALUATED = 512  # images per evaluation batch
STREAMED = 16  # batches per compiled call, if the images do not fit on the device


class TrainingError(Exception):
    """Training cannot continue; names the reason and what to do."""


class Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """The rate, if it is known yet."""
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "")


class Trained(NamedTuple):
    """The result of a run."""

    variables: Variables
    history: list[Epoch]


class Trainer:
    """One run: its state, its position in the data and its records."""

    def __init__(
        self,
        recipe: Recipe,
        flags: argparse.Namespace,
        dataset: Dataset,
        sharding: NamedSharding,
        checkpoints: Checkpoints | None,
        config: dict[str, Any],
    ) -> None:
        """Puts the data on the devices and starts from the newest checkpoint, if there is one."""
        self.recipe, self.flags, self.dataset = recipe, flags, dataset
        self.checkpoints, self.config = checkpoints, config
        multiple = math.lcm(sharding.num_devices, recipe.model.norm.samples)
        self.multiple, self.first = multiple, jax.process_index() == 0
        self.train = Feed(dataset.x_train, dataset.y_train, sharding, flags.stream)
        self.test = Feed(dataset.x_test, dataset.y_test, sharding, flags.stream)
        order = np.random.default_rng(flags.seed).permutation(len(dataset.x_test))
        self.test_plan = plan(order, even_sizes(len(order), EVALUATED), multiple)
        self.sizes = training_sizes(len(dataset.x_train), flags.batch_size)

        self.done = 0
        self.state = initial_state(flags.seed, dataset.x_train.shape[1:], recipe=recipe)
        self.epoch_stats = jax.device_get(self.state.variables.get("batch_stats", {}))
        self.sums = Sums(0.0, 0, 0)  # of the epoch so far
        self.history: list[Epoch] = []
        if checkpoints is not None and checkpoints.steps:
            self._restore(checkpoints, NamedSharding(sharding.mesh, PartitionSpec()))
        path = flags.output / METRICS if flags.output and self.first else None
        self.lines = Lines(path, self.done)

    def _arrays(self) -> Any:
        """The arrays of a checkpoint."""
        state = self.state._replace(key=jax.random.key_data(self.state.key))
        return jax.device_get({**state._asdict(), "epoch_stats": self.epoch_stats})

    def _restore(self, checkpoints: Checkpoints, replicated: NamedSharding) -> None:
        arrays, run = checkpoints.load(self._arrays())
        self.epoch_stats = arrays.pop("epoch_stats")
        key = jax.random.wrap_key_data(jax.numpy.asarray(arrays.pop("key")))
        self.state = jax.device_put(State(key=key, **arrays), replicated)
        self.done, self.sums = run["step"], Sums(*run["sums"])
        self.history = [Epoch(**epoch) for epoch in run["history"]]

    def _save(self) -> None:
        if self.checkpoints is not None and self.first:
            run = {
                "config": self.config,
                "step": self.done,
                "sums": self.sums,
                "history": [epoch._asdict() for epoch in self.history],
            }
            self.checkpoints.save(self.done, self._arrays(), run)

    def run(self, console: Console) -> Trained:
        """Trains to the end and prints a line per epoch.

        Raises:
          TrainingError: the loss is not finite.
          CheckpointError: a checkpoint cannot be written.
        """
        console.print("epoch  train loss  accuracy  test loss  accuracy  seconds", highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        quiet = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
            total = self.flags.epochs * len(self.sizes)
            task = progress.add_task("training", total=total, completed=self.done)
            while self.done < total:
                if self.checkpoints is not None and self.done:
                    interruption.words = "interrupted; continue with --resume"
                self._epoch(progress, task)
                console.print(f"{len(self.history):5d}{self.history[-1]}", highlight=False)
        return Trained(self.state.variables, self.history)

    def _cuts(self) -> list[int]:
        """The steps at which compiled calls end in the rest of the epoch."""
        steps = len(self.sizes)
        at_once = steps if self.train.pool is not None else STREAMED
        per_call = self.flags.steps_per_call or (1 if jax.default_backend() == "cpu" else at_once)
        starts = {*range(0, steps, per_call), *range(0, steps, self.flags.save_every or steps)}
        here = self.done % steps
        return [here, *sorted(start for start in starts if start > here), steps]

    def _epoch(self, progress: Progress, task: Any) -> None:
        """Trains the rest of the current epoch."""
        start, waited, steps = time.perf_counter(), 0.0, len(self.sizes)
        number, every = self.done // steps, self.flags.save_every
        order = np.random.default_rng([self.flags.seed, number]).permutation(sum(self.sizes))
        plans = plan(order, self.sizes, self.multiple).parts(self._cuts())
        for batches, seconds in self.train.ahead(plans):
            self.state, sums = train_steps(self.state, batches, self.train.pool, recipe=self.recipe)
            self._count(sums)
            waited += seconds
            progress.update(task, completed=self.done, description=f"epoch {number + 1}")
            if every and self.done % steps % every == 0 and self.done % steps:
                self._save()
        self._end_epoch(start, waited)
        self._save()

    def _count(self, sums: Sums) -> None:
        """Adds the sums of some steps to those of the epoch, and writes a line per step."""
        sums = Sums(*(np.asarray(value).tolist() for value in jax.device_get(sums)))
        lines = []
        for loss, hits, samples in zip(*sums, strict=True):
            self.done += 1
            lines.append({"step": self.done, "loss": loss / samples, "accuracy": hits / samples})
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {self.done} is {loss}; lower --learning-rate, which is "
                    f"{self.flags.learning_rate}, or look for extreme pixels"
                )
            self.sums = Sums(*map(sum, zip(self.sums, (loss, hits, samples), strict=True)))
        self.lines.write(*lines)

    def results(self, by_batch: bool = False) -> Results:
        """Results on the test set, in inference mode or by the statistics of its batches."""
        variables, model = self.state.variables, self.recipe.model
        return evaluated(variables, self.test, self.test_plan, model, by_batch)

    def accuracy(self, results: Results) -> float:
        """The fraction of the test set that is right."""
        return float(np.mean(results.predicted == self.dataset.y_test))

    def _end_epoch(self, start: float, waited: float) -> None:
        """Evaluates, and adds the epoch to the records."""
        stats = jax.device_get(self.state.variables.get("batch_stats", {}))
        before = dict(norm_layers(self.epoch_stats))
        drift = {
            name: [mean_drift(before[name], now), var_drift(before[name], now)]
            for name, now in norm_layers(stats)
        }
        inference = self.results()
        epoch = Epoch(
            train_loss=self.sums.loss / self.sums.samples,
            train_accuracy=self.sums.hits / self.sums.samples,
            test_loss=float(np.mean(inference.loss)),
            test_accuracy=self.accuracy(inference),
            batch_accuracy=self.accuracy(self.results(by_batch=True)) if stats else None,
            drift=drift,
            seconds=time.perf_counter() - start,
            waited=waited,
        )
        self.epoch_stats, self.sums = stats, Sums(0.0, 0, 0)
        self.history.append(epoch)
        self.lines.write({"step": self.done, "epoch": len(self.history), **epoch._asdict()})
