"""What counts as the same code, and that anything else is left alone with a reason."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import locate
from hf_kernel_patch.recognition import Rule, known
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost
from tests.support.tiny import ROWS, TRANSFORMERS_5, modelling

PLAIN = "def f(self, x, n=1):\n    y = self.scale * x\n    return g(y, n)\n"
SAME = {
    "the function's name": PLAIN.replace("def f", "def forward"),
    "a docstring": PLAIN.replace("n=1):\n", 'n=1):\n    """Text."""\n'),
    "comments and blank lines": PLAIN.replace("\n    return", "  # why\n\n    # so\n    return"),
    "indentation": "".join(f"        {line}\n" for line in PLAIN.splitlines()),
    "annotations": PLAIN.replace("x, n=1)", 'x: "T", n: int = 1) -> tuple[int]'),
    "an annotated assignment": PLAIN.replace("y =", "y: float ="),
    "decorators": f"@other\n@more(1)\n{PLAIN}",
    "the names of locals": PLAIN.replace("y", "z"),
    "parentheses and line breaks": PLAIN.replace(
        "self.scale * x", "(\n    (self.scale) * x\n    )"
    ),
}
OTHER = {
    "the name of a parameter": PLAIN.replace("n=1", "k=1").replace("(y, n)", "(y, k)"),
    "the order of parameters": PLAIN.replace("self, x", "x, self"),
    "a default": PLAIN.replace("n=1", "n=2"),
    "a parameter more": PLAIN.replace("n=1", "n=1, **kwargs"),
    "a keyword-only parameter": PLAIN.replace("x, n", "x, *, n"),
    "a function that is called": PLAIN.replace("g(", "h("),
    "an attribute": PLAIN.replace("self.scale", "self.weight"),
    "an operator": PLAIN.replace("*", "+"),
    "the order of operands": PLAIN.replace("self.scale * x", "x * self.scale"),
    "which local is used": PLAIN.replace("g(y, n)", "g(x, n)"),
    "a statement more": PLAIN.replace("return", "y = y + 1\n    return"),
    "a parameter written over": PLAIN.replace("y", "x"),
    "a local that hides a global": PLAIN.replace("return", "g = 2\n    return"),
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_the_same_code_whatever(source: str) -> None:
    assert canonical(source) == canonical(PLAIN)


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER)
def test_other_code_by(source: str) -> None:
    assert canonical(source) != canonical(PLAIN)


def test_two_locals_are_told_apart() -> None:
    sources = [f"def f(x):\n    a = x + 1\n    b = x + 2\n    return {name}\n" for name in "ab"]
    assert canonical(sources[0]) != canonical(sources[1])


@pytest.mark.parametrize(
    "source", ["x = 1\n", "class A:\n    pass\n", "async def f():\n    pass\n"]
)
def test_only_one_function_has_a_canonical_source(source: str) -> None:
    with pytest.raises(ValueError, match="not the source of one function"):
        canonical(source)


def test_a_function_without_source_has_no_fingerprint() -> None:
    scope: dict[str, Any] = {}
    exec(PLAIN, scope)
    assert fingerprint(scope["f"]) is None


def test_wrappers_of_transformers_are_looked_through_and_others_are_not() -> None:
    def wrapped_by_us(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    forward = modelling("llama").LlamaForCausalLM.forward
    inner = innermost(forward)
    assert fingerprint(inner) is not None
    assert not hasattr(inner, "__wrapped__")
    assert inner.__code__.co_filename.endswith("modeling_llama.py")
    wrapper = functools.wraps(forward)(wrapped_by_us)
    assert innermost(wrapper) is wrapper


def test_a_wrapper_is_not_taken_for_what_it_wraps() -> None:
    function = modelling("llama").rotate_half
    assert fingerprint(foreign(function)) not in (None, fingerprint(function))


# -- drift: the installed transformers against the tables


TARGETS = [pytest.param(spec, id=f"{name}-{spec.qualname}") for name, spec in ROWS]


@pytest.mark.parametrize("spec", TARGETS)
def test_the_installed_code_is_what_the_table_expects(spec: Any) -> None:
    importlib.import_module(spec.module)
    owner, _, value = locate(spec)
    assert known()[spec.code].why_not(value, owner) is None


@pytest.mark.parametrize("spec", TARGETS)
def test_the_installed_code_is_no_other_leaf_of_the_same_op(spec: Any) -> None:
    importlib.import_module(spec.module)
    owner, _, value = locate(spec)
    op = known()[spec.code].op
    fitting = [
        code.name for code in known().values() if code.op == op and not code.why_not(value, owner)
    ]
    assert fitting == [spec.code]


CODE = set(known())  # before any test registers one


def test_every_rule_is_in_some_table() -> None:
    """Leaves may be of other families: test_leaf_texts.py says where each of their texts is."""
    used = {spec.code for table in architectures().values() for spec in table.sites}
    of_peft = {"lora"}
    assert used | of_peft >= {name for name in CODE if isinstance(known()[name], Rule)}


# -- refusal: other code under the same name


def refused(table: Architecture, op: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason why a table's only row is skipped; it is left as it was, and strict raises."""
    monkeypatch.setitem(architectures(), table.name, table)
    spec = next(one for one in table.sites if known()[one.code].op == op)
    importlib.import_module(table.module)
    before = locate(spec)[2]
    with (
        pytest.warns(KernelPatchWarning, match="is not patched by") as caught,
        hf_kernel_patch.patched(op, models=table.name) as report,
    ):
        assert locate(spec)[2] is before
        (row,) = report
    assert row.outcome == "skipped"
    assert row.reason in str(caught[0].message)
    with pytest.raises(KernelPatchError) as error:
        hf_kernel_patch.patch_transformers(op, models=table.name, strict=True)
    assert row.reason in str(error.value)
    assert locate(spec)[2] is before
    return row.reason


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4.57 has no NanoChat")
@pytest.mark.parametrize("name", ["nanochat", "blt"])
def test_the_rotary_function_over_another_rotate_half_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Architecture(name, {"apply_rotary_pos_emb": "rope.full"})
    module = importlib.import_module(table.module)
    same = fingerprint(innermost(module.apply_rotary_pos_emb))
    assert same == fingerprint(innermost(modelling("llama").apply_rotary_pos_emb))
    assert "rotate_half in" in refused(table, "rope", monkeypatch)


