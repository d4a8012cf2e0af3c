"""Equinox modules: they own the parameters, store the state and call the functions of `jaxbn`.

`BatchNorm` has the constructor, the call and the state of `equinox.nn.BatchNorm`. To install
Equinox, use `pip install 'jaxbn[equinox]'`.
"""

from jaxbn import _extras

_extras.check_installed("equinox", "Equinox", __name__)

from jaxbn.equinox._batch_norm import BatchNorm as BatchNorm
