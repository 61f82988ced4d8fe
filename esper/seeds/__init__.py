"""Seeds on a host: sites, the seed layer, the branches that grow and how a forward blends them."""

from typing import TYPE_CHECKING

from esper.lazy_imports import names_of
from esper.seeds.config import SitesConfig, TelemetryConfig

if TYPE_CHECKING:
    from esper.seeds.branches import Branch, BranchTable
    from esper.seeds.layer import SeedLayer
    from esper.seeds.recording import Recording
    from esper.seeds.registry import SeedRegistry
    from esper.seeds.sites import Site, find_sites

CONFIGS: dict[str, dict[str, type]] = {
    "sites": {"auto": SitesConfig},
    "telemetry": {"default": TelemetryConfig},
}

__all__ = [
    "CONFIGS",
    "Branch",
    "BranchTable",
    "Recording",
    "SeedLayer",
    "SeedRegistry",
    "Site",
    "SitesConfig",
    "TelemetryConfig",
    "find_sites",
]

__getattr__ = names_of(
    __name__,
    {
        "Branch": "esper.seeds.branches",
        "BranchTable": "esper.seeds.branches",
        "SeedRegistry": "esper.seeds.registry",
        "Recording": "esper.seeds.recording",
        "SeedLayer": "esper.seeds.layer",
        "Site": "esper.seeds.sites",
        "find_sites": "esper.seeds.sites",
    },
)
