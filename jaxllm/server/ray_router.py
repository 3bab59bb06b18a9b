"""Which replica of a Ray Serve deployment gets a request: near its prefix, by the rule that an engine has."""

from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jaxllm.scheduler.routing import Candidate, choose_replica

MOST_NAMES = 100_000
"""Names of prompts' beginnings that are remembered for each replica; those longest unused go first."""


class PrefixRouter(RequestRouter):
    """Sends a request where prompts that begin like its own have gone, unless there is much more to do there.

    It goes by what it has sent itself, not by what is in the replicas' caches. The names of a prompt's blocks
    are the first argument of a request (`prompt_names`).

    https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
    """

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray Serve.

        Args:
            options: `rows`, the requests that a replica runs at a time.
        """
        self._rows: int = options["rows"]
        self._sent: dict[ReplicaID, OrderedDict[bytes, None]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica first, and then all others that have room."""
        names = _names(pending_request)
        free = self.select_available_replicas(candidate_replicas)
        if not free:
            return []
        candidates = [Candidate(self._load(replica), self._found(replica, names)) for replica in free]
        best = free[choose_replica(candidates, max(1, len(names)), self._rows)]
        others = [replica for replica in free if replica is not best]
        return [[best], others] if others else [[best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remembers where a request went."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        for name in _names(pending_request):
            sent[name] = None
            sent.move_to_end(name)
        while len(sent) > MOST_NAMES:
            sent.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forgets replicas that are there no more."""
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        self._sent = {replica_id: sent for replica_id, sent in self._sent.items() if replica_id in there}

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _found(self, replica: RunningReplica, names: tuple[bytes, ...]) -> int:
        sent = self._sent.get(replica.replica_id, ())
        return next((i for i, name in enumerate(names) if name not in sent), len(names))


def _names(request: PendingRequest | None) -> tuple[bytes, ...]:
    return request.args[0] if request is not None and request.args else ()
