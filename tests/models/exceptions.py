"""What the tiny models of some architectures do not run."""

from __future__ import annotations

#: Models without a dense MLP, unless their config asks for some.
UNUSED = {name: ["swiglu"] for name in ("mixtral", "qwen3_moe", "qwen3_vl_moe")}
NOT_IN_FLOAT64 = ("deepseek_v3", "glm4_moe")
