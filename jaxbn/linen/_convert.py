"""Conversion of models that use Flax's batch norm: jaxbn computes it, on the same variables."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.core import Scope

from jaxbn._flax.layer import name_of
from jaxbn.linen import _flax

Model = TypeVar("Model", bound=nn.Module)

OF_MODULES = {"parent", "name"}
# These fields determine the variables. A model keeps its variables.
OF_VARIABLES = {
    *("use_scale", "use_bias", "scale_init", "bias_init", "param_dtype"),
    *("force_float32_reductions", "num_domains", "shared_affine"),
}
Context = nn.module.InterceptorContext

FIELDS = {field.name for field in dataclasses.fields(_flax.BatchNorm)} - OF_MODULES

# The current conversion. `jax.jit` compiles a program for each of them.
active: Any = jax.make_user_context(None)


@contextlib.contextmanager
def converted(
    *, classes: Collection[type[nn.Module]] = (nn.BatchNorm,), **fields: Any
) -> Iterator[None]:
    """Context manager in which jaxbn computes every `flax.linen.BatchNorm`.

    Use it for models that you cannot edit. Variables and checkpoints stay as they are. A program of
    `jax.jit` that was compiled outside the context is compiled again inside. In nested contexts,
    the innermost one applies.

    Args:
      classes: classes to convert; by default, `flax.linen.BatchNorm`. They may be Flax's own class,
        copies of it, subclasses that change nothing but defaults, or `jaxbn.linen.BatchNorm`
        itself. A module is converted if its class is exactly
        one of these. Fields that a class lacks take Flax's defaults. A class that is not Flax's
        creates its variables itself in initialization.
      **fields: fields of `jaxbn.linen.BatchNorm` to set in all modules, such as `axis_name`,
        `virtual_batch_size`, `skip_nonfinite` or `renorm`.

    Raises:
      ValueError: `jaxbn.linen.BatchNorm` lacks one of `fields`, or a field of one of the classes.

    Examples:
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
    """Returns a copy of a model in which jaxbn computes every `flax.linen.BatchNorm`.

    All methods of the copy run in the context of `converted`: `init`, `apply`, `bind`, `tabulate`
    and the methods of the model. The class of the copy is a subclass of the model's class, with the
    same name, fields, variables and checkpoints. The copy may be part of another model.

    Args:
      model: a Linen module that is not bound to variables.
      classes: as for `converted`; by default, `flax.linen.BatchNorm`.
      **fields: as for `converted`.

    Returns:
      The copy.

    Raises:
      ValueError: the model is bound, or part of another; see also `converted`. `init` and `apply`
        of the copy raise it if all batch norms have other classes.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import jaxbn.linen
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
      >>> model = jaxbn.linen.convert(model, axis_name="batch")
      >>> y, variables = model.init_with_output(jax.random.key(0), jnp.ones((4, 2)))
      >>> sorted(variables["params"]["layers_1"])
      ['bias', 'scale']

    References:
      `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    if not isinstance(model, nn.Module) or model.parent is not None:
        raise ValueError(
            "`model` must be a Linen module that is neither bound nor made inside of another; got "
            f"{type(model).__name__}. Inside of a model use `with jaxbn.linen.converted():`, for "
            "NNX models jaxbn.nnx.convert."
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
    """The class that `_subclass` was called for, and its conversion, if it was."""
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
    """The method, which refuses a model whose batch norms all have other classes."""

    @nn.nowrap
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active.value is not None:  # inside another call, whose interceptors come first
            return method(self, *args, **kwargs)
        met = set()

        def meet(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
            met.add(_origin(type(context.module))[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(meet):
            result = method(self, *args, **kwargs)
        met = {kind for kind in met if kind.__module__ != nn.transforms.__name__}  # lifted ones
        others = [
            name_of(kind)
            for kind in met
            if "BatchNorm" in kind.__name__ or issubclass(kind, (*conversion.classes,))
        ]
        if others and not met & conversion.classes:
            raise ValueError(
                "`classes` must name the batch norms of the model; got "
                f"{', '.join(map(name_of, conversion.classes))} for one with "
                f"{', '.join(sorted(others))}."
            )
        return result

    return checked


class Identical:
    """Stands for an unhashable value in a key. It equals only the same object."""

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
    """An interceptor for Linen that computes the modules of some classes by jaxbn."""

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
            next_fun(*args, **kwargs)  # creates the variables in its own way
        layer = _flax.BatchNorm(**fields, parent=None)
        # Without Linen's wrapper, which is already around the call of `module`.
        compute = inspect.unwrap(_flax.BatchNorm.__call__)
        return compute(BatchNorm(layer, scope.rewound()), *args, **kwargs)


def _conversion(classes: Collection[type[nn.Module]], fields: dict[str, Any]) -> Conversion:
    names = FIELDS - OF_VARIABLES
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(
            "`fields` must be fields of jaxbn.linen.BatchNorm that do not determine its "
            f"variables: {', '.join(sorted(names))}; got {', '.join(unknown)}."
        )
    return Conversion(frozenset(classes), _key(sorted(fields.items())), fields)


def _fields(module: nn.Module, kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(module)} - OF_MODULES
    if unknown := [name for name in names - FIELDS if not name.endswith("_init")]:
        raise ValueError(
            "A class in `classes` must have no fields but Flax's and initializers; "
            f"{name_of(kind)} also has "
            f"{', '.join(sorted(unknown))}, which jaxbn.linen.BatchNorm lacks."
        )
    if kind is not nn.BatchNorm:  # it has created its variables
        names = {name for name in names if not name.endswith("_init")}
    return {name: getattr(module, name) for name in names & FIELDS}


class BatchNorm:
    """A `jaxbn.linen.BatchNorm` with its variables in the scope of another module."""

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
