"""Libraries that come with an extra of jaxbn, one for each namespace of layers."""

import importlib.util


def check_installed(library: str, title: str, namespace: str) -> None:
    """Says how to install what a namespace needs, where it is missing."""
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"`{namespace}` needs {title}, which is not installed. "
            f"Use pip install 'jaxbn[{library}]'.",
            name=library,
        )
