"""Decoding a token: the whole forward of a language model, captured once and replayed.

One token is bound by the host, which launches some ten kernels a layer. Here the model's own
forward, as it is patched, runs once on a cache that writes to memory of ours and on attention that
reads the cache's length from the device. What it launches is captured in a graph, which then serves
every later token.

``call.py`` reads what a forward is given, ``memory.py`` is where keys and values live,
``attention.py`` what stands in for cache, masks and attention while a token is captured,
``parts.py`` what has to stay as it is for a graph to be valid, ``replay.py`` puts them together.
"""

from __future__ import annotations

import ast
import tokenize

from hf_kernel_patch.recognition.edits import Edit, insert, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.decoding.call import CACHE_NAMES, body_of, parameters_of
from hf_kernel_patch.recognition.rules.decoding.replay import serve
from hf_kernel_patch.recognition.rules.statements import free_local


def find(function: Function, helper: str) -> Found:
    """A language model's forward, from tokens and a cache to logits.

    ``if (decoded := helper(self, input_ids, ...)) is not None: return decoded`` comes first, on a
    line of its own, for which two lines of the parameters become one, so that no line moves.
    """
    found = Found()
    names = parameters_of(function)
    if "input_ids" not in names or not CACHE_NAMES.intersection(names):
        return found
    if not any(_makes_logits(node) for node in function.nodes):
        return found
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    room = _room(function)
    if room is None:
        found.miss(function.node, "its parameters stand on one line")
        return found
    result = free_local(function, "decoded")
    first = body_of(function)[0]
    call = f"({result} := {helper}({', '.join(names)})) is not None"
    line = f"if {call}: return {result}\n{' ' * first.col_offset}"
    found.edits += [room, insert(start(first), line)]
    return found


def _makes_logits(node: ast.AST) -> bool:
    """Whether this makes an output with logits."""
    return isinstance(node, ast.Call) and any(one.arg == "logits" for one in node.keywords)


def _room(function: Function) -> Edit | None:
    """The edit that makes two lines of the parameters one, or None where they stand on one."""
    first = function.node.lineno
    lines = iter(function.lines[first - 1 : function.node.body[0].lineno - 1])
    tokens: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.NEWLINE:
            break
        tokens.append(token)

    def position(token: tokenize.TokenInfo) -> tuple[int, int]:
        """The (line, column in bytes) of a token in the file."""
        line, column = first + token.start[0] - 1, token.start[1]
        return line, len(function.lines[line - 1][:column].encode())

    between_lines = {tokenize.NL, tokenize.COMMENT}
    for before, line_end, after in reversed(list(zip(tokens, tokens[1:], tokens[2:]))):
        if line_end.type == tokenize.NL and not {before.type, after.type} & between_lines:
            return Edit(position(line_end), position(after), " ")
    return None


register(
    Rule(
        "decoding",
        "decode_attention",
        find,
        serve,
        "decode",
        names="^(lm_head|embed_out|output_projection)$",
        usual=r"\w*For(?:CausalLM|ConditionalGeneration)\.forward\(self, input_ids\b.*"
        r"\b(?:past_key_values|cache)\b.*\): .*\blm_head\b",
    )
)
