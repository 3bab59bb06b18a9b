"""A request as the scheduler knows it: token ids and counts, no text and no sampling."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxllm.cache.prefix import HashChain
from jaxllm.cache.tables import PageTables


class RequestStatus(enum.Enum):
    """Where a request is in its life. A preempted request is WAITING again."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


@dataclass(eq=False, slots=True)
class Request:
    """Token ids to go on from, and how far that has come. All but the first six fields are the scheduler's.

    Args:
        max_tokens: most tokens to sample.
        priority: with the priority policy, requests of lower values go first.
        cache_salt: only requests with equal salts share pages of the prefix cache.
        skip_prefix_cache: compute every token of the prompt (its logprobs are wanted). The pages can still be
            found by others.

    Raises:
        ValueError: an empty prompt, or max_tokens below 1.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    priority: int = 0
    cache_salt: str | None = None
    skip_prefix_cache: bool = False

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    arrival: int = field(default=-1, init=False)
    """How many requests were added before this one; -1 before it is added."""
    row: int | None = field(default=None, init=False)
    """Its row on the device while it is running."""
    token_ids: list[int] = field(init=False, repr=False)
    """Tokens the host knows: the prompt's, then the outputs."""
    output_token_ids: list[int] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    """Tokens whose keys and values are in the cache, or will be when all planned steps have run."""
    num_in_flight: int = field(default=0, init=False)
    """Tokens that planned steps sample and the host has not read yet."""
    num_cached_tokens: int = field(default=0, init=False)
    """Tokens of the prompt that were found in the prefix cache when the request was first admitted."""
    num_preemptions: int = field(default=0, init=False)
    tables: PageTables = field(init=False, repr=False)
    """Its pages; no columns while it waits."""
    chain: HashChain = field(init=False, repr=False)
    """Names of its full pages."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(
                f"request {self.request_id!r}: prompt_token_ids is empty; give at least one token"
            )
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id!r}: max_tokens={self.max_tokens} must be at least 1")
        self.token_ids = list(self.prompt_token_ids)

    def arrive(self, number: int, *, id_in_use: bool) -> None:
        """Takes its number among those that were added, as it is added.

        Raises:
            ValueError: its id is that of an unfinished request, or it has been added before.
        """
        if id_in_use:
            raise ValueError(f"request {self.request_id!r}: an unfinished request has this id; use another")
        if self.arrival >= 0:
            raise ValueError(f"request {self.request_id!r}: was added before; make a new Request")
        self.arrival = number

    @property
    def num_known_tokens(self) -> int:
        """Tokens that a step may compute: those the host knows, and those the device will know by then."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that no step is planned for yet; 0 once max_tokens are sampled or in flight."""
        if len(self.output_token_ids) + self.num_in_flight >= self.max_tokens:
            return 0
        return self.num_known_tokens - self.num_computed_tokens
