"""Times the sides of a comparison in turns, and writes what was measured as Markdown.

Paths on the command line stay out of the results: they say nothing to a reader elsewhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def clock(device: torch.device) -> float:
    """Returns the time in seconds, once all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: dict[str, dict[str, list[float]]]
    """Side to name of the time to the seconds of each repetition."""
    others: float
    """Share of the CPU time that went to other processes, 0 to 1: large means a spoilt run."""


def alternate(
    sides: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, warmup: int = 3
) -> Measured:
    """Calls every side once per repetition, so that a busy moment of the machine hits them all.

    The order rotates, and every other repetition goes backwards: no side always runs in the cache
    that the same other side left behind.

    Args:
        sides: name to a function that runs once and returns its times, name to seconds.
        repeats: repetitions that count.
        warmup: repetitions before, which compile and do not count.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    names = list(sides)
    for repetition in range(-warmup, repeats):
        if repetition == 0:
            start, start_busy = time.perf_counter(), _others_busy_s()
        turn = repetition // 2 % len(names)
        order = names[turn:] + names[:turn]
        for name in order if repetition % 2 else reversed(order):
            for what, took in sides[name]().items():
                if repetition >= 0:
                    seconds[name].setdefault(what, []).append(took)
    others = _others_busy_s() - start_busy
    return Measured(seconds, others / (time.perf_counter() - start) / (os.cpu_count() or 1))


def milliseconds(seconds: Sequence[float]) -> str:
    """Returns the median, as a cell of a table."""
    return f"{1e3 * statistics.median(seconds):.2f}"


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Returns the median and the quartiles of the ratios within each repetition."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, numbers to the right."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def header(theme: str, title: str, argv: Sequence[str], device: torch.device) -> str:
    """Returns the head of a results file: command, commit, versions, hardware, clock state."""
    arguments = ["PATH" if Path(a).is_absolute() else a for a in argv]
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("ardd", "torch")]
    lines = {
        "command": f"`{' '.join(['python -m', f'benchmarks.{theme}', *arguments])}`",
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "hardware": _hardware(device),
        "clock": _clock_state(device),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
    return "\n".join([f"# {title}", "", *(f"- {name}: {text}" for name, text in lines.items()), ""])


def write(folder: Path, theme: str, device: torch.device, text: str) -> None:
    """Writes `text` to `folder` as theme_hardware_yyyymm.md."""
    path = folder / f"{theme}_{device.type}_{datetime.date.today():%Y%m}.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", "utf-8")


def _others_busy_s() -> float:
    """Returns the CPU seconds that all but this process used, the host's share included."""
    user, nice, system, _, _, irq, softirq, stolen = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_info('model name')}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _clock_state(device: torch.device) -> str:
    if device.type == "cuda":
        query = "--query-gpu=clocks.sm,clocks.max.sm,power.limit,clocks_event_reasons.active"
        return _output("nvidia-smi", query, "--format=csv,noheader") or "unknown"
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    set_by = f"governor {governor.read_text().strip()}" if governor.exists() else "no governor seen"
    return f"{_cpu_info('cpu MHz')} MHz reported, {set_by}"


def _cpu_info(field: str) -> str:
    found = re.search(rf"^{field}\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else "unknown"


def _output(*command: str) -> str:
    """Returns what a command prints, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
