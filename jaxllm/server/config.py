"""What the server is told: where it listens, who may ask, and how much it takes on.

As in `jaxllm.config` each field carries its help text, and the flags of `jaxllm serve` are made from it. The
names are vLLM's where it has the option: https://docs.vllm.ai/en/stable/cli/serve/
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from jaxllm.config import option

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["text", "json"]
MEBIBYTE = 1 << 20
KEY_VARIABLE = "JAXLLM_API_KEY"
"""Environment variable with keys, apart by commas."""


def _at_least(least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{name}={value}: must be a number of at least {least:g}")


@dataclass(frozen=True)
class ListenConfig:
    """Where the server listens."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    uds: str | None = option(None, "path of a Unix socket to listen on instead")
    root_path: str = option(
        "", "path under which a proxy serves this server, such as /llm; the proxy may strip it or not"
    )
    ssl_keyfile: str | None = option(None, "file with the TLS key")
    ssl_certfile: str | None = option(None, "file with the TLS certificate")
    ssl_ca_certs: str | None = option(
        None, "file with the certificates that clients' ones are checked against"
    )
    ssl_cert_reqs: int = option(
        0, "whether clients need a certificate: 0 no, 1 checked if there is one, 2 yes"
    )
    allowed_origins: Sequence[str] = option((), "web pages from here may call the server (CORS); '*' for all")
    h11_max_incomplete_event_size: int = option(65536, "most bytes of a request's headers")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: must be 0 to 65535")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile: needs ssl_certfile, and the other way round")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"ssl_cert_reqs={self.ssl_cert_reqs}: must be 0, 1 or 2")
        for name in ("ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(self, name) and self.ssl_certfile is None:  # no TLS, and so no client is checked
                raise ValueError(f"{name}: needs ssl_certfile and ssl_keyfile")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path={self.root_path!r}: must begin with a slash and end without")
        _at_least(1024, h11_max_incomplete_event_size=self.h11_max_incomplete_event_size)


@dataclass(frozen=True)
class AccessConfig:
    """Who may ask, and for what."""

    api_key: Sequence[str] = option((), "keys that clients may come with; without any, nobody needs one")
    api_key_file: Path | None = option(None, "file with a key on each line")
    cache_salt_per_key: bool = option(False, "let requests with different keys share no prefix cache")
    metrics_without_key: bool = option(False, "let /metrics be read without a key")
    served_model_name: Sequence[str] = option((), "the model's names for clients (default: MODEL)")
    chat_template: str | None = option(
        None, "Jinja template for chats, or a file with one, instead of the model's"
    )
    trust_request_chat_template: bool = option(False, "let requests bring their own chat template")
    admin: bool = option(
        False, "serve /sleep, /wake_up, /is_sleeping, /reset_prefix_cache, /start_profile, /stop_profile"
    )
    ui: bool = option(True, "serve a page at / to chat with the model and to watch the engine")
    vllm_metrics: bool = option(False, "give every metric under the prefix vllm: as well")

    def with_keys_of(self, environment: Mapping[str, str]) -> "AccessConfig":
        """The same, with the keys of `KEY_VARIABLE` besides its own."""
        keys = (key.strip() for key in environment.get(KEY_VARIABLE, "").split(","))
        return replace(self, api_key=(*self.api_key, *filter(None, keys)))


@dataclass(frozen=True)
class AnswerConfig:
    """How calls of tools and reasoning are found in what the model writes."""

    enable_auto_tool_choice: bool = option(
        False, "let the model decide itself whether it calls a tool; needs --tool-call-parser"
    )
    tool_call_parser: str | None = option(
        None, "form in which the model writes calls: hermes (also Qwen), llama3_json, mistral, pythonic"
    )
    tool_parser_plugin: Path | None = option(
        None, "Python file that registers more of them (jaxllm.server.tool_parsers)"
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "do not show the model its tools when tool_choice is none"
    )
    reasoning_parser: str | None = option(
        None, "form in which the model writes its reasoning: deepseek_r1, qwen3"
    )
    reasoning_parser_plugin: Path | None = option(
        None, "Python file that registers more of them (jaxllm.server.reasoning_parsers)"
    )

    def __post_init__(self) -> None:
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice: needs tool_call_parser")


@dataclass(frozen=True)
class LimitConfig:
    """How much the server takes on."""

    max_num_queued_reqs: int = option(1024, "most outputs that wait for a place in a step; beyond it 503")
    request_timeout: float = option(600.0, "most seconds for a request; a client may ask for fewer")
    shutdown_timeout: int = option(30, "most seconds that running requests have left after SIGTERM")
    sse_keep_alive: float = option(15.0, "seconds without a token after which a stream gets a comment")
    max_body_bytes: int = option(8 * MEBIBYTE, "most bytes of a request's body")
    max_stored_responses: int = option(1000, "answers of /v1/responses that are kept; the oldest go first")
    max_grammar_size: int = option(65536, "most bytes of the schema, regex or grammar of a request")
    max_outputs: int = option(128, "most outputs of one request: n times its prompts")

    rate_limit_requests: int | None = option(
        None, "most requests of a key in a minute, of all together where there are no keys; beyond it 429"
    )
    rate_limit_tokens: int | None = option(
        None, "the same for tokens, of prompts and outputs; while they are used up 429"
    )
    max_engine_restarts: int = option(3, "how often a failed engine, or replica, may start over by itself")
    engine_restart_window: float = option(300.0, "seconds in which --max-engine-restarts are counted")

    def __post_init__(self) -> None:
        _at_least(0, max_engine_restarts=self.max_engine_restarts)
        _at_least(1, engine_restart_window=self.engine_restart_window)
        _at_least(0, max_num_queued_reqs=self.max_num_queued_reqs, shutdown_timeout=self.shutdown_timeout)
        _at_least(0, max_stored_responses=self.max_stored_responses)
        _at_least(1, rate_limit_requests=self.rate_limit_requests, rate_limit_tokens=self.rate_limit_tokens)
        _at_least(0.001, request_timeout=self.request_timeout, sse_keep_alive=self.sse_keep_alive)
        _at_least(1, max_body_bytes=self.max_body_bytes, max_outputs=self.max_outputs)
        _at_least(1, max_grammar_size=self.max_grammar_size)

    @property
    def is_rate_limited(self) -> bool:
        """Whether keys have limits."""
        return self.rate_limit_requests is not None or self.rate_limit_tokens is not None


@dataclass(frozen=True)
class LogConfig:
    """What is logged, on stderr."""

    log_level: LogLevel = option("info", "least severe messages that are logged")
    log_format: LogFormat = option("text", "lines for people, or a JSON object a line")
    disable_log_requests: bool = option(False, "do not log a line for each request")

    def __post_init__(self) -> None:
        for name, kind in (("log_level", LogLevel), ("log_format", LogFormat)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}"
                )


@dataclass(frozen=True)
class ObserveConfig:
    """How one can look on."""

    profile_dir: Path | None = option(
        None, "folder for what /start_profile and /stop_profile record; needs --admin"
    )
    otlp_traces_endpoint: str | None = option(
        None, "OpenTelemetry collector for traces, OTLP over HTTP, such as http://localhost:4318/v1/traces"
    )

    def __post_init__(self) -> None:
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint={endpoint!r}: must begin with http:// or https://")


@dataclass(frozen=True)
class ServerConfig:
    """All that the server is told, in parts."""

    listen: ListenConfig = ListenConfig()
    access: AccessConfig = AccessConfig()
    answer: AnswerConfig = AnswerConfig()
    limits: LimitConfig = LimitConfig()
    log: LogConfig = LogConfig()
    observe: ObserveConfig = ObserveConfig()

    def __post_init__(self) -> None:
        if self.observe.profile_dir is not None and not self.access.admin:
            raise ValueError("profile_dir: needs admin; without it nobody can ask for a profile")


PARTS: dict[str, type] = get_type_hints(ServerConfig)
"""The parts of `ServerConfig` by name."""
