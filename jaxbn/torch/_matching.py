"""Matching of the layers of torch and Flax by their names, shapes, nesting and order."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import NamedTuple

from jaxbn.torch._slots import Path, Shape

Kind = tuple[tuple[str, Shape], ...]  # entries of a layer, with shapes in torch's layout

# The names of a convolution and its batch norm differ only in such a word: conv1 and bn1,
# Conv_0 and BatchNorm_0, conv_proj and norm_proj.
_WORDS = re.compile(
    r"(?<![a-z])(conv(olution)?(transpose)?|(batch|sync|group|layer)?_?norm|[bgl]n)(\dd)?(?![a-z])",
    re.IGNORECASE,
)

# The number of a module. The number of dimensions in BatchNorm2d_0 does not count.
_NUMBER = re.compile(r"\d+(?!\d|d(?![a-z]))", re.IGNORECASE)


class Layer(NamedTuple):
    """A module with variables of its own."""

    name: str  # layer1.0.bn1 in torch, layer1_0/bn1 in Flax
    parts: Path
    kind: Kind


Layers = tuple[Layer, ...]


def kinds(layers: Layers) -> Counter[Kind]:
    """The number of layers of each kind."""
    return Counter(layer.kind for layer in layers)


def agreeing(torch: Layers, flax: Layers, depth: int = 0) -> dict[Path, Path]:
    """The modules, layers or not, whose names agree. Flax's names are read from `depth` on."""
    theirs, ours = _by_tokens(torch, 0), _by_tokens(flax, depth)
    numbers = [_numbers(side) for side in (theirs, ours)]

    def numbered_alike(tokens: Path) -> bool:
        starts = [tokens[:i] for i, token in enumerate(tokens) if token.isdigit()]
        return all(numbers[0][start] == numbers[1][start] for start in starts)

    common = [tokens for tokens in theirs if tokens in ours and numbered_alike(tokens)]
    return {theirs[tokens]: ours[tokens] for tokens in common}


def _by_tokens(layers: Layers, depth: int) -> dict[Path, Path]:
    """The modules by the words and numbers of their names, without their common beginning."""
    start = _shared(*(_tokens(layer.parts[depth:]) for layer in layers))
    modules = dict.fromkeys(
        layer.parts[:stop] for layer in layers for stop in range(depth + 1, len(layer.parts) + 1)
    )
    tokens = {module: _tokens(module[depth:]) for module in modules}
    counts = Counter(tokens.values())
    return {
        words[start:]: module
        for module, words in tokens.items()
        if len(words) > start and counts[words] == 1
    }


def _shared(*names: Path) -> int:
    """The number of parts that all names begin with."""
    shortest = min(map(len, names), default=0)
    return next((i for i in range(shortest) if len({name[i] for name in names}) > 1), shortest)


def _tokens(parts: Path) -> Path:
    """`layer1.0` as (layer, 1, 0), and likewise its name in a Sequential, `layer1/layers_0`."""
    tokens = re.findall(r"[^\W\d_]+|\d+", "/".join(parts))
    following = pairwise([*tokens, ""])
    return tuple(token for token, after in following if token != "layers" or not after.isdigit())


def _numbers(names: Iterable[Path]) -> defaultdict[Path, set[str]]:
    """The numbers that follow each beginning of a name."""
    numbers: defaultdict[Path, set[str]] = defaultdict(set)
    for tokens in names:
        for i, token in enumerate(tokens):
            if token.isdigit():
                numbers[tokens[:i]].add(token)
    return numbers


def anchored(pairs: Mapping[str, str], torch: Layers, flax: Layers) -> tuple[Layers, Layers]:
    """The layers. Those of a pair get a kind of their own."""
    own = {pairs[t.name]: (*t.kind, (pairs[t.name], ())) for t in torch if t.name in pairs}
    return (
        tuple(t._replace(kind=own[pairs[t.name]]) if t.name in pairs else t for t in torch),
        tuple(layer._replace(kind=own.get(layer.name, layer.kind)) for layer in flax),
    )


