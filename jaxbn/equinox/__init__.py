"""Equinox modules: they own the parameters, store the state and call the functions of `jaxbn`.

`BatchNorm` has the constructor, the call and the state of `equinox.nn.BatchNorm`. To install
Equinox, use `pip install 'jaxbn[equinox]'`.
"""

try:
    import equinox as _equinox  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "equinox":
        raise
    raise ModuleNotFoundError(
        "`jaxbn.equinox` needs Equinox, which is not installed. Use pip install 'jaxbn[equinox]'.",
        name="equinox",
    ) from error

from jaxbn.equinox._batch_norm import BatchNorm as BatchNorm
