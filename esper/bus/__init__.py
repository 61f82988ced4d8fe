"""The message bus: telemetry and events out, commands in, acknowledgements back."""

from __future__ import annotations

from pathlib import Path

from esper.bus.config import EmbeddedConfig, MemoryConfig, RedisConfig
from esper.bus.protocol import Bus

CONFIGS: dict[str, type] = {"memory": MemoryConfig, "embedded": EmbeddedConfig, "redis": RedisConfig}


def open_bus(config: MemoryConfig, output_folder: str | Path) -> Bus:
    """The bus that a configuration names; messages that wait and large payloads go to ``<output_folder>/bus``.

    Raises UserError when there is no server to reach or to start, and for an own bus (``bus=custom``) that cannot be made.
    """
    folder = Path(output_folder) / "bus"
    if (build := getattr(config, "build", None)) is not None:  # esper.user_code.CustomBus
        own: Bus = build(folder)
        return own
    if isinstance(config, RedisConfig):
        from esper.bus.server.bus import ServerBus
        from esper.bus.server.connection import address_of

        return ServerBus(config, address_of(config), folder)
    if isinstance(config, EmbeddedConfig):
        from esper.bus.server.embedded import EmbeddedBus

        return EmbeddedBus(config, folder)
    from esper.bus.memory.bus import MemoryBus

    return MemoryBus(config, folder)
