"""The paged cache's bookkeeping: which pages hold which tokens. Pure Python."""

from jaxllm.cache.groups import CacheLayout, GroupSpec, group_layers
from jaxllm.cache.manager import CacheManager
from jaxllm.cache.pages import NULL_PAGE

__all__ = ["NULL_PAGE", "CacheLayout", "CacheManager", "GroupSpec", "group_layers"]
