"""How a decoder layer's forward asks for a decoded token before anything else."""

from __future__ import annotations

import tokenize
from typing import Any

from hf_kernel_patch.recognition.edits import Edit, insert, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import free_name
from hf_kernel_patch.recognition.rules.decoding.layers import GRAPHS, decoder
from hf_kernel_patch.recognition.segments import body_of, parameters_of
from hf_kernel_patch.recognition.site import Site


def entry(function: Function, site: Site) -> tuple[list[Edit], dict[str, Any]]:
    """What a layer's forward does before anything else where its kernel's device has graphs.

    ``if (decoded := decode(self, hidden_states, ...)) is not None: return decoded``, on a line of
    its own, for which two lines of the parameters become one, so that no line moves.
    """
    room = _room(function) if site.kernel.device in GRAPHS else None
    if room is None:
        return [], {}
    name, result = free_name(function, "decode"), free_name(function, "decoded")
    arguments = ", ".join(parameters_of(function))
    first = body_of(function)[0]
    call = f"({result} := {name}({arguments})) is not None"
    line = f"if {call}: return {result}\n{' ' * first.col_offset}"
    return [room, insert(start(first), line)], {name: decoder(site, name)}


def _room(function: Function) -> Edit | None:
    """The edit that makes two lines of the parameters one, or None where they stand on one."""
    first = function.node.lineno
    lines = iter(function.lines[first - 1 : function.node.body[0].lineno - 1])
    tokens: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.NEWLINE:
            break
        tokens.append(token)
    quiet = tokenize.NL, tokenize.COMMENT
    for before, line_end, after in reversed(list(zip(tokens, tokens[1:], tokens[2:]))):
        if line_end.type == tokenize.NL and not {before.type, after.type} & {*quiet}:
            places = [
                (first + row - 1, len(line[:column].encode()))
                for token in (line_end, after)
                for row, column in [token.start]
                for line in [function.lines[first + row - 2]]
            ]
            return Edit(places[0], places[1], " ")
    return None
