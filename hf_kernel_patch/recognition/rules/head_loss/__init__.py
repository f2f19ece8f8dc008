"""A language model's head and its loss, while it trains: one op, without the full logits."""

from __future__ import annotations

import ast
from typing import Any

from hf_kernel_patch.recognition.edits import Edit, end, insert, replace, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.head_loss.serving import serve
from hf_kernel_patch.recognition.rules.residual_norm import assigned, target_of


def find(function: Function, helper: str) -> Found:
    """``logits = self.lm_head(x)``, steps that are known, ``self.loss_function(logits, ...)``.

    The head's call becomes ``helper.head(...)``, which may put off the logits; the steps between
    are then left out, ``helper.loss(...)`` computes the loss and ``helper.output(...)`` the output.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    calls = [n for n in ast.walk(function.node) if _is_own(n, "loss_function")]
    if len(calls) != 1:
        if calls:
            found.miss(calls[1], "the loss is computed twice")
        return found
    loss: Any = calls[0]
    logits, labels = (_argument(loss, place, name) for place, name in enumerate(_ARGUMENTS))
    if not isinstance(logits, ast.Name) or not isinstance(labels, ast.Name):
        found.miss(loss, "the loss takes something else than the names of logits and labels")
        return found
    if len(function.stores(labels.id)) != 1 or labels.id not in _parameters(function):
        found.miss(loss, f"{labels.id} is not just what the caller gave")
        return found
    _look(function, found, helper, loss, logits.id, labels.id)
    return found


_ARGUMENTS = ("logits", "labels")


def _look(
    function: Function, found: Found, helper: str, loss: ast.Call, logits: str, labels: str
) -> None:
    """The head of these logits, what is done to them, and where they go."""
    heads = [
        (block, place)
        for block in function.blocks
        for place, statement in enumerate(block)
        if assigned(statement)[0] == logits and _is_own(assigned(statement)[1], "")
    ]
    if len(heads) != 1:
        found.miss(loss, f"{logits} come from {len(heads)} heads in statements of their own")
        return
    if (other := function.shared(logits)) is not None:
        found.miss(other, f"{logits} is no name of this function alone")
        return
    block, place = heads[0]
    head: Any = assigned(block[place])[1]
    if len(head.args) != 1 or head.keywords or isinstance(head.args[0], ast.Starred):
        found.miss(head, "the head takes more than the hidden states")
        return
    uses = [n for n in ast.walk(function.node) if _is_own(n, head.func.attr)]
    if len(uses) != 1:
        found.miss(uses[1], "the head is used twice")
        return
    between: list[tuple[str, ast.expr]] = []
    edits = []
    known = {id(n) for n in ast.walk(loss) if _is_name(n, logits)}
    rest = block[place + 1 :]
    while rest and not any(n is loss for n in ast.walk(rest[0])):
        statement = rest.pop(0)
        if _is_plain(statement) and not any(_is_name(n, logits) for n in ast.walk(statement)):
            continue
        step = _step(statement, logits)
        if step is None or ("cap" in dict(between)):
            found.miss(statement, "between head and loss stands other code")
            return
        between.append(step)
        known |= {id(n) for n in ast.walk(statement) if _is_name(n, logits)}
        waits = f"{helper}.waits({logits})"
        if isinstance(statement, ast.If):
            edits.append(insert(start(statement.test), f"not {waits} and "))
        else:
            edits.append(insert(start(assigned(statement)[1]), f"{logits} if {waits} else "))
    if not rest:
        found.miss(loss, "the loss does not follow the head")
        return
    if (other := _before(rest[0], loss)) is not None:
        found.miss(other, "between head and loss stands other code")
        return
    output = _output(rest, logits)
    if output is None:
        found.miss(loss, f"{logits} are not returned in an output by name")
        return
    if not _makes_output(function, output):
        found.miss(output, f"{function.text(output.func)} is no class of outputs with logits")
        return
    known |= {id(k.value) for k in output.keywords if k.arg == "logits"}
    known.add(id(target_of(block[place])))
    for node in ast.walk(function.node):
        if _is_name(node, logits) and id(node) not in known:
            found.miss(node, f"{logits} are used again")
            return
    for node in [n for statement in rest[1:] for n in ast.walk(statement)]:
        if changes(node) and not isinstance(node, ast.AugAssign):
            found.miss(node, "a value is changed before the output is made")
            return
    steps = "".join(f"({kind!r}, {function.text(value)}), " for kind, value in between)
    last = f", {labels}, ({steps.rstrip()})" if steps else f", {labels}"
    parts = [f"{helper}.head(self, ", head.func, ", ", head.args[0], f"{last})"]
    found.edits += [*edits, *replace(function, head, *parts)]
    found.edits += _passed_on(function, loss, f"{helper}.loss")
    found.edits += _passed_on(function, output, f"{helper}.output")


def _is_plain(statement: ast.stmt) -> bool:
    """Whether a statement only gives names values that are there already, as ``loss = None``.

    The logits may then be computed after it.
    """
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        nodes = list(ast.walk(statement))
        return not any(isinstance(node, ast.Call) or changes(node) for node in nodes)
    return isinstance(statement, ast.Pass)


def _before(statement: ast.stmt, loss: ast.Call) -> ast.AST | None:
    """What stands in a statement that holds the loss and runs before it, or runs it again."""
    if isinstance(statement, ast.If):
        if any(isinstance(n, ast.Call) for n in ast.walk(statement.test)):
            return statement.test
        for one in [*statement.body, *statement.orelse]:
            if any(n is loss for n in ast.walk(one)):
                return _before(one, loss)
            if not _is_plain(one):
                return one
    inner = ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    simple = ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr
    if not isinstance(statement, simple):
        return statement
    return next((node for node in ast.walk(statement) if isinstance(node, inner)), None)


def _makes_output(function: Function, call: ast.Call) -> bool:
    """Whether what makes the output is a class of the module's, as transformers has them."""
    name = call.func.id  # type: ignore[attr-defined]
    kind = function.value.__globals__.get(name)
    fields = getattr(kind, "__dataclass_fields__", {})
    return isinstance(kind, type) and "logits" in fields and not function.stores(name)


