"""The reasons that reports give, as they stand in the code, with "…" for what differs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hf_kernel_patch

ROOT = Path(hf_kernel_patch.__file__).parent
#: What makes no rows, but commands, errors and values; the last holds a warning of transformers.
ELSEWHERE = {"cli", "models", "settings", "errors.py", "integrations", "bisecting.py"}
ELSEWHERE |= {"experts_decoding.py", "workload", "verifying", "benchmarking"}
#: Calls whose texts are errors and warnings of other kinds.
ERRORS = {"AttributeError", "IndexError", "KeyError", "RuntimeError", "TypeError", "ValueError"}
ERRORS |= {"ForeignPatchError", "KernelUnavailableError", "unknown", "warn"}
#: Texts of the code that read like a reason and are none: code, labels and parts of reports.
NONE = {
    "any architecture",
    "a finite number",
    "at most …",
    "hidden states",
    "from …",
    "kernel id",
    "kernel id or op",
    "measured now",
    "measured: … (…)",
    "measured: …… (…; ……)",
    "model name",
    "name in …",
    "self.num_experts + 1",
    "served by CUDA graphs",
    "served without CUDA graphs",
    "shape dtype device layout ndim is_cuda is_sparse _base",
    "nothing patched…",
    "… (by its own apply)",
    "… (now …)",
    "together …",
    "…, … threads",
    "… calls served",
    "… fallbacks (…)",
    "… if … else False",
    "… is not None",
    "… is not patched by …: …",
    "… modules of one model",
    "… of …",
    "… of at most … steps",
    "… or not (…)",
    "…; kernels: …",
}
#: Schemas of operators, code, and the rest of a sentence.
CODE = re.compile(r"->|\b(?:Tensor|bool|float|int) \w+[,=]|\bTensor \w+$|^[;(]")
WORD = re.compile(r"[(\[]?[\w'`.\-…/=]+[)\],;:.]*")


class _Texts(ast.NodeVisitor):
    """The strings of a file, without docstrings and without those of errors."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def _body(self, node: ast.Module | ast.FunctionDef | ast.ClassDef) -> None:
        for statement in node.body:
            alone = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not alone:
                self.visit(statement)

    visit_Module = visit_FunctionDef = visit_ClassDef = _body

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", getattr(node.func, "attr", "")) not in ERRORS:
            self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """What a failed assertion says is no reason."""

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
        self.found.append("".join(map(str, parts)))


def reads_like_a_reason(text: str) -> bool:
    """Two words or more, nearly all of them plain, with one of three letters among them."""
    words = text.split()
    plain = [word for word in words if WORD.fullmatch(word)]
    return (
        len(words) > 1
        and len(plain) >= 0.9 * len(words)
        and "\n" not in text
        and text == text.strip()
        and bool(re.search(r"\b[a-z]{2,}\b", text.replace("…", "")))
        and text not in NONE
        and not CODE.search(text)
    )


def reasons() -> Iterator[str]:
    """Every text of the package that may become the reason of a row or of a call."""
    for path in sorted(ROOT.rglob("*.py")):
        if ELSEWHERE.intersection(path.relative_to(ROOT).parts):
            continue
        texts = _Texts()
        texts.visit(ast.parse(path.read_text(encoding="utf-8")))
        yield from (text for text in texts.found if reads_like_a_reason(text))
