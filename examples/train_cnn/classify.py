"""Classifies image files with a network that train_cnn.py trained, its batch norms folded away.

python examples/classify.py digits three.png seven.png
python examples/classify.py digits three.png --export digits.jaxexport

What is exported runs without the network's code, on CPUs, GPUs and TPUs:

    classify = jax.export.deserialize(pathlib.Path("digits.jaxexport").read_bytes()).call
    probabilities = classify(pixels)  # float32 [N, H, W, C], from 0 to 255, to [N, classes]
"""

import interruption

if __name__ == "__main__":  # before the imports, which take seconds
    interruption.leave_at_once()

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import CheckpointError, Checkpoints, hush, reason
from data import Pixels
from folders import CHECKPOINTS
from model import MODELS, Norm, folded
from numpy.typing import NDArray
from PIL import Image, ImageOps

Classify = Callable[[jax.Array], jax.Array]
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA")  # at most eight bits to a channel
SHOWN = 3  # classes
PROGRAM = "classify.py"


class ImageError(Exception):
    """An image file that cannot be classified: says which and why."""


class ExportError(Exception):
    """A file that cannot be written: says which and why."""


class Network(NamedTuple):
    """Pixels to probabilities, the shape of an image, the names of the classes, and the pixels."""

    classify: Classify
    shape: tuple[int, ...]
    names: list[str]
    pixels: Pixels


def load(folder: pathlib.Path) -> Network:
    """The network of the newest checkpoint, its batch norms folded away.

    Raises:
      CheckpointError: there is no whole checkpoint of train_cnn.py.
    """
    nested = folder / CHECKPOINTS
    saved = Checkpoints(nested if nested.is_dir() else folder, write=False).load()
    config = saved.run["config"]
    flags, pixels = config["flags"], Pixels(**config["pixels"])
    norm = Norm(flags["norm"], flags["momentum"], flags["ghost_size"])
    network = MODELS[flags["model"]](len(config["names"]), norm, jnp.dtype(flags["dtype"]))
    model, variables = folded(network, saved.state["variables"])

    def classify(images: jax.Array) -> jax.Array:
        """`[N, H, W, C]` from 0 to 255 to probabilities `[N, classes]`."""
        as_trained = pixels.black + images / 255 * (pixels.white - pixels.black)
        x = (as_trained - pixels.mean) / pixels.std
        logits: Any = model.apply(variables, x, train=False)
        return jax.nn.softmax(logits)

    return Network(classify, tuple(config["shape"]), config["names"], pixels)


class Picture(NamedTuple):
    """The pixels of a file's first frame, and how many there are."""

    pixels: NDArray[np.float32]
    frames: int


def read_image(path: pathlib.Path, shape: tuple[int, ...]) -> Picture:
    """The pixels of a file, from 0 to 255, in the size and with the channels of the network.

    They are turned as the file says (EXIF).

    Raises:
      ImageError: not an image, transparent, of more than eight bits, or the network has no colours.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise ImageError(f"{path}: the network takes {channels} channels, which no image file has")
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ImageError(
                    f"{path}: must be grey or RGB with eight bits to a channel; is {image.mode}"
                )
            frames = getattr(image, "n_frames", 1)
            pixels = ImageOps.exif_transpose(image)
            if pixels.has_transparency_data:
                pixels = pixels.convert("RGBA")
                if pixels.getchannel("A").getextrema() != (255, 255):
                    raise ImageError(f"{path}: is transparent in places; give it a background")
            pixels = pixels.convert("L" if channels == 1 else "RGB")
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
            return Picture(np.asarray(pixels, np.float32).reshape(shape), frames)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow has many for files that are broken
        raise ImageError(f"{path}: not an image that can be read: {reason(error)}") from None


def export(classify: Classify, shape: tuple[int, ...]) -> bytes:
    """The function, weights included, for any number of images on any platform."""
    batch = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
    exported = jax.export.export(jax.jit(classify), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes what is exported, whole or not at all, over nothing but an older one.

    Raises:
      ExportError: the file is something else.
    """
    if path.exists():
        try:
            jax.export.deserialize(bytearray(path.read_bytes()))
        except Exception:
            raise ExportError(f"{path}: is there already, and not from --export") from None
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def told(
    path: pathlib.Path, frames: int, probabilities: NDArray[np.float32], names: list[str]
) -> str:
    """A line for an image: the likeliest classes."""
    frame = f" (frame 1 of {frames})" if frames > 1 else ""
    likeliest = np.argsort(-probabilities)[:SHOWN]
    return f"{path}{frame}: " + ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in likeliest)


def fail(error: object) -> int:
    """Says in one line what went wrong."""
    print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    return 1


def answer(network: Network, paths: list[pathlib.Path]) -> int:
    """Prints the classes of each image, and says which cannot be read; the exit status."""
    status, read = 0, []
    for path in paths:
        try:
            read.append((path, read_image(path, network.shape)))
        except ImageError as error:
            status = fail(error)
    if read:
        images = jnp.asarray(np.stack([picture.pixels for _, picture in read]))
        probabilities = np.asarray(jax.jit(network.classify)(images))
        for (path, picture), row in zip(read, probabilities, strict=True):
            print(told(path, picture.frames, row, network.names))
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when it went well."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add: Any = parser.add_argument
    add("checkpoint", type=pathlib.Path, help="the --output folder of train_cnn.py")
    add("images", nargs="*", type=pathlib.Path, metavar="IMAGE", help="image files")
    add("--export", type=pathlib.Path, metavar="FILE", help="write the function, weights included")
    flags = parser.parse_args(arguments)
    if not flags.images and flags.export is None:
        parser.error("give image files, --export FILE, or both")
    try:
        network = load(flags.checkpoint)
        print(network.pixels, file=sys.stderr)
        status = answer(network, flags.images)
        if flags.export is not None:
            write(flags.export, export(network.classify, network.shape))
            height, width, channels = network.shape
            print(
                f"{flags.export}: float32 [N, {height}, {width}, {channels}] from 0 to 255 to "
                f"probabilities [N, {len(network.names)}]"
            )
    except (CheckpointError, ExportError, OSError) as error:
        return fail(error)
    return status


if __name__ == "__main__":
    hush()
    sys.exit(main())
