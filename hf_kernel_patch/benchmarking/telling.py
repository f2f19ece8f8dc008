"""What a benchmark has found, in tables and in words."""

from __future__ import annotations

from collections.abc import Sequence

from hf_kernel_patch.benchmarking.noise import FEWEST_ROUNDS, Difference, Spread
from hf_kernel_patch.benchmarking.result import Benchmark, Gain, Measured
from hf_kernel_patch.benchmarking.variants import EAGER, PATCHED

MIB = 2**20
#: What a call of each workload is.
CALLS = {
    "training": "forward and backward",
    "decoding": "one generate(), reading the prompt included",
}
#: Stands behind what may be noise.
NOISE = "~"


def text_of(found: Benchmark) -> str:
    """All of it."""
    parts = [found.title]
    for workload in found.workloads:
        parts += ["", f"{workload}: {CALLS[workload]}", *_table(found, workload)]
        if ops := _ops(found, workload):
            parts += ["", *ops]
        parts += ["", *verdict(found, workload)]
    if found.unmeasured:
        parts += ["", *(f"not measured: {name}: {why}" for name, why in found.unmeasured.items())]
    return "\n".join([*parts, "", *_notes(found)])


def verdict(found: Benchmark, workload: str) -> list[str]:
    """What is gained in a workload, in whole sentences, and what is not."""
    lines = [_in_all(found, workload), *_memory(found, workload)]
    judged = {op: _judgement(found, workload, op) for op in found.ops_in(workload)}
    for words in dict.fromkeys(filter(None, judged.values())):
        ops = [op for op, said in judged.items() if said == words]
        lines.append(f"{words}: {', '.join(ops)}")
    for reason, count in found.fallbacks.get(workload, {}).items():
        lines.append(f"{count} calls of the whole ran the original: {reason}")
    return lines


def _in_all(found: Benchmark, workload: str) -> str:
    gain, speed = found.gain(workload), found.speed_up(workload)
    eager, patched = found.row(workload, EAGER), found.row(workload, PATCHED)
    if gain is None or speed is None or eager is None or eager.time is None:
        failed = [one for one in (eager, patched) if one is not None and one.failed]
        why = "; ".join(f"{one.variant}: {one.failed}" for one in failed)
        return f"In all, {workload} cannot be compared ({why or 'one of the two is missing'})."
    if found.rounds < FEWEST_ROUNDS:
        few = f"{_rounds(found)} {'is too little' if found.rounds == 1 else 'are too few'}"
        return f"{few} to tell a difference from noise; {FEWEST_ROUNDS} are the least."
    if not found.served.get(workload):
        return f"In all, nothing is gained in {workload}: no kernel serves a call there."
    ms = f"{_range(gain.time, 1e3, 2)} ms of {eager.time.median * 1e3:.2f}"
    if not gain.time.beyond_noise:
        return f"In all, nothing is gained in {workload}: the difference, {ms}, may be noise."
    if gain.time.median < 0:
        times = f"{speed.median:.2f} times the speed"
        return f"In all, {workload} is slower when patched: {times}, {ms}."
    return f"In all, {workload} runs at {speed.median:.2f} times the speed when patched, {ms}."


def _memory(found: Benchmark, workload: str) -> list[str]:
    """What the whole saves of memory, or takes in addition, where that is no noise."""
    gain = found.gain(workload)
    if gain is None or gain.memory is None or not gain.memory.beyond_noise:
        return []
    what = "is saved" if gain.memory.median > 0 else "is taken in addition"
    return [f"Memory that {what}: {_range(gain.memory, 1 / MIB, 1)} MiB."]


def _judgement(found: Benchmark, workload: str, op: str) -> str:
    """What there is to say of an op that gains no time, or ""."""
    gains = [found.gain_alone(workload, op), found.loss_without(workload, op)]
    known = [gain for gain in gains if gain is not None]
    if found.rounds < FEWEST_ROUNDS or not known:
        return ""
    better, worse = (
        [gain.time.beyond_noise and sign * gain.time.median > 0 for gain in known]
        for sign in (1, -1)
    )
    if any(better):
        return "Faster or slower, alone or beside the others" if any(worse) else ""
    saves = any(one.memory and one.memory.beyond_noise and one.memory.median > 0 for one in known)
    time = "Slower" if any(worse) else "No time is gained"
    return f"{time}, but memory is saved" if saves else time if any(worse) else "Nothing is gained"


def _table(found: Benchmark, workload: str) -> list[str]:
    """The variants, one a line."""
    head = ["variant", "ms", "middle half", "tokens/s", "speed", f"peak MiB ({found.memory})"]
    lines = [head]
    for row in found.rows:
        if row.workload == workload and not row.same_as:
            lines.append(_line(row, found.speed_up(workload, row.variant)))
    return columns(lines)


def _line(row: Measured, speed_up: Spread | None) -> list[str]:
    if row.time is None or row.speed is None:
        return [row.variant, "-", row.failed or "not measured"]
    low, high = row.time.low * 1e3, row.time.high * 1e3
    return [
        row.variant,
        f"{row.time.median * 1e3:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{row.speed.median:,.0f}",
        "" if speed_up is None else f"{speed_up.median:.2f}x",
        "unknown" if row.peak is None else f"{row.peak / MIB:,.1f}",
    ]


def _ops(found: Benchmark, workload: str) -> list[str]:
    """What each op gains, one a line."""
    lines = [["op", "calls", "alone: ms", "MiB", "beside the others: ms", "MiB"]]
    for op in found.ops_in(workload):
        gains = found.gain_alone(workload, op), found.loss_without(workload, op)
        if any(gains):
            calls = str(found.served.get(workload, {}).get(op, 0))
            lines.append([op, calls, *(cell for gain in gains for cell in _cells(gain))])
    return ["What each op gains:", *columns(lines)] if len(lines) > 1 else []


def _cells(gain: Gain | None) -> list[str]:
    if gain is None:
        return ["-", "-"]
    memory = "unknown" if gain.memory is None else _signed(gain.memory, 1 / MIB, 1)
    return [_signed(gain.time, 1e3, 2), memory]


def _signed(found: Difference, unit: float, digits: int) -> str:
    """A difference, marked where it may be noise."""
    return f"{found.median * unit:+.{digits}f}{'' if found.beyond_noise else NOISE}"


def _range(found: Difference, unit: float, digits: int) -> str:
    ends = [found.median, found.low or 0.0, found.high or 0.0]
    median, low, high = (f"{one * unit:+.{digits}f}" for one in ends)
    return f"{median} ({low} to {high})"


def _notes(found: Benchmark) -> list[str]:
    lines = [
        f"{_rounds(found)} in turns. Speed is eager's time over the variant's, a gain is the "
        "difference: medians, round by round.",
        "+ is time or memory that is saved, and the range is that of 99% certainty.",
    ]
    if found.memory == "added":
        lines.append("On a CPU the memory is what a call adds to the process: a rough figure.")
    if found.ops:
        lines.append(f"{NOISE} may be noise.")
    return lines


def _rounds(found: Benchmark) -> str:
    return "1 round" if found.rounds == 1 else f"{found.rounds} rounds"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells below each other: names to the left, numbers to the right."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[place]) for row in whole) for place in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0])]
        if len(row) < len(rows[0]):  # a reason in place of numbers
            cells += [others[0].rjust(widths[1]), *others[1:]]
        else:
            cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
