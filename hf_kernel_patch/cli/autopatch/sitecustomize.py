"""Python imports this at its start; it patches by the environment once transformers is there."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os.path import abspath, dirname

HERE = dirname(abspath(__file__))
ROOT = dirname(dirname(dirname(HERE)))


def patch(_module: object) -> None:
    """Import hf_kernel_patch, which reads the environment; from here where it is not installed."""
    borrowed = ROOT not in sys.path
    if borrowed:
        sys.path.append(ROOT)
    try:
        import hf_kernel_patch  # noqa: F401
    finally:
        if borrowed:
            sys.path.remove(ROOT)


def chain() -> None:
    """Run the sitecustomize that this one hides, if there is one further on the path."""
    places = [abspath(entry) for entry in sys.path]
    further = sys.path[places.index(HERE) + 1 :] if HERE in places else sys.path
    spec = PathFinder.find_spec("sitecustomize", further)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if sys.version_info >= (3, 11):  # noqa: UP036 - a child may be an older Python
    try:
        import wrapt
    except ImportError:  # a Python of another environment, which cannot be patched
        pass
    else:
        wrapt.register_post_import_hook(patch, "transformers")
chain()
