"""The part of a range that belongs to one rank: of the classes, or of the examples of a global batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The half-open range [first, last). It is empty if there are fewer items than parts."""

    first: int
    last: int

    @classmethod
    def of(cls, total, num_parts, part):
        """Part number `part` of range(total), cut into `num_parts` near-equal parts. The first ones may be longer."""
        size, remainder = divmod(total, num_parts)
        first = part * size + min(part, remainder)
        return cls(first, first + size + (part < remainder))

    def __len__(self):
        return self.last - self.first

    def owns(self, ids):
        """Mask of the global ids (tensor or array) that lie in this range."""
        return (ids >= self.first) & (ids < self.last)
