"""Python imports this at its start; it patches by the environment once transformers is there."""

import atexit
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os.path import abspath, dirname, splitext

HERE = dirname(abspath(__file__))
ROOT = dirname(dirname(dirname(HERE)))
#: The file that ``run --report`` names, and the rank of the process that has seen it last.
REPORT, REPORTER = "HF_KERNEL_PATCH_REPORT", "HF_KERNEL_PATCH_REPORTER"


def patch(_module: object) -> None:
    """Import hf_kernel_patch, which reads the environment; from here where it is not installed."""
    borrowed = ROOT not in sys.path
    if borrowed:
        sys.path.append(ROOT)
    try:
        import hf_kernel_patch  # noqa: F401

        if REPORT in os.environ:
            from hf_kernel_patch.cli.autopatch import ending

            ending.begin()
    finally:
        if borrowed:
            sys.path.remove(ROOT)


def report_at_the_end() -> None:
    """Have this process write its report when it ends.

    The first process writes the file that was named, all others files beside it: by rank the
    processes of a distributed job, by process id the rest.
    """
    stem, suffix = splitext(os.environ[REPORT])
    rank, pid = os.environ.get("RANK", ""), os.getpid()
    before = os.environ.get(REPORTER)
    os.environ[REPORTER] = rank
    own = f".rank{rank}" if rank else ""
    by_pid = before == rank

    def write() -> None:
        forked = os.getpid() != pid
        name = f"{stem}.pid{os.getpid()}{suffix}" if by_pid or forked else f"{stem}{own}{suffix}"
        if "hf_kernel_patch" not in sys.modules and (by_pid or forked or before is not None):
            return
        if ROOT not in sys.path:
            sys.path.append(ROOT)
        from hf_kernel_patch.cli.autopatch import ending

        ending.write(name)

    atexit.register(write)


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
        if os.environ.get(REPORT):
            report_at_the_end()
chain()
