"""Example hosts (config group ``model``).

A host names its ``growth_sites`` and, if it has residual blocks, its ``growth_blocks``.
"""

from esper.hosts.cnn import CNNConfig
from esper.hosts.mlp import MLPConfig
from esper.hosts.transformer import TransformerConfig

CONFIGS: dict[str, type] = {
    "mlp": MLPConfig,
    "cnn": CNNConfig,
    "transformer": TransformerConfig,
}