def unoriented(torch: Layers, flax: Layers, cautious: bool) -> tuple[Layers, Layers]:
    """The layers, without the order of the two channel axes if the sides differ in it.

    If `cautious`, the order is also dropped for kinds of layers without a name that tells whether
    they are transposed, such as Conv_0 or ConvTranspose_0.
    """

    def unordered(kind: Kind) -> Kind:
        return tuple((e, (*sorted(s[:2]), *s[2:]) if len(s) > 2 else s) for e, s in kind)

    theirs, ours = kinds(torch), kinds(flax)
    told = re.compile(r"(^|/)Conv(Transpose)?_\d+$")
    unsure = {unordered(kind) for kind in (theirs - ours) | (ours - theirs)}
    if cautious:
        unsure |= {unordered(layer.kind) for layer in flax if not told.search(layer.name)}

    def read(layers: Layers) -> Layers:
        kind = {layer.kind: unordered(layer.kind) for layer in layers}
        return tuple(
            layer._replace(kind=kind[layer.kind]) if kind[layer.kind] in unsure else layer
            for layer in layers
        )

    return read(torch), read(flax)


def _inside(layer: Layer, module: Path) -> bool:
    """Whether a layer is inside a module."""
    return layer.parts[: len(module)] == module


def _kinds_inside(layers: Layers, module: Path) -> Counter[Kind]:
    """The number of layers of each kind inside a module."""
    return kinds(tuple(layer for layer in layers if _inside(layer, module)))


def _marked(layers: Layers, modules: Mapping[Path, Path]) -> Layers:
    """The layers. Their kinds tell which of these modules they are in."""
    marks = {module: ("/".join(mark), ()) for module, mark in modules.items()}
    return tuple(
        layer._replace(
            kind=(*layer.kind, *(mark for module, mark in marks.items() if _inside(layer, module)))
        )
        for layer in layers
    )


def ways(torch: Layers, flax: Layers, depth: int = 0) -> list[dict[str, str]]:
    """Two ways to match all layers, or the only one, or none.

    `torch` is in order. The order of `flax` does not matter. Flax's names are read from `depth` on.
    Ways in which their numbers follow torch's order are preferred.
    """
    if kinds(torch) != kinds(flax):
        return []
    pairs = agreeing(torch, flax, depth)
    if any(_kinds_inside(torch, t) != _kinds_inside(flax, f) for t, f in pairs.items()):
        pairs = {}  # the names do not correspond
    torch, flax = _marked(torch, pairs), _marked(flax, {f: f for f in pairs.values()})
    if len(kinds(torch)) == len(torch):
        path = {layer.kind: layer.name for layer in flax}
        return [{layer.name: path[layer.kind] for layer in torch}]
    for families in _attempts(torch, _children(flax, depth), {*pairs.values()}):
        if found := [*islice(_fillings(torch, 0, families, set()), 2)]:
            return found
    return []


class _Child(NamedTuple):
    """A child of a Flax module."""

    name: str
    depth: int  # of its name in the paths of its layers
    layers: Layers


class _Family(NamedTuple):
    """Children of which the first comes next, or any of them if not `ordered`."""

    ordered: bool
    children: tuple[_Child, ...]


def _children(flax: Layers, depth: int) -> list[_Child]:
    """The layers, grouped by child module. The elements of a list count as children."""
    layers: defaultdict[Path, Layers] = defaultdict(tuple)
    for layer in flax:
        stop = depth + 1
        while layer.parts[stop : stop + 1] and layer.parts[stop].isdigit():
            stop += 1
        layers[layer.parts[depth:stop]] += (layer,)
    return [_Child("/".join(p), depth + len(p), some) for p, some in layers.items()]


def _paired(children: list[_Child]) -> list[_Child]:
    """A convolution and its norm as one child, if each of one sort has one of the other."""
    alike = defaultdict(list)
    for child in children:
        alike[_residue(child.name)].append(child)

    def is_pair(some: list[_Child]) -> bool:
        layers = [layer for child in some for layer in child.layers]
        dimensions = {len(dict(layer.kind).get("weight", ())) for layer in layers}
        return len(some) == len(layers) == len(dimensions) == 2

    others = [child for some in alike.values() if not is_pair(some) for child in some]
    stems = {_stem(child.name) for child in others}
    result = others
    for residue, some in alike.items():
        if is_pair(some):
            apart = any(_stem(child.name) in stems for child in some)
            layers = sum((child.layers for child in some), ())
            result += some if apart else [_Child(residue, some[0].depth, layers)]
    return result


def _numbered(children: list[_Child], named: set[Path]) -> dict[str, tuple[_Child, ...]]:
    """Children that differ only in their numbers, in their order, except for `named` ones."""
    stems = defaultdict(list)
    for child in children:
        if not {layer.parts[: child.depth] for layer in child.layers} <= named:
            stems[_stem(child.name)].append(child)
    return {
        stem: tuple(sorted(some, key=lambda child: _order(child.name)))
        for stem, some in stems.items()
        if len(some) > 1
    }


