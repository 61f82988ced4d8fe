"""How other processes find the bus of a run: by a note in the run's folder with the bus, the run and its description."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from esper.bus.config import EmbeddedConfig, RedisConfig, ServerConfig
from esper.bus.server.connection import NoAnswer, address_of, readable
from esper.errors import UserError

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus

NOTE = "join.json"
KINDS: dict[str, type[ServerConfig]] = {"embedded": EmbeddedConfig, "redis": RedisConfig}


class Invitation(msgspec.Struct):
    """The note for processes that may join a run; ``info`` describes the run (see ``esper.tracking.run_info``)."""

    run: str
    bus: dict[str, Any]
    info: dict[str, Any] = msgspec.field(name="record")


def invite(folder: Path, run: str, config: ServerConfig, info: dict[str, Any]) -> None:
    """Write the note; credentials are not in it."""
    path = folder / "bus" / NOTE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(Invitation(run, dataclasses.asdict(config), info)))
    partial.replace(path)


def invitation(folder: Path) -> Invitation:
    """The note of a run's folder; raises UserError when there is none to join."""
    path = folder / "bus" / NOTE
    if not path.is_file():
        raise UserError(
            f"{folder} is not the folder of a run that others can join: give the output folder of a run with bus=embedded or bus=redis"
        )
    found = msgspec.json.decode(path.read_bytes(), type=Invitation)
    if found.bus.get("name") not in KINDS:
        raise UserError(f"the run in {folder} has bus={found.bus.get('name')}, which lives in its process alone")
    return found


@contextmanager
def joined(folder: Path, part: str = "", group: str = "") -> Iterator[tuple[ServerBus, Invitation]]:
    """The bus of the run in ``folder``, from another process; raises UserError when it cannot be reached, or no longer.

    ``part`` (``controller`` or ``tracking``) is the part of the run that the caller takes over: refused where the run has its own. With a
    ``group`` it is the local controller of that group of sites, beside the run's own.
    Otherwise the counters of the caller are on the server while it is at work. A message that was in the hands of a controller that
    died never becomes a dead letter, however often that happens: without it the next controller would decide differently, unnoticed.
    """
    import redis

    from esper.bus.server.bus import ServerBus
    from esper.bus.server.embedded import address_in
    from esper.bus.server.status import reporting_counts

    found = invitation(folder)
    if part and not group:
        _refuse_second(folder, found, part)
    config = KINDS[found.bus["name"]](**found.bus)
    if part == "controller":
        config = dataclasses.replace(config, deliveries=sys.maxsize)
    address = address_of(config) if isinstance(config, RedisConfig) else address_in(folder / "bus" / "server")
    try:
        bus = ServerBus(config, address, folder / "bus")
    except NoAnswer as error:
        raise (_over(folder, error) if isinstance(config, EmbeddedConfig) else error) from None
    try:
        if part and not group:
            with reporting_counts(bus, found.run, part):
                yield bus, found
        else:
            yield bus, found
    except redis.RedisError as error:
        said = readable(address, error)
        raise (_over(folder, said) if isinstance(said, NoAnswer) and isinstance(config, EmbeddedConfig) else said) from None
    finally:
        bus.close()


def _over(folder: Path, error: NoAnswer) -> UserError:
    """A run's own server that does not answer: only the run itself can start it."""
    return UserError(
        f"{error.finding}: this server belongs to the run in {folder} and ended with it; what the bus counted is in summary.json"
        " there, what happened in the files of its trackers, and a run that was stopped has its server again when it goes on with"
        f" resume={folder}"
    )


def _refuse_second(folder: Path, found: Invitation, part: str) -> None:
    """Raise UserError for a second controller or tracker: both would command the run, or write its files."""
    process = found.info["config"][part].get("process")
    if process != "external":
        raise UserError(
            f"the run in {folder} has {part}.process={process}: its own process does this work, and a second one would"
            f" disturb it; start the run with {part}.process=external"
        )
