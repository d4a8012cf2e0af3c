"""Writes files in torch's legacy format byte by byte, whole and hostile ones, without torch."""

import struct

import numpy as np

KINDS = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def number(value):
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values):
    return group(*map(number, values))


def group(*items):
    return b"(" + b"".join(items) + b"t"


def function(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def called(name, *arguments):
    return function(name) + group(*arguments) + b"R"


def storage(kind, key, size, view=b"N"):
    name = function(f"torch {kind}Storage")
    return group(text("storage"), name, text(key), text("cpu"), number(size), view) + b"Q"


def tensor(stored, shape, strides, offset=0):
    """`shape` and `strides` are numbers, or the bytes of a program that makes them."""
    shape, strides = (v if isinstance(v, bytes) else numbers(v) for v in (shape, strides))
    hooks = called("collections OrderedDict")
    name = "torch._utils _rebuild_tensor_v2"
    return called(name, stored, number(offset), shape, strides, number(False), hooks)


def pickle(program):
    return b"\x80\x02" + program + b"."


def named(values):
    """An OrderedDict of names and the programs of their values, with torch's `_metadata`."""
    items = b"".join(text(name) + value for name, value in values.items())
    attributes = b"}" + text("_metadata") + called("collections OrderedDict") + b"s"
    return called("collections OrderedDict") + b"(" + items + b"u" + attributes + b"b"


def file(content, storages, keys=None):
    """The bytes of a file: the program of its content, and the arrays of the storages by name."""
    keys = b"](" + b"".join(map(text, storages)) + b"e" if keys is None else keys
    sizes = b"}" + text("little_endian") + number(True) + b"s"
    programs = number(0x1950A86A20F9469CFC6C), number(1001), sizes, content, keys
    data = [struct.pack("<q", a.size) + np.asarray(a).tobytes() for a in storages.values()]
    return b"".join([*map(pickle, programs), *data])
