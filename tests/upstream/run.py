"""transformers' own tests of its models, as they are and patched: see README.md here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "granite", "cohere", "olmo2"),
    *("smollm3", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss"),
    *("gemma3", "qwen2_vl", "llava", "ernie4_5"),
)
#: Tests that start processes of their own, or want an accelerator of their own.
LEFT_OUT = "not fsdp and not tensor_parallel and not tp_ and not expert_parallel and not _ep_"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder with transformers' tests/")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--kernels", default=_all_kernels(), help="what HF_KERNEL_PATCH is set to")
    parser.add_argument("--keep", help="an expression as pytest -k takes it", default=LEFT_OUT)
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="add them here")
    asked = parser.parse_args()
    found = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.exists() else {}
    lost = 0
    for name in asked.architectures:
        plain = _pytest(asked.checkout, name, asked.keep, None)
        patched = _pytest(asked.checkout, name, asked.keep, asked.kernels)
        found[name] = _compare(plain, patched)
        lost += len(found[name]["lost"])
        print(f"{name}: {found[name]['passed']} pass, {found[name]['patched']} patched")
        print(f"  calls served: {dict(patched['served'])}")
        for test in found[name]["lost"]:
            print(f"  fails patched: {test}: {patched['reasons'].get(test, 'did not run')}")
        asked.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if lost else 0


def _all_kernels() -> str:
    sys.path.insert(0, str(HERE.parents[1]))
    import hf_kernel_patch

    return ",".join(one for one in hf_kernel_patch.get_available_kernels() if "torch_" in one)


def _pytest(checkout: Path, name: str, keep: str, kernels: str | None) -> dict[str, Any]:
    """The outcomes of one model's tests, patched by the kernels or by none."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_KERNEL_PATCH")}
    if kernels is not None:
        environment["HF_KERNEL_PATCH"] = kernels
    paths = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_UPSTREAM_RESULTS": str(results),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "hf_upstream", "-k", keep]
        command += [f"tests/models/{name}/test_modeling_{name}.py", "-p", "no:cacheprovider"]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True
        )
        found: dict[str, Any] = {}
        if results.exists():
            found = json.loads(results.read_text(encoding="utf-8"))
        if not found.get("outcomes"):
            raise RuntimeError(f"no test of {name} ran: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return found


def _compare(plain: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    passed = [test for test, outcome in plain["outcomes"].items() if outcome == "passed"]
    lost = [test for test in passed if patched["outcomes"].get(test) != "passed"]
    return {
        "passed": len(passed),
        "patched": len(passed) - len(lost),
        "served": sum(patched["served"].values()),
        "by_op": patched["served"],
        "lost": sorted(lost),
    }


if __name__ == "__main__":
    sys.exit(main())
