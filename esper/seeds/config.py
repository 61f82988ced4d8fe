"""The sites of the seeds, and the telemetry about them."""

from __future__ import annotations

from dataclasses import dataclass

from esper.setting_fields import setting


@dataclass
class SitesConfig:
    """Which modules of the host carry seeds, and how many share a module's features."""

    name: str = "auto"
    match: list[str] = setting(
        ["auto"], help="glob patterns over module names, roles (mlp_hidden, residual, conv_out), or auto: the host's own growth_sites"
    )
    per_site: int = setting(2, low=1, help="seeds that share a site's features")


@dataclass
class TelemetryConfig:
    """How often the health of the seeds is read."""

    name: str = "default"
    every: int = setting(10, low=1, unit="optimizer steps", help="steps between two telemetry rows of a seed, at least a tick")
    near_zero: float = setting(1e-3, low=0.0, help="activations smaller than this count as near zero")
