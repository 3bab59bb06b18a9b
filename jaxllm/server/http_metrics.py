"""Requests over HTTP for Prometheus, under the names that prometheus-fastapi-instrumentator and vLLM have."""

from prometheus_client import CollectorRegistry, Counter, Histogram


class HttpMetrics:
    """Counts and times requests by what they asked for; a path that nobody serves is the handler `none`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "status", "handler")
        self._requests = Counter(
            "http_requests", "Requests by method, status and handler.", labels, registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ("method", "handler"),
            registry=registry,
        )

    def observe(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Counts a request that is done."""
        # methods are the client's to choose, and each would be a series of its own
        method = method if method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE") else "other"
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._seconds.labels(method, handler).observe(seconds)
