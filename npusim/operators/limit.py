"""What the operators' documents do not allow, as errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Refused(RuntimeError):
    """A call that the hardware would refuse, or compute wrongly, by the operator's documents."""

    def __init__(self, limit: Limit) -> None:
        page = limit.page or f"torch_npu.{limit.operator}.__doc__"
        super().__init__(f'{limit.operator}: {limit.rule} ({page}: "{limit.says}")')
        self.limit = limit


@dataclass(frozen=True)
class Limit:
    """One documented limit of an operator: our words, and what the document says.

    ``page`` names a page of CANN's operator reference; without one, ``says`` is in the docstring
    that the wheel gives ``torch_npu.<operator>``.
    """

    operator: str
    rule: str
    says: str
    page: str | None = None

    def require(self, holds: bool) -> None:
        """Raises Refused unless the call keeps to the limit."""
        if not holds:
            raise Refused(self)


def limits_of(module: object) -> list[Limit]:
    """The limits that a module defines, in order."""
    return [value for value in vars(module).values() if isinstance(value, Limit)]