#: leaf or rule -> (architecture, qualified name, code there, other code in its place).
CHANGES = {
    "rms_norm.llama": (
        "llama",
        "LlamaRMSNorm.forward",
        "self.weight * hidden_states.to(input_dtype)",
        "(self.weight * hidden_states).to(input_dtype)",
    ),
    "rms_norm.gemma": (
        "gemma",
        "GemmaRMSNorm.forward",
        "keepdim=True) + self.eps",
        "keepdim=True)",
    ),
    "rope.full": ("llama", "apply_rotary_pos_emb", "(q * cos) + (rot", "(q * cos) - (rot"),
    "rope.cast": ("olmo2", "apply_rotary_pos_emb", "q_embed.to(q_type)", "q_embed"),
    "gated_product": ("llama", "LlamaMLP.forward", "(x)) * self.up", "(x)) + self.up"),
    "residual_norm": (
        "qwen2",
        "Qwen2DecoderLayer.forward",
        "hidden_states = self.post_attention_layernorm(hidden_states)",
        "hidden_states = self.post_attention_layernorm(2 * hidden_states)",
    ),
    "qk_norm_rope": (
        "qwen3",
        "Qwen3Attention.forward",
        "cos, sin = position_embeddings",
        "cos, sin = position_embeddings; query_states = query_states * 2",
    ),
    "head_loss": (
        "llama",
        "LlamaForCausalLM.forward",
        "        loss = None",
        "        logits = logits.clamp(max=5)",
    ),
}


@pytest.mark.parametrize("form", CHANGES)
def test_a_changed_body_is_refused(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, qualname, old, new = CHANGES[form]
    source = Path(modelling(home).__file__).read_text(encoding="utf-8")
    assert old in source
    table = own_module(source.replace(old, new, 1), home, qualname, form, tmp_path, monkeypatch)
    reason = refused(table, known()[form].op, monkeypatch)
    said = ("other code than the leaf", "another function than the leaf", "that the rule", "line ")
    assert any(words in reason for words in said)


def test_the_same_body_in_a_module_of_ones_own_is_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Path(modelling("llama").__file__).read_text(encoding="utf-8")
    row = "LlamaRMSNorm.forward", "rms_norm.llama"
    table = own_module(source, "llama", *row, tmp_path, monkeypatch)
    monkeypatch.setitem(architectures(), table.name, table)
    norm, x = sys.modules[table.module].LlamaRMSNorm(8), torch.randn(3, 8)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("rms_norm", models=table.name, strict=True) as report:
        norm(x)
    assert [row.served for row in report] == [1]


def own_module(
    source: str,
    home: str,
    qualname: str,
    form: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Architecture:
    """A table with one row for a modelling file of one's own, imported beside the real one."""
    name = f"transformers.models.{home}.modeling_own"
    path = folder / "modeling_own.py"
    path.write_text(source, encoding="utf-8")
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return Architecture("own", {qualname: form}, module=name)


def foreign(function: Any) -> Any:
    """A wrapper that somebody else put around a function, as functools.wraps makes it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("qualname", "form"),
    [("LlamaRMSNorm.forward", "rms_norm.llama"), ("apply_rotary_pos_emb", "rope.full")],
)
def test_somebody_elses_wrapper_is_refused(
    qualname: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modelling("llama")
    monkeypatch.setitem(globals(), "rotate_half", module.rotate_half)  # as a from-import leaves it
    table = Architecture("llama", {qualname: form})
    owner, name, value = locate(table.sites[0])
    monkeypatch.setattr(owner, name, foreign(value))
    assert __name__ in refused(table, known()[form].op, monkeypatch)
