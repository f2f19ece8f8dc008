"""The demo's own models, and less of everything that takes time."""

from __future__ import annotations

from dataclasses import replace

from hf_kernel_patch.cli.demo import models, worker

TEXT = b"".join(b"line %d of a text that repeats itself\n" % i for i in range(200))
SHORT = replace(models.SMALL, batch=2, length=32, loss_tokens=64)
#: A run as it is, of two short steps.
PLAN = worker.Plan("llama", SHORT, TEXT, 2, 0, "cpu", "float32", None)
