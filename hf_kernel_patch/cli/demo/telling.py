"""What the demo prints of a comparison, in words and tables."""

from __future__ import annotations

import math
import statistics
from collections import Counter

from hf_kernel_patch import registry
from hf_kernel_patch.benchmarking.noise import Spread
from hf_kernel_patch.cli.demo import measured
from hf_kernel_patch.cli.demo.comparison import (
    EAGER,
    MIB,
    PATCHED,
    Comparison,
    same_beginning,
)
from hf_kernel_patch.cli.demo.models import REAL_VOCABULARY
from hf_kernel_patch.cli.demo.words import FUSED
from hf_kernel_patch.cli.demo.worker import LOSS, NEW
from hf_kernel_patch.cli.printing import print_table
from hf_kernel_patch.patching.report import PatchReport


def say(text: str = "") -> None:
    """A line, at once, also where stdout is no terminal."""
    print(text, flush=True)


def say_fused(report: PatchReport) -> None:
    """What was fused, with the calls of one training step, and what was not and why."""
    say("\nWhat was fused, with the calls of the first training step:")
    for row in report.patched:
        what, how = FUSED.get(row.op, (row.op, "fused"))
        if row.op == "decode_attention":
            calls = "while decoding"
        else:
            calls = f"{row.served} call{'' if row.served == 1 else 's'} served in this step"
        say(f"- {what}: {how}")
        say(f"  {row.site} -> {row.kernel}: {calls}")
        for reason, count in row.fallbacks.items():
            say(f"  {count} calls ran the original: {reason}")
    for reason, count in Counter(row.reason for row in report.skipped).items():
        say(f"- not patched ({count}): {reason}")


def say_comparison(device: str, found: Comparison) -> None:
    """Speed, memory and losses of the training, side by side."""
    say(f"\nTraining, {found.steps} steps of each run, in turns:")
    kind = "peak memory added" if device == "cpu" else "peak memory"
    print_table(
        ("run", "first loss", "last five", "tokens/s", "middle half", kind),
        [_line(name, found) for name in found.runs],
    )
    say(
        f"tokens/s: of the median step; half of the steps lie in the middle half; the first "
        f"{found.untimed} are not timed"
    )
    gain = found.speed_up()
    say(f"speed-up: {gain.median:.2f} times, turn by turn (middle half {_range(gain, '.2f')})")
    say(f"largest difference between the losses of a step: {found.apart():.1e}")


def say_loss(device: str, found: Comparison) -> None:
    """What head and loss take with the vocabulary of a real model."""
    width = 4 if device == "cpu" else 2
    logits = found.loss_tokens * REAL_VOCABULARY * width / MIB
    say(
        f"\nMemory of the loss, {found.loss_tokens} tokens with a vocabulary of "
        f"{REAL_VOCABULARY:,} (that of Llama 3), forward and backward:"
    )
    for name, run in found.runs.items():
        say(f"- {name}: {_mib(run.loss_memory)}")
    say(f"The logits alone are {logits:,.0f} MiB. Fused, they never exist as a whole.")
    kernels = registry.kernels().values()
    if not any(kernel.op == LOSS and device in kernel.default_on for kernel in kernels):
        say('On this device "auto" leaves the fused loss out: it saves memory and takes longer.')


def say_decoding(found: Comparison, prompt: str) -> None:
    """What was decoded, and how fast."""
    eager, patched = found.runs[EAGER], found.runs[PATCHED]
    say(f"\nDecoding, {NEW} tokens (one a byte) by generate(), at batch 1, in turns:")
    for name, run in found.runs.items():
        say(f"- {name}: {statistics.median(run.token_seconds) * 1e3:.2f} ms a token")
    say(f"speed-up: {found.decoding_speed_up():.2f} times")
    if not any(row.op == "decode_attention" for row in found.report.patched):
        say(
            "So small a model spends a token's time on calls, and without CUDA graphs the patched "
            "one has no fewer. On CUDA devices one graph replaces them."
        )
    say(f"{prompt!r} goes on with {_text(patched.text)!r}")
    same = same_beginning(eager.text, patched.text)
    if same == len(eager.text):
        say("both runs decode the same")
    else:
        say(f"as it is, from byte {same + 1} on: {_text(eager.text[same:])!r}")


def say_measured(device: str, gpu: str) -> None:
    """What was measured with whole models on GPUs."""
    if device == "cpu":
        say(
            "\nOn a CPU the speeds hardly differ: most of the time goes into matrix products, "
            "which stay PyTorch's own. The gain is on GPUs. Measured there:"
        )
    else:
        say("\nMeasured with larger models:")
    chosen = measured.cells(gpu)
    for name, lines in measured.tables(chosen).items():
        say(f"\n{name}:")
        print_table(measured.COLUMNS, lines)
    say()
    for note in measured.notes(chosen):
        say(f"- {note}")
    say("- all figures: benchmarks/RESULTS.md of the sources")


def _line(name: str, found: Comparison) -> tuple[str, ...]:
    run, speed = found.runs[name], found.speed(name)
    return (
        name,
        f"{run.losses[0]:.3f}",
        f"{statistics.mean(run.losses[-5:]):.3f}",
        f"{speed.median:,.0f}",
        _range(speed, ",.0f"),
        f"{run.memory / MIB:,.0f} MiB",
    )


def _range(found: Spread, form: str) -> str:
    return f"{found.low:{form}} to {found.high:{form}}"


def _mib(value: float | None) -> str:
    if value is None:
        return "not measurable here: this system keeps the peak of the whole process"
    return "more than there is" if math.isinf(value) else f"{value / MIB:,.0f} MiB"


def _text(found: bytes) -> str:
    return found.decode(errors="replace")
