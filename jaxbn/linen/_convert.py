"""Models that name Flax's own batch norm: jaxbn computes it, on the same variables."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.core import Scope

from jaxbn.linen import _flax

Model = TypeVar("Model", bound=nn.Module)

OF_MODULES = {"parent", "name"}
# These fields say which variables there are; a model keeps those that it has.
OF_VARIABLES = {
    *("use_scale", "use_bias", "scale_init", "bias_init", "param_dtype"),
    *("force_float32_reductions", "num_domains", "shared_affine"),
}
Context = nn.module.InterceptorContext

FIELDS = {field.name for field in dataclasses.fields(_flax.BatchNorm)} - OF_MODULES

# The conversion in force. Programs of `jax.jit` are compiled for one of them.
active: Any = jax.make_user_context(None)


@contextlib.contextmanager
def converted(
    *, classes: Collection[type[nn.Module]] = (nn.BatchNorm,), **fields: Any
) -> Iterator[None]:
    """Context in which `jaxbn.linen.BatchNorm` computes every `flax.linen.BatchNorm`.

    This is for models that one cannot edit. Variables and checkpoints stay as they are. A program
    of `jax.jit` that was compiled outside of the context is compiled anew in it. The inner one of
    nested contexts counts.

    Args:
      classes: which classes stand for Flax's: copies of it, subclasses that change nothing but
        defaults, or `jaxbn.linen.BatchNorm` itself. A module is converted if it is of one of these
        classes exactly. Fields that a class does not have are at Flax's defaults. A class that is
        not Flax's makes its variables itself in initialization.
      **fields: fields of `jaxbn.linen.BatchNorm` that are set in all modules, such as `axis_name`,
        `virtual_batch_size`, `skip_nonfinite` or `renorm`.

    Raises:
      ValueError: `jaxbn.linen.BatchNorm` lacks one of `fields`, or a field of one of the classes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxbn.linen import converted
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
      >>> x = jnp.full((4, 2), 1e4)
      >>> with converted(skip_nonfinite=True):
      ...     variables = model.init(jax.random.key(0), x)
      ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
      >>> sorted(updates["batch_stats"]["layers_1"])
      ['mean', 'var']

    References:
      `flax.linen.intercept_methods`.
    """
    conversion = _conversion(classes, fields)
    with active(conversion), nn.intercept_methods(conversion):
        yield


def convert(
    model: Model, *, classes: Collection[type[nn.Module]] = (nn.BatchNorm,), **fields: Any
) -> Model:
    """A copy of a model whose methods run in the context `converted`.

    It is of a subclass of the model's class, with the same name, fields, variables and checkpoints.
    `init`, `apply`, `bind`, `tabulate` and each method of the model compute batch norms by jaxbn.
    It may be a part of another model.

    Args:
      model: a Linen module that is not bound to variables.
      classes: as for `converted`.
      **fields: as for `converted`.

    Returns:
      The copy.

    Raises:
      ValueError: the model is bound, or part of another; see `converted`. `init` and `apply` of the
        copy raise it if all batch norms are of other classes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import jaxbn.linen
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
      >>> model = jaxbn.linen.convert(model, axis_name="batch")
      >>> y, variables = model.init_with_output(jax.random.key(0), jnp.ones((4, 2)))
      >>> sorted(variables["params"]["layers_1"])
      ['bias', 'scale']
    """
    if not isinstance(model, nn.Module) or model.parent is not None:
        raise ValueError(
            "`model` must be a Linen module that is neither bound nor made inside of another; got "
            f"{type(model).__name__}. Inside of a model use `with jaxbn.linen.converted():`, for "
            "NNX jaxbn.nnx.convert."
        )
    kind, earlier = _origin(type(model))
    conversion = _conversion(classes, fields)
    if earlier is not None:
        conversion = _conversion(earlier.classes | {*classes}, earlier.fields | fields)
    attributes = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name != "parent"
    }
    copy: Model = _subclass(kind, conversion)(parent=None, **attributes)
    return copy


def _origin(kind: Any) -> Any:
    """The class that `_subclass` was called for, and with which conversion, if it was."""
    return vars(kind).get("converted_from", (kind, None))


@functools.cache
def _subclass(kind: type[nn.Module], conversion: "Conversion") -> type[Any]:
    """A class whose methods run in the context of a conversion."""

    def within(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with active(conversion), nn.intercept_methods(conversion):
                return getattr(super(subclass, self), name)(*args, **kwargs)

        return nn.nowrap(method)  # Linen wraps the method of the superclass

    names = {name for base in kind.__mro__ for name in vars(base)} - {*dir(nn.Module)}
    names -= {field.name for field in dataclasses.fields(kind)}
    names = {name for name in names if inspect.isfunction(inspect.getattr_static(kind, name))}
    methods = {name: within(name) for name in names}
    for name in ("init_with_output", "apply"):  # they take any function of a module, too
        methods[name] = _checked(within(name), conversion)
    about = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "converted_from": (kind, conversion),
    }
    subclass = type(kind.__name__, (kind,), about | methods)
    return subclass


def _checked(method: Callable[..., Any], conversion: "Conversion") -> Callable[..., Any]:
    """The method, which refuses a model whose batch norms are all of other classes."""

    @nn.nowrap
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active.value is not None:  # inside of another call, whose interceptors come first
            return method(self, *args, **kwargs)
        met = set()

        def meet(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
            met.add(_origin(type(context.module))[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(meet):
            result = method(self, *args, **kwargs)
        met = {kind for kind in met if kind.__module__ != nn.transforms.__name__}  # lifted ones
        others = [
            _name(kind)
            for kind in met
            if "BatchNorm" in kind.__name__ or issubclass(kind, (*conversion.classes,))
        ]
        if others and not met & conversion.classes:
            raise ValueError(
                "`classes` must name the batch norms of the model; got "
                f"{', '.join(map(_name, conversion.classes))} for one with "
                f"{', '.join(sorted(others))}."
            )
        return result

    return checked


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Identical:
    """Stands for a value without hash in a key; it equals what is the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identical) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    try:
        hash(value)
    except TypeError:
        return Identical(value)
    return value  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """An interceptor for Linen: computes the modules of some classes by jaxbn."""

    classes: frozenset[type[nn.Module]]
    key: Hashable
    fields: dict[str, Any] = dataclasses.field(compare=False)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context
    ) -> Any:
        module, scope = context.module, context.module.scope
        kind = _origin(type(module))[0]
        chosen = kind in self.classes and context.method_name == "__call__"
        if not chosen or scope is None or active.value != self:
            return next_fun(*args, **kwargs)
        fields = _fields(module, kind) | self.fields
        if module.is_initializing() and kind is not nn.BatchNorm:
            next_fun(*args, **kwargs)  # makes the variables in its own way
        layer = _flax.BatchNorm(**fields, parent=None)
        # Without what Linen wraps around a method: it is around the call of `module` already.
        compute = inspect.unwrap(_flax.BatchNorm.__call__)
        return compute(BatchNorm(layer, scope.rewound()), *args, **kwargs)


