"""Classifies image files with a network that train_cnn.py trained, its batch norms folded away.

python examples/classify.py digits three.png seven.png
python examples/classify.py digits three.png --export digits.jaxexport

What is exported runs without the network's code, on CPUs, GPUs and TPUs:

    classify = jax.export.deserialize(pathlib.Path("digits.jaxexport").read_bytes()).call
    probabilities = classify(pixels)  # float32 [N, H, W, C], from 0 to 255, to [N, classes]
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import CheckpointError, Checkpoints, hush
from model import MODELS, Norm, folded
from numpy.typing import NDArray
from PIL import Image

Classify = Callable[[jax.Array], jax.Array]
MODES = {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 3, "LA": 1}  # eight bits to a channel
SHOWN = 3  # classes


class ImageError(Exception):
    """An image file that cannot be classified: says which and why."""


def load(folder: pathlib.Path) -> tuple[Classify, tuple[int, ...], list[str]]:
    """Pixels to probabilities, the shape of an image, and the names of the classes.

    Raises:
      CheckpointError: there is no whole checkpoint of train_cnn.py.
    """
    nested = folder / "checkpoints"
    saved = Checkpoints(nested if nested.is_dir() else folder, write=False).load()
    config = saved.run["config"]
    flags, pixels = config["flags"], config["pixels"]
    norm = Norm(flags["norm"], flags["momentum"], flags["ghost_size"])
    network = MODELS[flags["model"]](len(config["names"]), norm, jnp.dtype(flags["dtype"]))
    model, variables = folded(network, saved.state["variables"])

    def classify(images: jax.Array) -> jax.Array:
        """`[N, H, W, C]` from 0 to 255 to probabilities `[N, classes]`."""
        as_in_file = pixels["low"] + images / 255 * (pixels["high"] - pixels["low"])
        x = (as_in_file - pixels["mean"]) / pixels["std"]
        logits: Any = model.apply(variables, x, train=False)
        return jax.nn.softmax(logits)

    return classify, tuple(config["shape"]), config["names"]


def read_image(path: pathlib.Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The pixels of a file, from 0 to 255, in the size and with the channels of the network.

    Raises:
      ImageError: not an image, transparent, of more than eight bits, or the network has no colours.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise ImageError(f"{path}: the network takes {channels} channels, which no image file has")
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ImageError(f"{path}: must have eight bits to a channel; is {image.mode}")
            if image.getextrema()[-1] != (255, 255) and image.mode in ("RGBA", "LA"):
                raise ImageError(f"{path}: is transparent in places; give it a background")
            pixels = image.convert("L" if channels == 1 else "RGB")
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
            return np.asarray(pixels, np.float32).reshape(shape)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not an image that can be read: {error}") from None


def export(classify: Classify, shape: tuple[int, ...]) -> bytes:
    """The function, weights included, for any number of images on any platform."""
    batch = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
    exported = jax.export.export(jax.jit(classify), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def told(path: pathlib.Path, probabilities: NDArray[np.float32], names: list[str]) -> str:
    """A line for an image: the likeliest classes."""
    likeliest = np.argsort(-probabilities)[:SHOWN]
    return f"{path}: " + ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in likeliest)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when it went well."""
    parser = argparse.ArgumentParser(
        prog="classify.py", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add: Any = parser.add_argument
    add("checkpoint", type=pathlib.Path, help="the --output folder of train_cnn.py")
    add("images", nargs="*", type=pathlib.Path, metavar="IMAGE", help="image files")
    add("--export", type=pathlib.Path, metavar="FILE", help="write the function, weights included")
    flags = parser.parse_args(arguments)
    if not flags.images and flags.export is None:
        parser.error("give image files, --export FILE, or both")
    try:
        classify, shape, names = load(flags.checkpoint)
        images = [read_image(path, shape) for path in flags.images]
        if flags.export is not None:
            flags.export.write_bytes(export(classify, shape))
    except (CheckpointError, ImageError, OSError) as error:
        print(f"classify.py: error: {error}", file=sys.stderr)
        return 1
    if images:
        probabilities = np.asarray(jax.jit(classify)(jnp.asarray(np.stack(images))))
        for path, row in zip(flags.images, probabilities, strict=True):
            print(told(path, row, names))
    return 0


if __name__ == "__main__":
    hush()
    sys.exit(main())
