"""One training in several processes (torch.distributed): what they tell each other, sums in a fixed order, and who is lost."""

from esper.distributed.ordered_sum import OrderedSum, ordered_sum, refuse_uneven
from esper.distributed.ranks import Ranks
from esper.distributed.sharding import is_shard, is_sharded, local, whole

__all__ = ["OrderedSum", "Ranks", "is_shard", "is_sharded", "local", "ordered_sum", "refuse_uneven", "whole"]
