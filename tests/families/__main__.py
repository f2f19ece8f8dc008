"""Run the families, write served.json and docs/families.md: ``python -m tests.families``."""

from __future__ import annotations

import argparse
import sys
import time

from rich.progress import Progress

from tests.families import page, record
from tests.families.cases import CASES
from tests.families.run import Result
from tests.families.workers import run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("families", nargs="*", help="families or classes; all, if none is named")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    asked = parser.parse_args()
    chosen = [
        case
        for case in CASES
        if not asked.families or case.family in asked.families or case.name in asked.families
    ]
    found: record.Record = record.load() if asked.families and record.PATH.exists() else {}
    failed, started = 0, time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("families", total=len(chosen))
        for case, result in run_all(chosen, asked.jobs):
            failed += not _tell(progress, case.id, result, alone=bool(asked.families))
            if isinstance(result, Result):
                record.add(found, result)
            progress.advance(task)
            if not progress.console.is_terminal:
                done = int(progress.tasks[task].completed)
                print(f"{done}/{len(chosen)} {case.id}", file=sys.stderr, flush=True)
    print(f"{len(chosen)} classes, {failed} failed, {time.perf_counter() - started:.0f} s")
    for op, count in page.totals(found).items():
        print(f"  {op:22}{count:4} families, aim {page.OPS[op][1]}")
    if not asked.dry:
        record.save(found)
        page.PATH.write_text(page.text(found), encoding="utf-8")
    return 1 if failed else 0


def _tell(progress: Progress, name: str, result: Result | Exception, alone: bool) -> bool:
    """Print what is wrong, or where few were asked for, all; whether all is well."""
    if isinstance(result, Exception):
        progress.print(f"{name}: {type(result).__name__}: {result}", markup=False)
        return False
    for error in result.errors:
        progress.print(f"{name}: {error}", markup=False)
    if alone:
        progress.print(f"{name}: {result.seconds:.1f} s, {dict(result.served)}", markup=False)
        for (op, reason), count in sorted(result.fallbacks.items()):
            progress.print(f"  {op}: {count} calls fall back: {reason}", markup=False)
        for scenario, why in result.without.items():
            progress.print(f"  {scenario}: not by the original either: {why}", markup=False)
    return not result.errors


if __name__ == "__main__":
    sys.exit(main())