def _conversion(classes: Collection[type[nn.Module]], fields: dict[str, Any]) -> Conversion:
    names = FIELDS - OF_VARIABLES
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(
            "`fields` must be among those of jaxbn.linen.BatchNorm that say nothing of its "
            f"variables, {', '.join(sorted(names))}; got {', '.join(unknown)}."
        )
    return Conversion(frozenset(classes), _key(sorted(fields.items())), fields)


def _fields(module: nn.Module, kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(module)} - OF_MODULES
    if unknown := [name for name in names - FIELDS if not name.endswith("_init")]:
        raise ValueError(
            "A class in `classes` must have no fields but Flax's and initializers; "
            f"{_name(kind)} also has "
            f"{', '.join(sorted(unknown))}, of which jaxbn.linen.BatchNorm knows nothing."
        )
    if kind is not nn.BatchNorm:  # it has made its variables
        names = {name for name in names if not name.endswith("_init")}
    return {name: getattr(module, name) for name in names & FIELDS}


class BatchNorm:
    """A `jaxbn.linen.BatchNorm` that has its variables in the scope of another module."""

    def __init__(self, layer: _flax.BatchNorm, scope: Scope) -> None:
        self.layer, self.scope = layer, scope
        self.param, self.variable = scope.param, scope.variable
        self.has_variable = scope.has_variable

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    @property
    def variables(self) -> Any:
        return self.scope.variables()

    def is_initializing(self) -> bool:
        return bool(self.scope.get_flag("initializing", False))
