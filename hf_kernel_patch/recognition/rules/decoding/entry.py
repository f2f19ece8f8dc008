"""The statement at the start of a decoder layer's forward that decodes a token by graphs."""

from __future__ import annotations

import tokenize

from hf_kernel_patch.recognition.edits import Edit, insert, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import free_name
from hf_kernel_patch.recognition.rules.decoding.layers import GRAPHS, Decode, decoder
from hf_kernel_patch.recognition.segments import body_of, parameters_of
from hf_kernel_patch.recognition.site import Site


def entry(function: Function, site: Site) -> tuple[list[Edit], dict[str, Decode]]:
    """The edits of a layer's forward and the function that they call, if the device has graphs.

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

    def position(token: tokenize.TokenInfo) -> tuple[int, int]:
        """The (line, column in bytes) of a token in the file."""
        line, column = first + token.start[0] - 1, token.start[1]
        return line, len(function.lines[line - 1][:column].encode())

    between_lines = {tokenize.NL, tokenize.COMMENT}
    for before, line_end, after in reversed(list(zip(tokens, tokens[1:], tokens[2:]))):
        if line_end.type == tokenize.NL and not {before.type, after.type} & between_lines:
            return Edit(position(line_end), position(after), " ")
    return None
