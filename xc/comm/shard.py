"""The part of a range that a rank owns: classes of the catalogue, examples of a global batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The half-open range [first, last). It is empty where there are fewer items than parts."""

    first: int
    last: int

    @classmethod
    def of(cls, total, num_parts, part):
        """Part number `part` of `num_parts` near-equal parts of range(total). The first parts take the remainder."""
        size, remainder = divmod(total, num_parts)
        first = part * size + min(part, remainder)
        return cls(first, first + size + (part < remainder))

    def __len__(self):
        return self.last - self.first

    def owns(self, ids):
        """Mask of the global ids (tensor or array) that lie in this part."""
        return (ids >= self.first) & (ids < self.last)
