"""What is told of a benchmark: from samples that are given, every verdict in words, and as JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence

import pytest

from hf_kernel_patch.benchmarking.result import Benchmark, Measured
from hf_kernel_patch.benchmarking.telling import MIB, columns, verdict
from hf_kernel_patch.benchmarking.variants import alone, without

ROUNDS = 12
DRIFT = [0.001 * (number % 3 - 1) for number in range(ROUNDS)]


def row(variant: str, seconds: float, mib: float = 100.0, noise: float = 0.0) -> Measured:
    times = [seconds + one + noise * (-1) ** place for place, one in enumerate(DRIFT)]
    peaks = tuple(int(mib * MIB) for _ in times)
    return Measured("training", variant, 512, tuple(times), peaks)


def found_with(rows: Sequence[Measured], ops: Sequence[str] = (), **changes: object) -> Benchmark:
    served = {"training": dict.fromkeys(ops or ["rope"], 2)}
    given = {"title": "a model", "rows": tuple(rows), "ops": tuple(ops), "rounds": ROUNDS}
    return Benchmark(**{**given, "served": served, **changes})  # type: ignore[arg-type]


def test_a_gain_and_a_loss_are_told_in_the_table_and_in_a_sentence() -> None:
    faster = found_with([row("eager", 0.2), row("patched", 0.1, 60)])
    assert verdict(faster, "training") == [
        "In all, training runs at 2.00 times the speed when patched, "
        "+100.00 (+100.00 to +100.00) ms of 200.00.",
        "Memory that is saved: +40.0 (+40.0 to +40.0) MiB.",
    ]
    slower = found_with([row("eager", 0.1), row("patched", 0.2, 160)])
    told = verdict(slower, "training")
    assert told[0].startswith(
        "In all, training is slower when patched: 0.50 times the speed, -100.00"
    )
    assert told[1] == "Memory that is taken in addition: -60.0 (-60.0 to -60.0) MiB."
    same = found_with([row("eager", 0.1), row("patched", 0.1, noise=0.01)])
    assert verdict(same, "training")[0].startswith(
        "In all, nothing is gained in training: the difference, +0.00 (-10.00 to +10.00) ms"
    )
    assert len(verdict(same, "training")) == 1


OPS = ("gains", "nothing", "slow", "saves", "both")


def test_each_op_is_judged() -> None:
    times = {"gains": 0.01, "nothing": 0.0, "slow": -0.01, "saves": 0.0, "both": 0.01}
    rows = [row("eager", 0.2), row("patched", 0.18, 90)]
    for op, gain in times.items():
        saved = 10 if op == "saves" else 0
        noise = 0.005 if gain == 0 else 0.0
        rows.append(row(alone(op), 0.2 - gain, 100 - saved, noise))
        rest = gain if op != "both" else -0.01
        rows.append(row(without(op), 0.18 + rest, 90 + saved, noise))
    found = found_with(rows, OPS)
    assert found.ops_in("training") == OPS
    assert verdict(found, "training")[2:] == [
        "Nothing is gained: nothing",
        "Slower: slow",
        "No time is gained, but memory is saved: saves",
        "Faster or slower, alone or beside the others: both",
    ]
    table = {
        line.split()[0]: line.split()[1:] for line in str(found).splitlines() if line[:2] == "  "
    }
    assert table["gains"] == ["2", "+10.00", "+0.0~", "+10.00", "+0.0~"]
    assert [cell[-1] for cell in table["nothing"][1:]] == ["~"] * 4
    assert table["slow"][1] == "-10.00" and table["saves"][2] == "+10.0"


def test_what_was_not_measured_or_failed_is_told() -> None:
    rows = [row("eager", 0.1), Measured("training", "patched", 512, failed="out of memory")]
    found = found_with(rows, unmeasured={"decoding": "it does not generate text"})
    text = str(found)
    assert "In all, training cannot be compared (patched: out of memory)." in text
    assert "not measured: decoding: it does not generate text" in text
    assert any(line.split()[:2] == ["patched", "-"] for line in text.splitlines())
    unknown = [Measured("training", name, 512, (0.1,) * 12) for name in ("eager", "patched")]
    assert "unknown" in str(found_with(unknown))
    calls = found_with([row("eager", 0.1), row("patched", 0.1)], fallbacks={"training": {"odd": 3}})
    assert "3 calls of the whole ran the original: odd" in str(calls)
    few = found_with([row("eager", 0.1), row("patched", 0.1)], rounds=7)
    assert "7 rounds are too few to tell a difference from noise; 8 are the least." in str(few)


def test_everything_is_in_the_json() -> None:
    rows = [row("eager", 0.2), row("patched", 0.1, 60), row("compile", 0.15)]
    rows += [row(alone("rope"), 0.1), row(without("rope"), 0.2)]
    found = found_with(rows, ["rope"])
    read = json.loads(found.to_json())
    assert len(read["rows"]) == 5 and len(read["rows"][0]["seconds"]) == ROUNDS
    assert read["rows"][1]["tokens_per_s"] == pytest.approx(5120)
    assert read["rows"][1]["peak_bytes"] == 60 * MIB
    assert read["gains"]["training"]["whole"]["seconds"]["beyond_noise"] is True
    assert read["gains"]["training"]["whole"]["bytes"]["median"] == 40 * MIB
    assert read["gains"]["training"]["ops"]["rope"]["alone"]["seconds"]["median"] == pytest.approx(
        0.1
    )
    assert pickle.loads(pickle.dumps(found)) == found
    bare = Measured("training", "eager", 512, failed="out of memory")
    assert json.loads(found_with([bare]).to_json())["rows"][0]["seconds_median"] is None


def test_columns_are_aligned() -> None:
    lines = columns([["a", "b", "c"], ["long", "10", "2"], ["x", "why it failed"]])
    assert lines == ["  a      b  c", "  long  10  2", "  x     why it failed"]
