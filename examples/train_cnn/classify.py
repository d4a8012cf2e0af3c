"""Classifies image files with a network that train_cnn.py trained, with batch norm folded away.

    cd examples/train_cnn
    python classify.py digits three.png seven.png
    python classify.py digits --export digits.jaxexport

The exported function runs without the network's code, on CPUs, GPUs and TPUs:

    classify = jax.export.deserialize(pathlib.Path("digits.jaxexport").read_bytes()).call
    probabilities = classify(pixels)  # float32 [N, H, W, C], from 0 to 255, to [N, classes]
"""

import interruption

if __name__ == "__main__":  # before the other imports, which take seconds
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
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA")  # at most eight bits per channel
SHOWN = 3  # classes per image
PROGRAM = "classify.py"


class ImageError(Exception):
    """An image file that cannot be classified; names it and the reason."""


class ExportError(Exception):
    """A file that cannot be written; names it and the reason."""


class Network(NamedTuple):
    """A function from pixels to probabilities, and what it was trained on.

    Attributes:
      classify: images `[N, H, W, C]` from 0 to 255 to probabilities `[N, classes]`.
      shape: `(H, W, C)`.
      names: the class names.
      pixels: the pixels of the training images.
    """

    classify: Classify
    shape: tuple[int, ...]
    names: list[str]
    pixels: Pixels


def load(folder: pathlib.Path) -> Network:
    """The network of the newest checkpoint, with its batch norms folded away.

    Raises:
      CheckpointError: there is no complete checkpoint of train_cnn.py.
    """
    nested = folder / CHECKPOINTS
    saved = Checkpoints(nested if nested.is_dir() else folder, write=False).load()
    config = saved.run["config"]
    flags, pixels = config["flags"], Pixels(**config["pixels"])
    norm = Norm(flags["norm"], flags["momentum"], flags["ghost_size"])
    network = MODELS[flags["model"]](len(config["names"]), norm, jnp.dtype(flags["dtype"]))
    model, variables = folded(network, saved.state["variables"])

    def classify(images: jax.Array) -> jax.Array:
        """Images `[N, H, W, C]` from 0 to 255 to probabilities `[N, classes]`."""
        as_trained = pixels.black + images / 255 * (pixels.white - pixels.black)
        x = (as_trained - pixels.mean) / pixels.std
        logits: Any = model.apply(variables, x, train=False)
        return jax.nn.softmax(logits)

    return Network(classify, tuple(config["shape"]), config["names"], pixels)


class Picture(NamedTuple):
    """The pixels of a file's first frame, and the number of frames."""

    pixels: NDArray[np.float32]
    frames: int


def read_image(path: pathlib.Path, shape: tuple[int, ...]) -> Picture:
    """The pixels of a file, from 0 to 255, in the size and with the channels of the network.

    The image is turned as its EXIF orientation says.

    Raises:
      ImageError: it is no image, is transparent, has more than eight bits per channel, or the
        network takes neither gray nor RGB images.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise ImageError(f"{path}: the network takes {channels} channels, which no image file has")
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ImageError(
                    f"{path}: must be gray or RGB with eight bits per channel; got {image.mode}"
                )
            frames = getattr(image, "n_frames", 1)
            pixels = ImageOps.exif_transpose(image)
            if pixels.has_transparency_data:
                pixels = pixels.convert("RGBA")
                if pixels.getchannel("A").getextrema() != (255, 255):
                    raise ImageError(f"{path}: has transparent pixels; give it a background")
            pixels = pixels.convert("L" if channels == 1 else "RGB")
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
            return Picture(np.asarray(pixels, np.float32).reshape(shape), frames)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ImageError(f"{path}: not an image that can be read: {reason(error)}") from None


def export(classify: Classify, shape: tuple[int, ...]) -> bytes:
    """The function with its weights, for any number of images and any platform."""
    batch = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
    exported = jax.export.export(jax.jit(classify), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes an exported function, completely or not at all.

    Raises:
      ExportError: the file exists and is no exported function.
    """
    if path.exists():
        try:
            jax.export.deserialize(bytearray(path.read_bytes()))
        except Exception:
            raise ExportError(
                f"{path}: exists already and is no exported function; give another --export"
            ) from None
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def answer_line(
    path: pathlib.Path, frames: int, probabilities: NDArray[np.float32], names: list[str]
) -> str:
    """The line that names the most likely classes of an image."""
    frame = f" (frame 1 of {frames})" if frames > 1 else ""
    likeliest = np.argsort(-probabilities)[:SHOWN]
    return f"{path}{frame}: " + ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in likeliest)


def fail(error: object) -> int:
    """Prints the error in one line; the exit status."""
    print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    return 1


def answer(network: Network, paths: list[pathlib.Path]) -> int:
    """Prints the classes of each image, and an error for each that fails; the exit status."""
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
            print(answer_line(path, picture.frames, row, network.names))
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add: Any = parser.add_argument
    add("checkpoint", type=pathlib.Path, help="the --output folder of train_cnn.py")
    add("images", nargs="*", type=pathlib.Path, metavar="IMAGE", help="image files to classify")
    add("--export", type=pathlib.Path, metavar="FILE", help="write the network as a function")
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
