"""Reads files in IDX format, gzipped or not: the format of MNIST and its relatives.

All numbers are big-endian: two zero bytes, a type (8: unsigned bytes), the number of dimensions,
their sizes as 32-bit integers, then the values. LeCun, Cortes and Burges, "The MNIST database of
handwritten digits", http://yann.lecun.com/exdb/mnist.
"""

import gzip
import math
import pathlib
import zlib

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTES = 8


class FormatError(Exception):
    """A file that is broken or in another format; names what is wrong."""


def read(path: pathlib.Path) -> NDArray[np.uint8]:
    """The array in a file of unsigned bytes; a file that ends in .gz is decompressed.

    Raises:
      OSError: the file cannot be read.
      FormatError: it is truncated, too long or in another format.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"cannot be decompressed: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTES:
        raise FormatError("does not begin as an IDX file of unsigned bytes does")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise FormatError("ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    wanted = math.prod(shape)
    if len(content) - start != wanted:
        raise FormatError(
            f"must hold {wanted} bytes for the shape {shape}; got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
