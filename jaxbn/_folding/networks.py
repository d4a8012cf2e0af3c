"""Folding in a whole tree of variables: the layers by their names, and the tree without them."""

import contextlib
import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxbn._checks import check_collections
from jaxbn._folding.kernels import FLAX_LAYOUTS, Padding
from jaxbn._folding.layers import fold_into_conv, fold_into_dense
from jaxbn._types import Number

Tree = Mapping[Any, Any]
Variables = TypeVar("Variables", bound=Tree)
CONCATENATION = (
    "For a batch norm after a concatenation, put all layers in one pair, in the order of the "
    'channels: (("a", "b"), "norm").'
)

Paths = str | tuple[str, ...]
Pairs = Mapping[str, str] | Mapping[Paths, str] | Iterable[tuple[Paths, str]]


class _Pair(NamedTuple):
    """The paths of two layers, whether the batch norm comes first, and its channels in use."""

    linear: str
    norm: str
    before: bool
    channels: slice | None = None


def fold_variables(
    variables: Variables, pairs: Pairs, *, epsilon: Number = 1e-5, padding: Padding | None = None
) -> Variables:
    """Folds the batch norms of a Flax network into the linear layers next to them.

    Each pair of paths becomes one linear layer, by `fold_into_conv` or `fold_into_dense`:

        (linear, norm)  kernel' = kernel·k[o]    bias' = (kernel_bias − mean)·k + bias
        (norm, linear)  kernel' = kernel·k[i]    bias' = kernel_bias + Σ kernel·(bias − mean·k)[i]

    The result fits the same network without those batch norms, and with `use_bias=True` in its
    linear layers. Variables tell neither strides nor layouts. Kernels are assumed to have Flax's
    layout, `DHWIO`, and convolutions after a batch norm not to be transposed. For
    `nn.ConvTranspose(transpose_kernel=True)`, use `fold_into_conv` with "HWOI". A layer must use
    its `kernel` as it is stored. Layers with further variables, such as those of weight
    normalization, spectral normalization or low-rank adaptation, are refused.

    Args:
      variables: the collections `params` and `batch_stats`, as `model.init` returns them: dicts or
        FrozenDicts of NumPy or JAX arrays. They are not changed.
      pairs: paths of two layers that are applied one right after the other, in this order, for
        example `[("block_0/Conv_0", "block_0/BatchNorm_0")]`, or a mapping from the first to the
        second. The batch norm has `mean` and `var` in `batch_stats`, and the linear layer has a
        `kernel`. A layer may be in one pair only. For a batch norm after a concatenation, give a
        tuple of linear layers, in the order of the channels: `(("a", "b"), "norm")`.
      epsilon: epsilon of the batch norms; a non-negative Python number. If they differ, fold those
        with the same epsilon in one call each.
      padding: padding of the convolutions after a batch norm, as for `fold_into_conv`.

    Returns:
      A new tree of the same types. The linear layers have a new `kernel` and `bias`. The batch
        norms are removed, and so are mappings that they leave empty. The rest is unchanged.

    Raises:
      TypeError: `variables` is not a mapping, or `pairs` are not pairs of strings; see also
        `fold_into_conv`.
      ValueError: a collection or a path is missing, a pair has no batch norm, two batch norms or no
        kernel, a layer is in two pairs, a kernel is not used as it is stored, a running variance is
        negative, or statistics or results are not finite (unless traced); see also
        `fold_into_conv`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
      >>> class Model(nn.Module):
      ...     folded: bool = False
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.Dense(4, use_bias=self.folded, name="dense")(x)
      ...         return x if self.folded else nn.BatchNorm(True, name="norm")(x)
      >>> x = jnp.ones((2, 3))
      >>> variables = Model().init(jax.random.key(0), x)
      >>> folded = jaxbn.fold_variables(variables, [("dense", "norm")])
      >>> jax.tree.map(jnp.shape, folded)
      {'params': {'dense': {'bias': (4,), 'kernel': (3, 4)}}}
      >>> y = Model(folded=True).apply(folded, x)
      >>> bool(jnp.allclose(y, Model().apply(variables, x), atol=1e-6))
      True

    References:
      `torch.nn.utils.fusion`.
    """
    linears, norms = _layers(variables)
    checked = [
        pair for given in _once_each(pairs) for pair in _checked_pairs(given, linears, norms)
    ]
    leaves = list(_leaves(variables))
    for pair in checked:
        if hasattr(linears[pair.linear]["kernel"], "unbox"):
            raise TypeError(
                f"`variables` must hold arrays; got a box of metadata for {pair.linear!r}. "
                "Use flax.linen.unbox(variables)."
            )
        _check_kernel_is_used(leaves, pair.linear)
    if padding is not None and not any(
        pair.before and jnp.ndim(linears[pair.linear]["kernel"]) > 2 for pair in checked
    ):
        raise ValueError(
            "`padding` has an effect only if a batch norm comes before a convolution; got "
            f"padding={padding!r} and no such pair. Leave it out."
        )
    layers = [(linears[pair.linear], norms[pair.norm]) for pair in checked]

    def folded(layers: list[tuple[Tree, Tree]]) -> list[tuple[Tree, list[jax.Array]]]:
        with_layers = zip(layers, checked, strict=True)
        return [_fold(*each, pair, epsilon, padding) for each, pair in with_layers]

    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layers))
    # Compiled as a whole: compiling the operations of a network one by one takes long.
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        results = jax.jit(folded)(layers)
    for (new, wrong), pair in zip(results, checked, strict=True):
        linear, norm, *_ = pair
        if known:
            values = norms[norm]["mean"], norms[norm]["var"], new["kernel"], new["bias"]
            _check(wrong, values, pair)
        variables = _with(variables, ["params", *linear.split("/")], {**linears[linear], **new})
        for collection in ("params", "batch_stats"):
            variables = _with(variables, [collection, *norm.split("/")], {})
    return variables


