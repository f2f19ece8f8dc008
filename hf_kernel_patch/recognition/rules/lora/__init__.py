"""A linear layer with adapters of PEFT: its product, and the low-rank products that are added.

``layers.py`` reads what such a layer is at a call, ``serving.py`` runs it.
"""

from __future__ import annotations

import ast
import copy
import textwrap

from hf_kernel_patch.recognition.edits import Edit
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.lora.serving import serve
from hf_kernel_patch.recognition.source import canonical

#: What a layer runs where adapters are active and not merged, but for what ``lora_variant`` has.
_LINEAR = """
result = self.base_layer(x, *args, **kwargs)
dtype = result.dtype
names = self.lora_A.keys()
for adapter in self.active_adapters:
    if adapter not in names:
        continue
    lora_A = self.lora_A[adapter]
    lora_B = self.lora_B[adapter]
    dropout = self.lora_dropout[adapter]
    scaling = self.scaling[adapter]
    x = self._cast_input_dtype(x, lora_A.weight.dtype)
    if adapter not in self.lora_variant:
        result = result + lora_B(lora_A(dropout(x))) * scaling
result = result.to(dtype)
"""
#: Of layers with quantised weights, by bitsandbytes.
_QUANTISED = """
for adapter in self.active_adapters:
    if adapter not in self.lora_A.keys():
        continue
    lora_A = self.lora_A[adapter]
    lora_B = self.lora_B[adapter]
    dropout = self.lora_dropout[adapter]
    scaling = self.scaling[adapter]
    converts = not torch.is_autocast_enabled()
    if converts:
        dtype = result.dtype
        x = self._cast_input_dtype(x, lora_A.weight.dtype)
    if adapter not in self.lora_variant:
        output = lora_B(lora_A(dropout(x))) * scaling
        if converts:
            output = output.to(dtype)
        result = result + output
"""
_CALL = "\nresult = self.base_layer(x, *args, **kwargs)"
_KNOWN = _LINEAR, _CALL + _QUANTISED, f"{_CALL}\nresult = result.clone(){_QUANTISED}"


def find(function: Function, helper: str) -> Found:
    """The branch of a forward where adapters are active.

    ``else:`` before it becomes ``elif (result := helper(self, x, args, kwargs)) is None:``.
    """
    found = Found()
    branches = [
        node.orelse
        for node in function.nodes
        if isinstance(node, ast.If) and any(_is_loop(one) for one in node.orelse)
    ]
    for branch in branches:
        if function.unfit is not None:
            found.miss(*function.unfit)
            continue
        line = _else_before(function, branch[0])
        names = _names(branch[0])
        if names is None or line is None:
            found.miss(branch[0], "the branch does not begin with the layer's own product")
        elif _canonical(branch, names) not in {_canonical_of(text) for text in _KNOWN}:
            found.miss(branch[0], "the branch with adapters has other code than is known")
        else:
            result, *given = names
            text = f"elif ({result} := {helper}(self, {', '.join(given)})) is None:"
            column = function.lines[line - 1].index("else:")
            found.edits.append(Edit((line, column), (line, column + len("else:")), text))
    return found


def _is_loop(node: ast.AST) -> bool:
    """Whether this goes through the adapters that are active."""
    return isinstance(node, ast.For) and ast.unparse(node.iter) == "self.active_adapters"


def _else_before(function: Function, first: ast.stmt) -> int | None:
    """The line of the ``else:`` whose first statement this is."""
    for line in range(first.lineno - 1, function.node.lineno, -1):
        text = function.lines[line - 1].partition("#")[0].strip()
        if text:
            return line if text == "else:" else None
    return None


def _names(first: ast.stmt) -> tuple[str, str, str, str] | None:
    """The names of these four in ``result = self.base_layer(x, *args, **kwargs)``."""
    match first:
        case ast.Assign(
            targets=[ast.Name(id=result)],
            value=ast.Call(
                args=[ast.Name(id=x), ast.Starred(value=ast.Name(id=args))],
                keywords=[ast.keyword(arg=None, value=ast.Name(id=kwargs))],
            ),
        ):
            return result, x, args, kwargs
    return None


def _canonical(branch: list[ast.stmt], names: tuple[str, str, str, str]) -> str:
    """The branch without what it does for other kinds of adapters, by names of ours."""
    ours = dict(zip(names[1:], ("x", "args", "kwargs"), strict=True))
    statements = copy.deepcopy(branch)
    for node in [one for statement in statements for one in ast.walk(statement)]:
        if isinstance(node, ast.Name):
            node.id = ours.get(node.id, node.id)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("self.lora_variant"):
            node.orelse = []
    return _canonical_of("\n".join(ast.unparse(one) for one in statements))


def _canonical_of(text: str) -> str:
    head = "def branch(self, x, *args, **kwargs):\n"
    return canonical(head + textwrap.indent(text.strip(), "    "))


register(
    Rule(
        "lora",
        "lora",
        find,
        serve,
        "lora",
        names="^lora_A$",
        usual=r"\w*Lora\w*\.forward\(self, x\b|Linear\w*\.forward\(self, x\b.*\blora_A\b",
    )
)