def _passed_on(function: Function, call: ast.Call, helper: str) -> list[Edit]:
    """``f(...)`` becomes ``helper(self, f, ...)``."""
    row, column = end(call.func)
    first = min(start(one) for one in (*call.args, *call.keywords))
    # The parenthesis of the call; before it may stand what closes one around the function.
    before = function.between((row, column), first).partition("(")[0]
    rest = before.rpartition("\n")[2]
    place = row + before.count("\n"), len(rest.encode()) + (0 if "\n" in before else column)
    return [insert(start(call), f"{helper}(self, "), Edit(place, (place[0], place[1] + 1), ", ")]


def _step(statement: ast.stmt, logits: str) -> tuple[str, ast.expr] | None:
    """What a statement does to the logits: ("/" or "*" or "cap", by what), or None if unknown."""
    if isinstance(statement, ast.If):
        return _cap(statement, logits)
    name, value = assigned(statement)
    if name != logits:
        return None
    if (
        isinstance(value, ast.BinOp)
        and isinstance(value.op, (ast.Mult, ast.Div))
        and _is_name(value.left, logits)
        and _is_constant(value.right)
    ):
        return "/" if isinstance(value.op, ast.Div) else "*", value.right
    return None


def _cap(statement: ast.If, logits: str) -> tuple[str, ast.expr] | None:
    """``if cap is not None:`` divide by it, tanh, multiply by it."""
    match statement.test:
        case ast.Compare(left=cap, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            pass
        case _:
            return None
    text = ast.unparse(cap)
    wanted = [
        f"{logits} = {logits} / {text}",
        f"{logits} = torch.tanh({logits})",
        f"{logits} = {logits} * {text}",
    ]
    same = [ast.unparse(one) for one in statement.body] == wanted and not statement.orelse
    return ("cap", cap) if same and _is_constant(cap) else None


def _is_constant(node: ast.expr) -> bool:
    """Whether an expression is a number, or an attribute of ``self``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Constant) or _is_name(node, "self")


def _output(statements: list[ast.stmt], logits: str) -> ast.Call | None:
    """The call that makes the output, in the one return after the loss."""
    returns = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.Return)]
    if len(returns) != 1 or returns[0] is not statements[-1]:
        return None
    call = returns[0].value
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        return None
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return call if _is_name(given.get("logits"), logits) else None


def _argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    if len(call.args) > place:
        return call.args[place]
    return next((k.value for k in call.keywords if k.arg == name), None)


def _is_own(node: Any, method: str) -> bool:
    """Whether a node is a call ``self.method(...)``, of any method where none is named."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return _is_name(node.func.value, "self") and method in ("", node.func.attr)


def _is_name(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _parameters(function: Function) -> set[str]:
    given = function.node.args
    return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


register(Rule("head_loss", "linear_cross_entropy", find, serve, "fused_loss"))