def _layers(variables: Tree) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """The variables of linear layers and of batch norms, by path."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`variables` must be a mapping of collections, as `model.init` returns it; got "
            f"{type(variables).__name__}."
        )
    check_collections(variables)
    params = dict(_modules(variables["params"]))
    stats = dict(_modules(variables["batch_stats"]))
    linears = {path: node for path, node in params.items() if "kernel" in node}
    norms: dict[str, Tree] = {
        path: {**params.get(path, {}), **node}
        for path, node in stats.items()
        if "mean" in node and "var" in node
    }
    return linears, norms


def _modules(tree: Tree, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, Tree]]:
    """Each mapping inside the tree, with its path."""
    for key, node in tree.items():
        if isinstance(node, Mapping):
            path = (*parents, str(key))
            yield "/".join(path), node
            yield from _modules(node, path)


def _once_each(pairs: Pairs) -> list[tuple[Paths, str]]:
    """The pairs as a list. No path may occur twice."""
    listed = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    for pair in listed:
        strings = isinstance(pair, Sequence) and all(
            _paths(one) and all(isinstance(path, str) for path in _paths(one)) for one in pair
        )
        if isinstance(pair, str) or not strings or len(pair) != 2 or isinstance(pair[1], tuple):
            raise TypeError(
                "`pairs` must hold pairs of paths, for example "
                f'[("block_0/Conv_0", "block_0/BatchNorm_0")]; got {pair!r} in it. The first of a '
                "pair may be a tuple of layers with concatenated outputs. A batch norm before "
                "several layers cannot be folded."
            )
    paths = [path for pair in listed for one in pair for path in _paths(one)]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"A layer may occur once in `pairs`; {path!r} occurs twice. Fold the batch norms "
                "before and after a layer in two calls. A layer that feeds two batch norms cannot "
                "absorb either. " + CONCATENATION
            )
    return listed


def _paths(paths: Any) -> tuple[Any, ...]:
    return paths if isinstance(paths, tuple) else (paths,)


def _checked_pairs(
    pair: tuple[Paths, str], linears: Mapping[str, Tree], norms: Mapping[str, Tree]
) -> list[_Pair]:
    """A pair for each linear layer, with its part of the channels of the batch norm."""
    if not isinstance(pair[0], tuple):
        return [_checked_pair((pair[0], pair[1]), linears, norms)]
    pairs = [_checked_pair((path, pair[1]), linears, norms) for path in pair[0]]
    sizes = [0 if p.before else jnp.shape(linears[p.linear]["kernel"])[-1] for p in pairs]
    ends = list(itertools.accumulate(sizes))
    size = jnp.size(norms[pairs[0].norm]["mean"])
    if any(p.before for p in pairs) or ends[-1] != size:
        raise ValueError(
            "A tuple of `pairs` must name the linear layers whose outputs a batch norm takes, "
            f"concatenated; got {pair!r}, {ends[-1]} outputs for a batch norm of {size} channels."
        )
    return [
        p._replace(channels=slice(end - size, end))
        for p, size, end in zip(pairs, sizes, ends, strict=True)
    ]


def _checked_pair(pair: tuple[str, str], linears: Collection[str], norms: Collection[str]) -> _Pair:
    first, second = pair
    for path in pair:
        if path not in linears and path not in norms:
            near = difflib.get_close_matches(path, [*linears, *norms], n=3, cutoff=0)
            raise ValueError(
                "`pairs` must name linear layers, with a `kernel` in params, and batch norms, with "
                f"`mean` and `var` in batch_stats; got {path!r}, which is neither. The nearest "
                f"paths are {', '.join(map(repr, near))}."
            )
    if (first in norms) == (second in norms):
        raise ValueError(
            "Each of the `pairs` must have one linear layer, with a `kernel` in params, and one "
            "batch norm, with `mean` and `var` in batch_stats; got "
            f"{'no linear layer' if first in norms else 'no batch norm'} in {pair!r}."
        )
    return _Pair(second, first, True) if first in norms else _Pair(first, second, False)


def _leaves(variables: Tree) -> Iterator[tuple[str, list[str]]]:
    """The collection of each array, and the names on the path to it."""
    for collection, tree in variables.items():
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            yield collection, [str(getattr(k, "key", getattr(k, "idx", k))) for k in path]


def _check_kernel_is_used(leaves: Iterable[tuple[str, list[str]]], linear: str) -> None:
    """Refuses a layer with variables that its kernel is computed from, or used with.

    A wrapper without variables of its own, `nn.WeightNorm(…, use_scale=False)`, cannot be detected.
    """
    own, layer = f"{linear}/", linear.split("/")
    others = []
    for collection, names in leaves:
        *parents, name = names
        if collection == "intermediates":
            continue
        if "/".join(names).startswith(own):
            wanted = collection == "params" and name in ("kernel", "bias")
            others += [] if wanted and len(names) == len(layer) + 1 else [name]
        # Linen's wrappers name their variables after the parameter: "conv/kernel/scale".
        elif "/".join([*parents[:-1], name]).startswith(f"{own}kernel/"):
            others.append(name)
    others += [name for name in layer if name in ("layer_instance", "base_module")]  # of NNX
    if others:
        raise ValueError(
            f"A layer must use its `kernel` as it is stored; got {linear!r} with "
            f"{', '.join(map(repr, sorted({*others})))}, such as weight normalization, spectral "
            "normalization or low-rank adaptation has. Compute the kernel that the layer uses, and "
            "fold that with `fold_into_conv` or `fold_into_dense` into a layer without these."
        )


def _fold(
    linear: Tree, norm: Tree, pair: _Pair, epsilon: Number, padding: Padding | None
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """The new kernel and bias of a linear layer, and how many values break each requirement."""
    if pair.channels is not None:
        names = {*norm} & {"mean", "var", "scale", "bias"}
        norm = {name: jnp.asarray(norm[name])[pair.channels] for name in names}
    mean, var, kernel = norm["mean"], norm["var"], linear["kernel"]
    arrays = kernel, linear.get("bias"), mean, var, norm.get("scale"), norm.get("bias")
    before = pair.before
    try:
        if jnp.ndim(kernel) == 2:
            new = fold_into_dense(*arrays, epsilon=epsilon, before=before)
        else:
            # With groups, a kernel has all outputs along O, but the inputs of one group along I.
            one = jnp.shape(kernel)[-2] if before and jnp.ndim(kernel) > 2 else jnp.size(mean)
            new = fold_into_conv(
                *arrays,
                epsilon=epsilon,
                layout=FLAX_LAYOUTS.get(jnp.ndim(kernel), "HWIO"),
                feature_group_count=max(jnp.size(mean) // one, 1),
                before=before,
                padding=padding if before else None,
            )
    except (TypeError, ValueError) as error:
        error.add_note(_note(pair))
        if (
            not before
            and pair.channels is None
            and jnp.ndim(mean) == 1
            and jnp.size(mean) > jnp.shape(kernel)[-1]
        ):
            error.add_note(CONCATENATION)
        raise
    finite = [jnp.isfinite(value) for value in (mean, var, *new)]
    finite[1] &= var >= 0
    return dict(zip(("kernel", "bias"), new, strict=True)), [jnp.sum(~valid) for valid in finite]


def _note(pair: _Pair) -> str:
    return f"This happened while folding {pair.norm!r} into {pair.linear!r}."


REQUIREMENTS = (
    "The running mean must be finite",
    "The running variance must be finite and not negative",
    "The folded kernel must be finite in {0.dtype}",
    "The folded bias must be finite in {0.dtype}",
)


def _check(wrong: list[jax.Array], values: Sequence[Any], pair: _Pair) -> None:
    """Refuses invalid values if they are known: a network of NaNs would not say why."""
    for requirement, count, value in zip(REQUIREMENTS, wrong, values, strict=True):
        if count:
            error = ValueError(
                f"{requirement.format(value)}; got {count} of {jnp.size(value)} values that are "
                "not."
            )
            error.add_note(_note(pair))
            raise error


def _with(tree: Any, path: Sequence[str], node: Tree) -> Any:
    """`tree` with `node` at `path`. An empty node is removed, and mappings that it leaves empty."""
    if not path:
        return type(tree)(node)
    branches = {}
    for key, branch in tree.items():
        if str(key) != path[0]:
            branches[key] = branch
        elif new := _with(branch, path[1:], node):
            branches[key] = new
    return type(tree)(branches)
