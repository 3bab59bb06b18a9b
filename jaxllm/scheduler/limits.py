"""What a scheduler's steps and requests may be at most."""

from dataclasses import dataclass

from jaxllm.cache.manager import CacheManager
from jaxllm.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that do not change while a scheduler lives.

    Attributes:
        max_num_seqs: rows, the most requests that run at a time.
        max_num_batched_tokens: most tokens in one step.
        max_model_len: most tokens of one request, prompt and output.
        enable_chunked_prefill: a prompt may be spread over several steps. Otherwise it waits for a step with
            room for all of it; only preempted requests are then computed in pieces, because their outputs may
            have made them longer than a step.
        num_stages: steps that the model's stages work on at a time, if no request is in two of them.

    Raises:
        ValueError: a limit below 1.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_stages"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def check_fits(self, request: Request, cache: CacheManager) -> None:
        """Checks that a request can run at some time, if need be alone.

        Raises:
            ValueError: it is longer than max_model_len, than a step where prompts are not chunked, or than
                all pages.
        """
        prompt, total = len(request.prompt_token_ids), len(request.prompt_token_ids) + request.max_tokens
        what = f"request {request.request_id!r}: {prompt} prompt tokens"
        if total > self.max_model_len:
            raise ValueError(
                f"{what} and max_tokens={request.max_tokens} make {total}, more than "
                f"max_model_len={self.max_model_len}; shorten the prompt or lower max_tokens"
            )
        if not self.enable_chunked_prefill and prompt > self.max_num_batched_tokens:
            raise ValueError(
                f"{what} are more than max_num_batched_tokens={self.max_num_batched_tokens}; "
                f"raise it, or set enable_chunked_prefill=True"
            )
        pages = cache.growth(total - 1)  # the last token is sampled and never computed
        if not self.enable_chunked_prefill:
            pages = max(pages, cache.num_columns(prompt) * len(cache.groups))
        pool = cache.pool.num_pages
        if pages > pool:
            raise ValueError(
                f"{what} and max_tokens={request.max_tokens} need {pages} pages of {cache.page_size} "
                f"tokens and the cache has {pool}; lower max_tokens, or give the cache more memory"
            )
