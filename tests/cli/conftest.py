"""An engine without a model: the commands are tested on what they pass on and what they print."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

import jaxllm
from jaxllm.config import EngineConfig
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.metrics import EngineState, Metrics, RequestMetrics
from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling.params import RequestOutputKind, SamplingParams


class FakeEngine:
    """Answers with the prompt in upper case, a word at a time, and keeps what it was called with."""

    made: "FakeEngine"
    fail_with: Exception | None = None

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.config = EngineConfig.create(model, **options)
        self.requests: list[tuple[Any, SamplingParams]] = []
        self.closed = False
        self.streams_open = 0

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> "FakeEngine":
        if cls.fail_with is not None:
            raise cls.fail_with
        cls.made = cls(model, options)
        return cls.made

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True

    def make_input(self, prompt: list[int]) -> EngineInput:
        return EngineInput(None, tuple(prompt), SamplingParams(top_k=7, temperature=0.5), max_tokens=16)

    def get_metrics(self) -> dict[str, float]:
        now = EngineState(1, 0, 3 if self.streams_open else 0, 100, 0, 0)
        return Metrics().snapshot(now)

    def generate(self, prompts: list[Any], params: SamplingParams, *, progress: bool) -> list[RequestOutput]:
        self.progress = progress
        self.requests += [(prompt, params) for prompt in prompts]
        return [self._output(prompt, params, self._text(prompt), "stop") for prompt in prompts]

    chat = generate

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        assert params.output_kind is RequestOutputKind.DELTA
        self.requests.append((prompt, params))
        self.streams_open += 1
        try:
            words = self._text(prompt).split(" ")
            if "refuse" in self._text(prompt).lower():
                raise ValueError("prompt: 9 tokens do not fit into max_model_len=8")
            for i, word in enumerate(words):
                last = i == len(words) - 1
                yield self._output(prompt, params, word + ("" if last else " "), "length" if last else None)
        finally:
            self.streams_open -= 1

    stream_chat = stream

    def _text(self, prompt: Any) -> str:
        return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).upper()

    def _output(self, prompt: Any, params: SamplingParams, text: str, reason: Any) -> RequestOutput:
        metrics = RequestMetrics(
            10.0,
            5,
            first_token_time=10.25,
            last_token_time=11.25,
            finished_time=11.5,
            num_generation_tokens=9,
        )
        completion = CompletionOutput(0, text, [1, 2], None, None, reason)
        outputs = [dataclasses.replace(completion, index=i) for i in range(params.n)]
        return RequestOutput("0", str(prompt), [1], None, outputs, reason is not None, metrics, 0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """The class that stands in for `jaxllm.Engine`; `.made` is the engine that the command made."""
    monkeypatch.setitem(vars(jaxllm), "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "fail_with", None)
    return FakeEngine
