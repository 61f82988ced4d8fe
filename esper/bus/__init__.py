"""The message bus: telemetry and events out, commands in, acknowledgements back."""

from __future__ import annotations

from pathlib import Path

from esper.bus.config import EmbeddedConfig, MemoryConfig, RedisConfig
from esper.bus.protocol import Bus

CONFIGS: dict[str, type] = {"memory": MemoryConfig, "embedded": EmbeddedConfig, "redis": RedisConfig}


def open_bus(config: MemoryConfig, output_folder: str | Path) -> Bus:
    """The bus a configuration names; waiting messages and large payloads go to ``<output_folder>/bus``.

    Raises UserError when there is no server to reach or to start.
    """
    folder = Path(output_folder) / "bus"
    if isinstance(config, RedisConfig):
        from esper.bus.server.bus import ServerBus
        from esper.bus.server.connection import address_of

        return ServerBus(config, address_of(config), folder)
    if isinstance(config, EmbeddedConfig):
        from esper.bus.server.embedded import EmbeddedBus

        return EmbeddedBus(config, folder)
    from esper.bus.memory.bus import MemoryBus

    return MemoryBus(config, folder)
