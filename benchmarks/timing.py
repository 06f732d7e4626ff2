"""Interleaved timing, medians, and tables."""

from __future__ import annotations

import statistics
import time


def measure(calls, *, repeats, warm=True):
    """Run each of `calls` (name to function) once per round, `repeats` rounds; return name to seconds.

    Interleaving gives a busy moment of the machine to all of them alike.
    """
    if warm:
        for call in calls.values():
            call()
    seconds = {name: [] for name in calls}
    for i in range(repeats):
        names = list(calls)
        for name in names if i % 2 == 0 else names[::-1]:
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median(values):
    return float(statistics.median(values))


def spread(values):
    """Give median and range for people: `33.1 [32-36]`."""
    return {"median": median(values), "min": float(min(values)), "max": float(max(values)), "n": len(values)}


def table(title, head, rows, note=""):
    """Markdown table; numbers are right-aligned by markdown itself."""
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|")
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    if note:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def ratio(value):
    """Show a ratio with two or three digits."""
    return f"{value:,.0f} x" if value >= 20 else f"{value:.1f} x" if value >= 2 else f"{value:.2f} x"


def ms(seconds):
    """Show a time in milliseconds."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
