"""Imports point one way, and importing the package imports no framework."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_kernel_patch
from tests.support.probes import run_python

ROOT = Path(hf_kernel_patch.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
#: From the bottom to the top; a part imports from below and from itself. What is not named here,
#: such as the command line, stands on top of all.
LAYERS = (
    {"version", "errors", "devices"},
    {"settings", "kernels"},
    {"ops"},
    {"registry"},
    {"recognition"},
    {"models"},
    {"measuring"},
    {"patching"},
    {"api"},
    {"workload"},
    {"benchmarking", "bisecting", "integrations", "verifying"},
    {"__init__"},
)
FRAMEWORKS = {"torch", "transformers", "triton", "torch_npu", "accelerate", "numpy", "kernels"}
#: Third-party packages that a file of ``ops/<op>/`` may import, by its name up to an underscore,
#: or by that of the folder within which it lies.
BACKENDS = {
    "reference": {"torch"},
    "torch": {"torch"},
    "triton": {"torch", "triton"},
    "npu": {"torch", "torch_npu"},
}


def part(module: str) -> str:
    """The file or folder right below the package that a dotted name lies in."""
    return module.split(".")[1] if "." in module else "__init__"


def rank(name: str) -> int:
    """Height of a part."""
    return next((height for height, layer in enumerate(LAYERS) if name in layer), len(LAYERS))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported together with the file) of every import.

    What type checkers alone import is none.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    late = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            for alias in node.names:
                # `from hf_kernel_patch import errors` names a part, `from x.errors import y` not
                whole = module == "hf_kernel_patch"
                yield f"{module}.{alias.name}" if whole else module, node not in late


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_part_imports_from_below_itself(path: Path) -> None:
    here = path.with_suffix("").parts[0]
    for module, _ in imports(path):
        if module.split(".")[0] != "hf_kernel_patch":
            continue
        there = part(module)
        below = rank(there) < rank(here) or rank(here) == len(LAYERS)
        assert there == here or below, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_frameworks_are_imported_by_ops_alone_or_at_first_use(path: Path) -> None:
    if path.parts[0] == "integrations":  # they are imported at their first use themselves
        return
    in_ops = path.parts[0] == "ops"
    folder = path.parts[2] if len(path.parts) > 3 else ""
    name = folder if folder in BACKENDS else path.stem.split("_")[0]
    for module, at_once in imports(path):
        package = module.split(".")[0]
        if package not in FRAMEWORKS:
            continue
        if in_ops:
            assert package in BACKENDS.get(name, {"torch"}), f"{path} imports {module}"
        assert not at_once or (in_ops and path.stem != "__init__"), (
            f"{path} imports {module} at once"
        )


def test_no_file_of_the_tests_imports_a_test_module() -> None:
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            parts = {
                part for name in names if name.startswith("tests.") for part in name.split(".")
            }
            found = sorted(part for part in parts if part.startswith("test_"))
            assert not found, f"{path.relative_to(tests)} imports {found}"


def test_the_top_holds_few_files() -> None:
    assert len([path for path in FILES if len(path.parts) == 1]) <= 10


def test_the_ledger_needs_the_standard_library_alone() -> None:
    roots = {module.split(".")[0] for module, _ in imports(Path("patching/ledger.py"))}
    assert roots <= set(sys.stdlib_module_names)


_NO_TABLES = ("__init__", "table", "families")


def test_tables_of_models_import_nothing_but_what_a_table_is() -> None:
    tables = [p for p in FILES if p.parts[0] == "models" and p.stem not in _NO_TABLES]
    assert len(tables) >= 13
    for path in tables:
        assert [module for module, _ in imports(path)] == ["hf_kernel_patch.models.table"]


#: One file, and what runs in every Python of a patched program, before the package is imported.
ENVIRONMENT = (
    Path("settings", "environment.py"),
    Path("cli", "autopatch", "sitecustomize.py"),
)


@pytest.mark.parametrize("path", [path for path in FILES if path not in ENVIRONMENT], ids=str)
def test_one_file_alone_reads_the_environment(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
    }
    assert not named & {"environ", "environb", "getenv", "getenvb"}


#: The environments of tox for newer versions of Python have no torch.
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="no kernel without torch")
LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize(
    ("program", "variables"),
    [
        pytest.param("import hf_kernel_patch", {}, id="importing"),
        pytest.param(
            "import hf_kernel_patch as h\n"
            "h.patch_transformers('torch_fused_rmsnorm', models='llama', backend='torch')\n"
            "assert [row.outcome for row in h.status()] == ['pending']\n"
            "h.unpatch()",
            {},
            id="patching-ahead",
            marks=needs_torch,
        ),
        pytest.param(
            "import hf_kernel_patch as h\n"
            "assert {row.op for row in h.status()} == {'rope'}\n"
            "assert {row.outcome for row in h.status()} == {'pending'}",
            {"HF_KERNEL_PATCH": "rope", "HF_KERNEL_PATCH_BACKEND": "torch"},
            id="patching-by-the-environment",
            marks=needs_torch,
        ),
        pytest.param(
            "import hf_kernel_patch as h\n"
            "h.patch_transformers('rope', backend='triton')\n"
            "assert not h.status().rows and 'DISABLE' in str(h.status())",
            {"HF_KERNEL_PATCH": "auto", "HF_KERNEL_PATCH_DISABLE": "1"},
            id="disabled",
        ),
    ],
)
def test_no_framework_is_imported_by(program: str, variables: dict[str, str]) -> None:
    done = run_python(f"import sys\n{program}\n{LOADED}", **variables)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "hf_kernel_patch" in loaded
    assert not loaded & FRAMEWORKS
