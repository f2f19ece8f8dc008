"""Where a function uses its logits, and how each use is edited."""

from __future__ import annotations

import ast
import copy

from hf_kernel_patch.recognition.edits import Edit, Part, end, insert, replace, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.rules.head_loss.expressions import META, chain, is_name, is_quiet
from hf_kernel_patch.recognition.rules.statements import assigned, target_of


class Uses:
    """The uses of some logits between their head and the end of a function.

    ``known`` holds the ids of the names whose use the rule allows, ``edits`` how the text changes.
    """

    def __init__(self, function: Function, helper: str, logits: str, loss: ast.Call):
        self.function, self.helper, self.logits, self.loss = function, helper, logits, loss
        self.edits: list[Edit] = []
        self.known: set[int] = set()
        self.parents = {
            id(child): node
            for node in ast.walk(function.node)
            for child in ast.iter_child_nodes(node)
        }

    def head(self, statement: ast.stmt, head: ast.Call, steps: list[str], labels: str) -> None:
        """The head's statement, and what it does to the logits at once."""
        self.known.add(id(target_of(statement)))
        _, value = assigned(statement)
        assert value is not None
        before, after = "", ""
        if steps:
            before, after = f"{self._steps(steps)} if {self.helper}.waits({self.logits} := ", ")"
            after += f" else {_without(value, head, self.logits)}"
        call = f"{before}{self.helper}.head(self, "
        parts: list[Part] = [call, head.func, ", ", head.args[0], f", {labels}){after}"]
        self.edits += replace(self.function, value, *parts)

    def _steps(self, steps: list[str]) -> str:
        return f"{self.helper}.step({self.logits}, {', '.join(steps)})"

    def pass_over(self, statements: list[ast.stmt]) -> ast.AST | None:
        """The first of the statements before the loss that needs the logits computed, or None."""
        for statement in statements:
            name, value = assigned(statement)
            if value is not None and name == self.logits:
                step = chain(self.function, value, lambda node: is_name(node, self.logits))
                if step is None:
                    return statement
                self.known |= {id(step[0]), id(target_of(statement))}
                text = f"{self._steps(step[1])} if {self.helper}.waits({self.logits}) else "
                self.edits.append(insert(start(value), text if step[1] else ""))
            elif isinstance(statement, ast.If):
                if not self._passes(statement.test):
                    return statement
                other = self.pass_over(statement.body) or self.pass_over(statement.orelse)
                if other is not None:
                    return other
            elif not isinstance(statement, _PLAIN) or not self._passes(statement):
                return statement
        return None

    def towards_loss(self, statement: ast.stmt) -> ast.AST | None:
        """What runs before the loss in its own statement and is not known to the rule, or None."""
        if isinstance(statement, ast.If):
            if not self._passes(statement.test):
                return statement.test
            for block in (statement.body, statement.orelse):
                for index, inner in enumerate(block):
                    if any(node is self.loss for node in ast.walk(inner)):
                        return self.pass_over(block[:index]) or self.towards_loss(inner)
        if not isinstance(statement, (*_PLAIN, ast.AugAssign)):
            return statement
        for node in ast.walk(statement):
            if isinstance(node, _SCOPES):
                return node
            around = any(inner is self.loss for inner in ast.walk(node))
            before = isinstance(node, ast.Call) and not around and start(node) < end(self.loss)
            if before and not is_quiet(self.function, node):
                return node
        first = self.loss.args[0] if self.loss.args else None
        given = [keyword.value for keyword in self.loss.keywords if keyword.arg == "logits"]
        self.known |= {id(value) for value in (first, *given) if is_name(value, self.logits)}
        self._note_meta(self.loss)
        return None

    def after_loss(self, rest: list[ast.stmt]) -> tuple[ast.AST, str] | None:
        """(where, why) the logits cannot be computed after all that follows the loss, or None."""
        after = end(self.loss)
        everywhere = {id(node) for node in self.function.nodes}
        for node in ast.walk(self.function.node):
            if not is_name(node, self.logits) or id(node) in self.known or self._is_meta(node):
                continue
            fit = isinstance(node.ctx, ast.Load) and id(node) in everywhere
            if not fit or start(node) < after or not self._apart(node):
                return node, f"{self.logits} are used again"
            self.edits += [insert(start(node), f"{self.helper}.now("), insert(end(node), ")")]
        for node in [inner for statement in rest for inner in ast.walk(statement)]:
            if isinstance(node, ast.AugAssign):
                if not self._is_loss(node):
                    return node, "a value is changed before the output is made"
            elif changes(node) and start(node) > after:
                return node, "a value is changed before the output is made"
            elif isinstance(node, ast.Return) and node is not rest[-1] and not self._apart(node):
                return node, "there is another return"
        return None

    def pass_on(self, call: ast.Call, method: str) -> None:
        """``f(...)`` becomes ``helper.method(self, f)(...)``."""
        text = f"{self.helper}.{method}(self, "
        self.edits += [insert(start(call.func), text), insert(end(call.func), ")")]

    def _passes(self, node: ast.AST) -> bool:
        """Whether a part changes nothing and uses only what is known of logits that wait."""
        names = [inner for inner in ast.walk(node) if is_name(inner, self.logits)]
        if not all(map(self._is_meta, names)):
            return False
        return is_quiet(self.function, node)

    def _note_meta(self, node: ast.AST) -> None:
        self.known |= {
            id(inner)
            for inner in ast.walk(node)
            if is_name(inner, self.logits) and self._is_meta(inner)
        }

    def _is_meta(self, name: ast.AST) -> bool:
        around = self.parents.get(id(name))
        return (
            isinstance(around, ast.Attribute)
            and around.attr in META
            and isinstance(around.ctx, ast.Load)
        )

    def _apart(self, node: ast.AST) -> bool:
        """Whether a node is in a branch that does not hold the loss."""
        below, around = node, self.parents.get(id(node))
        while around is not None and around is not self.function.node:
            if any(inner is self.loss for inner in ast.walk(around)):
                return False
            if isinstance(around, ast.If) and below is not around.test:
                return True
            below, around = around, self.parents.get(id(around))
        return False

    def _is_loss(self, node: ast.AugAssign) -> bool:
        """Whether it changes the name that the loss was given."""
        holder: ast.AST = self.loss
        while not isinstance(holder, ast.stmt):
            holder = self.parents[id(holder)]
        return holder is node or is_name(node.target, assigned(holder)[0])


_PLAIN = ast.Assign, ast.AnnAssign, ast.Expr, ast.Pass
_SCOPES = ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def _without(value: ast.expr, head: ast.Call, logits: str) -> str:
    """The source of an expression with a name where it calls the head."""

    class Named(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if (start(node), end(node)) == (start(head), end(head)):
                return ast.Name(logits, ast.Load())
            return self.generic_visit(node)

    return ast.unparse(Named().visit(copy.deepcopy(value)))
