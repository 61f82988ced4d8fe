"""One training in several processes (torch.distributed): what they tell each other, sums in a fixed order, and who is lost."""

from esper.distributed.ordered_sum import OrderedSum, ordered_sum, refuse_uneven
from esper.distributed.ranks import Ranks

__all__ = ["OrderedSum", "Ranks", "ordered_sum", "refuse_uneven"]
