"""Counts what a compiled module does: bytes across memory, kernels, collectives."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
SLICES = {"slice", "dynamic-slice"}

ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


class Instruction(NamedTuple):
    """One line of HLO text."""

    name: str
    size: int  # bytes of the output
    opcode: str
    operands: tuple[str, ...]
    called: str | None
    branches: tuple[str, ...]  # of a conditional, that of a true condition last
    number: int | None  # of a parameter


class Cost(NamedTuple):
    """What one execution of a module costs."""

    bytes: int
    kernels: int
    collectives: int


class Collective(NamedTuple):
    """One collective of a module, and what it moves for each device."""

    opcode: str
    sent: int  # bytes of its own that a device puts in
    received: int  # bytes of the result


def collectives(text: str) -> list[Collective]:
    """Every collective of the compiled module in `text`, in loops and branches as well."""
    found = []
    for body in _parse(text)[0].values():
        sizes = {i.name: i.size for i in body}
        for i in body:
            opcode = i.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                sent = sum(sizes[name] for name in i.operands)
                # What is started has its operands in its output, an all-reduce not always.
                twice = sent if opcode != i.opcode else 0
                received = sent if opcode == "all-reduce" else i.size - twice
                found.append(Collective(opcode, sent, received))
    return found


def cost(text: str, branch: int = -1) -> Cost:
    """Bytes read and written, kernels and collectives of the compiled module in `text`.

    Each top-level instruction is charged for its distinct operands and its output; an operand of
    which it only reads slices, for these. Of a conditional it is the branch of this number that
    runs; that of a true condition is the last. Loops raise ValueError.
    """
    computations, entry = _parse(text)
    transferred, kernels = _executed(computations, entry, branch)
    return Cost(transferred, kernels, len(collectives(text)))


def _executed(
    computations: dict[str, list[Instruction]], body: list[Instruction], branch: int
) -> tuple[int, int]:
    """Bytes and kernels of one execution of a computation."""
    sizes = {i.name: i.size for i in body}
    transferred = count = 0
    for i in body:
        if i.opcode == "while":
            raise ValueError("The cost of a loop depends on how often it runs; got a while.")
        if i.opcode == "conditional":
            inner, kernels = _executed(computations, computations[i.branches[branch]], branch)
            transferred, count = transferred + inner, count + kernels
        elif i.opcode not in FREE and not i.opcode.endswith("-done"):
            fused = computations.get(i.called or "", [])
            read = {
                name: _read(fused, position, sizes.get(name, 0))
                for position, name in enumerate(i.operands)
            }
            transferred, count = transferred + i.size + sum(read.values()), count + 1
    return transferred, count


def _read(body: list[Instruction], position: int, size: int) -> int:
    """Bytes that a fusion reads of its operand at `position`."""
    parameters = [i for i in body if i.number == position]
    return _used(body, parameters[0].name, size) if parameters else size


def _used(body: list[Instruction], name: str, size: int) -> int:
    """Bytes that are read of what has this name: all, or those of its slices."""
    users = [i for i in body if name in i.operands]
    if not users or any(i.opcode not in (*SLICES, "bitcast") for i in users):
        return size
    read = (_used(body, i.name, size) if i.opcode == "bitcast" else i.size for i in users)
    return min(size, sum(read))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], list[Instruction]]:
    computations: dict[str, list[Instruction]] = {}
    entry: list[Instruction] = []
    body: list[Instruction] = []
    for line in text.splitlines():
        if header := HEADER.match(line):
            body = computations.setdefault(header[2], [])
            if header[1]:
                entry = body
        elif found := INSTRUCTION.match(line):
            body.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, type_: str, opcode: str, rest: str) -> Instruction:
    arguments, _, attributes = rest.partition(")")
    called = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", attributes)
    listed = re.search(r"branch_computations=\{(.*?)\}", attributes)
    branches = tuple(re.findall(r"[\w.-]+", listed[1])) if listed else ()
    number = int(arguments) if opcode == "parameter" else None
    operands = tuple(re.findall(r"%([\w.-]+)", arguments))
    return Instruction(
        name, _bytes(type_), opcode, operands, called and called[1], branches, number
    )


def _bytes(type_: str) -> int:
    return sum(
        BITS[kind] // 8 * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in ARRAY.findall(type_)
    )
