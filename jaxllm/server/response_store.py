"""What `/v1/responses` keeps: answers, and the conversations that they end."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxllm.server.errors import ApiError
from jaxllm.server.response_types import ResponseObject


@dataclass
class StoredResponse:
    """An answer, done or on its way.

    Attributes:
        body: the answer as clients get it, as far as it is known.
        messages: the conversation that it answers, and it itself once it is done.
        cancel: ends it while it is on its way.
    """

    body: ResponseObject
    messages: list[dict[str, Any]]
    cancel: Callable[[], None] | None = field(default=None, repr=False)


class ResponseStore:
    """Keeps a bounded number of answers in memory. Ids are random, and whoever has one may read the answer.

    Args:
        capacity: most answers; beyond it the oldest go.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._found: OrderedDict[str, StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def put(self, response: StoredResponse) -> None:
        """Adds an answer."""
        self._found[response.body["id"]] = response
        while len(self._found) > self._capacity:
            self._found.popitem(last=False)

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Finds an answer.

        Raises:
            ApiError: 404, it is not kept, or not any more.
        """
        found = self._found.get(response_id)
        if found is None:
            text = f"{param or 'response'}: {response_id[:200]!r} is not stored, or not any more"
            raise ApiError(404, text, param=param, code="response_not_found")
        return found

    def delete(self, response_id: str) -> None:
        """Forgets an answer.

        Raises:
            ApiError: 404, it is not kept.
        """
        self.get(response_id)
        del self._found[response_id]
