"""The requests that a plan is made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests that are all alike, and as many at a time as fit.

    Attributes:
        input_len: tokens of each prompt.
        output_len: tokens generated for each request.
        concurrency: requests at a time on each replica, or in each data group; None: as many as a step and
            the pages hold.
    """

    input_len: int = 1024
    output_len: int = 256
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "concurrency"):
            value = getattr(self, name)
            if value is None and name == "concurrency":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")

    @property
    def length(self) -> int:
        """Tokens of a whole request."""
        return self.input_len + self.output_len

    def check(self, max_model_len: int) -> None:
        """Refuses requests that the engine would refuse.

        Raises:
            ValueError: they are longer than `max_model_len`.
        """
        if self.length > max_model_len:
            raise ValueError(
                f"input_len={self.input_len} and output_len={self.output_len}: together more than "
                f"max_model_len={max_model_len}; lower them"
            )
