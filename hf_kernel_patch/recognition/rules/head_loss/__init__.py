"""A language model's head and its loss, while it trains: one op, without the full logits."""

from __future__ import annotations

import ast

from hf_kernel_patch.recognition.edits import end, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.head_loss.arguments import NAMES
from hf_kernel_patch.recognition.rules.head_loss.expressions import (
    argument,
    chain,
    head_call,
    is_name,
    own_calls,
    parameters,
)
from hf_kernel_patch.recognition.rules.head_loss.serving import serve
from hf_kernel_patch.recognition.rules.head_loss.uses import Uses
from hf_kernel_patch.recognition.rules.statements import assigned


def find(function: Function, helper: str) -> Found:
    """``logits = self.lm_head(x)``, steps that are known, ``self.loss_function(logits, ...)``.

    The head's call becomes ``helper.head(...)``, which may put off the logits. The steps between
    become ``helper.step(...)``, which notes them, ``helper.loss(...)`` computes the loss and
    ``helper.output(...)`` makes the output. Where a branch after the loss uses the logits,
    ``helper.now(...)`` computes them.
    """
    found = Found()
    losses = list(own_calls(function, "loss_function"))
    if not losses or not any(map(_of_tokens, losses)):
        return found
    if function.unfit is not None:
        found.miss(*function.unfit)
    elif len(losses) != 1:
        found.miss(losses[1], "the loss is computed twice")
    elif not isinstance(logits := argument(losses[0], 0, "logits"), ast.Name):
        found.miss(losses[0], "the loss takes something else than the name of the logits")
    elif (other := function.shared(logits.id)) is not None:
        found.miss(other, f"{logits.id} is no name of this function alone")
    else:
        _look(function, found, helper, losses[0], logits.id)
    return found


def _of_tokens(loss: ast.Call) -> bool:
    """Whether a loss is told the size of a vocabulary, as losses of labels or boxes are not."""
    size = argument(loss, 2, "vocab_size")
    if isinstance(size, ast.Name):
        return "size" in size.id
    if size is not None:
        return ast.unparse(size) not in ("self.config", "self.device")
    named = [keyword.arg for keyword in loss.keywords]
    return None in named and all(name is None or name in NAMES for name in named)


def _look(function: Function, found: Found, helper: str, loss: ast.Call, logits: str) -> None:
    """Edit the head of these logits, the steps between, the loss and the output."""

    def is_head(node: ast.expr) -> bool:
        return head_call(node) and not any(is_name(inner, logits) for inner in ast.walk(node))

    heads = []
    for block in function.blocks:
        for index, statement in enumerate(block):
            name, value = assigned(statement)
            if value is None or name != logits:
                continue
            if (found_head := chain(function, value, is_head)) is not None:
                heads.append((block, index, *found_head))
    if len(heads) != 1:
        found.miss(loss, _why_no_head(function, logits, len(heads)))
        return
    block, index, head, steps = heads[0]
    assert isinstance(head, ast.Call)
    if len(head.args) != 1 or head.keywords or isinstance(head.args[0], ast.Starred):
        found.miss(head, "the head takes more than the hidden states")
        return
    called = ast.unparse(head.func)
    same = [
        node
        for node in ast.walk(function.node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called
    ]
    if len(same) != 1:
        found.miss(same[1], "the head is used twice")
        return
    uses = Uses(function, helper, logits, loss)
    uses.head(block[index], head, steps, _labels(function, loss, head))
    rest = block[index + 1 :]
    while rest and not any(node is loss for node in ast.walk(rest[0])):
        if (other := uses.pass_over([rest.pop(0)])) is not None:
            found.miss(other, "between head and loss stands other code")
            return
    if not rest:
        found.miss(loss, "the loss does not follow the head")
        return
    if (other := uses.towards_loss(rest[0])) is not None:
        found.miss(other, "between head and loss stands other code")
        return
    output = _output(function, rest, logits)
    if output is None:
        found.miss(loss, f"{logits} are not returned in an output by name")
        return
    if not _makes_output(function, output):
        found.miss(output, f"{function.text(output.func)} is no class of outputs with logits")
        return
    uses.known |= {id(keyword.value) for keyword in output.keywords if keyword.arg == "logits"}
    if reason := uses.after_loss(rest):
        found.miss(*reason)
        return
    uses.pass_on(loss, "loss")
    uses.pass_on(output, "output")
    found.edits += uses.edits


def _why_no_head(function: Function, logits: str, count: int) -> str:
    for statement in function.statements:
        name, value = assigned(statement)
        match value:
            case ast.Subscript(value=ast.Name()) | ast.Attribute(value=ast.Name(), attr="logits"):
                if name == logits and not count:
                    return f"{logits} are what another model gives"
    return f"{logits} come from {count} heads in statements of their own"


def _labels(function: Function, loss: ast.Call, head: ast.Call) -> str:
    """The parameter that is None where no loss is computed; "True" where there is none."""
    known = parameters(function)
    known -= {
        name.id
        for node in ast.walk(function.node)
        if isinstance(node, ast.Delete)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    labels = argument(loss, 1, "labels")
    if isinstance(labels, ast.Name) and labels.id in known:
        return labels.id
    for node in ast.walk(function.node):
        match node:
            case ast.If(
                test=ast.Compare(
                    left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(None)]
                )
            ) if name in known and start(node) < start(loss) < end(node):
                if start(node) > end(head):
                    return name
    return "True"


def _output(function: Function, statements: list[ast.stmt], logits: str) -> ast.Call | None:
    """The call that makes the output, in the return at the end or in the statement before it."""
    last = statements[-1]
    if not isinstance(last, ast.Return):
        return None
    value = last.value
    if isinstance(value, ast.Name) and len(statements) > 1:
        returned = value.id
        name, value = assigned(statements[-2])
        if name != returned:
            return None
    if not isinstance(value, ast.Call) or value.args or not isinstance(value.func, ast.Name):
        return None
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    return value if is_name(given.get("logits"), logits) else None


def _makes_output(function: Function, call: ast.Call) -> bool:
    """Whether what makes the output is a class of outputs, by its name in the module."""
    assert isinstance(call.func, ast.Name)
    name = call.func.id
    cls = function.value.__globals__.get(name)
    fields = getattr(cls, "__dataclass_fields__", {})
    return isinstance(cls, type) and "logits" in fields and not function.stores(name)


register(
    Rule(
        "head_loss",
        "linear_cross_entropy",
        find,
        serve,
        "fused_loss",
        names="^loss_function$",
        usual=r"\w*For(?:CausalLM|ConditionalGeneration)\.forward\(.*\blabels\b.*\): "
        r".*\b(?:loss_function|CrossEntropyLoss|cross_entropy)\b",
    )
)
