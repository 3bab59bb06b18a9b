"""The sizes that steps are padded to, known before the first request."""

from dataclasses import dataclass

SMALLEST = 2
"""A matrix product with one row falls to a slow path of XLA on CPU, ten times slower than with two."""


FEWEST_SAMPLED, SAMPLED_GROWTH = 8, 4
"""The sampler is compiled for few numbers of rows, each so many times the one before: it is a third of a
small model's code. With 64 rows for 32, the logits of the others took 2 ms of a step's 38 on CPU."""


FEW_ROWS, MANY_ROWS = 8, 32
"""A step of a long prompt has few rows. On CPU the logits of 64 took 4.5 ms of the 39 to its first token,
those of up to 32 take what reading the weights takes."""


@dataclass(frozen=True)
class Bucket:
    """One program's static shape."""

    tokens: int
    rows: int
    sampled: int
    """Rows of the logits, padded to what the sampler takes."""


@dataclass(frozen=True)
class Buckets:
    """Every shape a step may have, smallest first."""

    sizes: tuple[Bucket, ...]

    @classmethod
    def up_to(
        cls, max_tokens: int, max_rows: int, growth: int = 2, *, with_few_rows: bool = False
    ) -> "Buckets":
        """Sizes from 2 to `max_tokens`, each `growth` times the one before.

        A row has at least one token, so a step of few tokens needs few rows: the tokens determine the rows.

        Args:
            with_few_rows: where those are more than `MANY_ROWS`, there is one of `FEW_ROWS`, too.
        """
        sizes = []
        for tokens in _grow(SMALLEST, growth, max(max_tokens, SMALLEST)):
            most = max(SMALLEST, min(tokens, max_rows))
            for rows in (FEW_ROWS, most) if with_few_rows and most > MANY_ROWS else (most,):
                sampled = next(
                    n for n in _grow(FEWEST_SAMPLED, SAMPLED_GROWTH, max(max_rows, SMALLEST)) if n >= rows
                )
                sizes.append(Bucket(tokens, rows, sampled))
        return cls(tuple(sizes))

    @property
    def largest(self) -> Bucket:
        """The one with the most tokens and rows."""
        return self.sizes[-1]

    @property
    def sampled(self) -> tuple[int, ...]:
        """The different numbers of rows that the sampler takes, in order."""
        return tuple(sorted({bucket.sampled for bucket in self.sizes}))

    def fit(self, num_tokens: int, num_rows: int | None = None) -> Bucket:
        """The smallest bucket that holds so many tokens.

        Args:
            num_rows: that it has to hold; None: as many as there can be.

        Raises:
            ValueError: none does; the scheduler must keep to the largest one's tokens.
        """
        return self.holding(num_tokens, num_rows)[0]

    def holding(self, num_tokens: int, num_rows: int | None = None) -> tuple[Bucket, ...]:
        """All buckets that hold so many tokens and rows, smallest first; raises as `fit` does."""
        if num_tokens > self.largest.tokens:
            raise ValueError(f"num_tokens={num_tokens}: a step holds at most {self.largest.tokens}")
        rows = min(num_tokens, self.largest.rows) if num_rows is None else num_rows
        return tuple(bucket for bucket in self.sizes if bucket.tokens >= num_tokens and bucket.rows >= rows)


def _grow(first: int, factor: int, last: int) -> list[int]:
    """`first`, and `factor` times as much again and again, up to `last`, which ends the list."""
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return sizes
