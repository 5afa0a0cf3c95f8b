"""The table of a run, made from its segments' results."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tests.chaos.check import COUNTS


def passed(results: Sequence[dict[str, Any]]) -> bool:
    """Whether every segment passed."""
    return all(result["passed"] for result in results)


def tell(results: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [f"{'segment':>8} {'seconds':>8} {'records':>10} {'faults':>7}  " + "  ".join(COUNTS)]
    for result in results:
        counts = "  ".join(f"{result['counts'][count]:>{len(count)}}" for count in COUNTS)
        lines.append(
            f"{result['segment']:>8} {result['seconds']:>8.0f} {result['records']:>10,} "
            f"{sum(result['faults'].values()):>7}  {counts}  {'passed' if result['passed'] else 'FAILED'}"
        )
    lines += ["", *_faults(results), "", *_failures(results)]
    total = Counter[str]()
    for result in results:
        total.update(result["counts"])
    faults = sum(sum(result["faults"].values()) for result in results)
    lines.append(
        f"{sum(result['records'] for result in results):,} records, {faults:,} faults: "
        + ", ".join(f"{count} {total[count]}" for count in COUNTS)
        + "".join(f"; {times} repeats, as at least once may" for times in [_sum(results, "repeats")] if times)
        + f"; largest daemon {max((result.get('peak_rss_mib', 0) for result in results), default=0)} MiB"
    )
    return "\n".join(lines)


def _sum(results: Sequence[dict[str, Any]], what: str) -> int:
    return sum(result.get(what, 0) for result in results)


def _faults(results: Sequence[dict[str, Any]]) -> list[str]:
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    times = Counter[str]()
    for result in results:
        times.update(result["faults"])
        for kind, recovered in result["recovery"]:
            seconds[kind].append(recovered)
    lines = [f"{'fault':<32} {'times':>6}   seconds until both handlers wrote again: median, worst"]
    for kind, count in sorted(times.items()):
        found = seconds[kind]
        told = f"{statistics.median(found):>7.1f} {max(found):>7.1f}" if found else f"{'-':>7} {'-':>7}"
        lines.append(f"{kind:<32} {count:>6}   {told}")
    return lines


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        if result["passed"]:
            continue
        lines.append(f"segment {result['segment']}, seed {result['seed']}:")
        lines += [f"  {problem}" for problem in result["problems"]]
        for count, examples in result.get("examples", {}).items():
            lines += [f"  {count}: {example}" for example in examples]
    return lines