def _attempts(
    torch: Layers, children: list[_Child], named: set[Path]
) -> Iterator[tuple[_Family, ...]]:
    """Sets of families: first with all in order, then those that can be in order, then none."""
    both = _paired(children), children
    for some in both:
        yield _families(some, {*_numbered(some, named)}, named)
    layers = (layer for child in children for layer in child.layers)
    apart = named | {layer.parts for layer in layers if (layer.name, ()) in layer.kind}  # known
    for some in both:
        yield _families(some, _orderly(torch, some, apart), apart)
        yield _families(some, set(), apart)


def _families(children: list[_Child], stems: set[str], named: set[Path]) -> tuple[_Family, ...]:
    """Children of these stems in the order of their numbers, and all others by their shapes."""
    ordered = [some for stem, some in _numbered(children, named).items() if stem in stems]
    shapes = defaultdict(list)
    for child in children:
        if not any(child in some for some in ordered):
            shapes[frozenset(kinds(child.layers).items())].append(child)
    return (
        *(_Family(True, some) for some in ordered),
        *(_Family(False, tuple(some)) for some in shapes.values()),
    )


def _orderly(torch: Layers, children: list[_Child], named: set[Path]) -> set[str]:
    """The stems whose order fits, with layers apart from those of stems that do not fit."""
    numbered = _numbered(children, named)
    span = {}
    for stem, some in numbered.items():
        there = kinds(tuple(layer for child in some for layer in child.layers))
        places = [i for i, layer in enumerate(torch) if layer.kind in there]
        span[stem] = (places[0], places[-1])

    def fits(stem: str) -> bool:
        families = _families(children, {stem}, named)
        return any(True for _ in _fillings(torch, 0, families, set()))

    against = [span[stem] for stem in numbered if not fits(stem)]
    return {
        stem
        for stem, (start, stop) in span.items()
        if all(stop < first or last < start for first, last in against)
    }


def _fillings(
    torch: Layers, start: int, families: tuple[_Family, ...], dead: set[tuple[int, ...]]
) -> Iterator[dict[str, str]]:
    """The ways to give torch's layers from `start` on, in order, to the children of a module."""
    if start == len(torch):
        yield {}
        return
    state = tuple(len(family.children) for family in families)
    if state in dead:
        return
    alive = False
    for i, (ordered, children) in enumerate(families):
        for j, child in enumerate(children[:1] if ordered else children):
            stop = start + len(child.layers)
            if stop > len(torch) or _crosses(torch, start, stop):
                continue
            left = _Family(ordered, children[:j] + children[j + 1 :])
            others = (*families[:i], left, *families[i + 1 :])
            for inner in ways(torch[start:stop], child.layers, child.depth):
                for outer in _fillings(torch, stop, others, dead):
                    alive = True
                    yield inner | outer
    if not alive:
        dead.add(state)


def _crosses(torch: Layers, start: int, stop: int) -> bool:
    """Whether the range splits a torch module that does not contain the whole range."""

    def shared(i: int, j: int) -> int:
        return _shared(torch[i].parts, torch[j].parts)

    inside = shared(start, stop - 1)
    return (start > 0 and shared(start - 1, start) > inside) or (
        stop < len(torch) and shared(stop - 1, stop) > inside
    )


def orders(torch: Layers) -> list[Layers]:
    """Two orders of layers for which only numbers tell an order: everything else is reversed."""
    names = sorted({_stem(_residue(part)) for layer in torch for part in layer.parts})

    def key(layer: Layer, sign: int) -> list[tuple[int, tuple[int, ...], str]]:
        residues = [(part, _residue(part)) for part in layer.parts]
        return [(sign * names.index(_stem(r)), _order(r), part) for part, r in residues]

    return [tuple(sorted(torch, key=lambda layer: key(layer, sign))) for sign in (1, -1)]


def _residue(name: str) -> str:
    """A name without the words for convolutions and norms."""
    return _WORDS.sub("", name).strip("_")


def _stem(name: str) -> str:
    """A name without its numbers."""
    return _NUMBER.sub("#", name)


def _order(name: str) -> tuple[int, ...]:
    """The numbers in a name."""
    return tuple(map(int, _NUMBER.findall(name)))
