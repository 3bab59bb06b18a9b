"""The engine in one thread: prompts in, outputs out."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxllm.config import EngineConfig
from jaxllm.engine.beam_search import BeamSearch, BeamSearchOutput
from jaxllm.engine.chat import Conversation
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.info import EngineInfo
from jaxllm.engine.inputs import EngineInput, Prompt, TokensPrompt
from jaxllm.engine.loading import EngineParts
from jaxllm.engine.mail import Mail
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.replicating import load_engine
from jaxllm.engine.scoring import SCORING_PARAMS, PromptScore, prompt_score
from jaxllm.engine.sleeping import Sleep
from jaxllm.sampling import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jaxllm.plan.plan import Plan
    from jaxllm.structured.grammar import Grammar


class Engine(EngineInfo):
    """Generates text with a model.

        with Engine.from_pretrained("smollm2-135m-instruct") as engine:
            print(engine.generate("The capital of France is")[0].outputs[0].text)

    Requests given to `generate`, `chat`, `stream` and `add_request` share the same steps. One thread may use
    an engine; `AsyncEngine` serves many.
    """

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._ids = itertools.count()
        self._mail = Mail(parts.core)
        self._sleep = Sleep(parts.core, parts.cores)
        self._closed = False

    @classmethod
    def from_pretrained(cls, model: str, *, mesh: Mesh | None = None, **options: Any) -> Self:
        """Loads a model and compiles its programs.

        Args:
            model: a Hugging Face repo id, a folder, a GGUF file, or a name such as "smollm2-135m-instruct".
            mesh: devices to run on, as `jaxllm.parallel.make_mesh` makes them; by default the first ones.
                With several replicas its axis `data` has a slice for each.
            options: fields of the parts of `EngineConfig`, such as `dtype`, `max_model_len`, `num_pages`.
                `attention_backend` is a registered name, a `pallas_kernels.paged_attention.Backend`, or a
                function in the form of `pallas_kernels.paged_attention.AttentionFunction`.

        Raises:
            CheckpointError: the model cannot be found, read or recognised.
            NotImplementedError: a kernel that was asked for does not serve the model.
            TypeError: an unknown option, or an attention kernel that is none.
            ValueError: an option out of range, or one that does not suit the model or the machine.
        """
        return cls(load_engine(EngineConfig.create(model, **options), mesh))

    @classmethod
    def plan(cls, model: str, target: str, **options: Any) -> "Plan":
        """What a model takes and gives on chips that need not be there; see `jaxllm.plan.entry.make_plan`."""
        from jaxllm.plan.entry import make_plan

        return make_plan(model, target, **options)

    # Whole answers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Callable[..., Any] = False,
        priority: int | Sequence[int] = 0,
        **input_options: Any,
    ) -> list[RequestOutput]:
        """Completes prompts, all in the same batches.

        Args:
            prompts: a string, a list of token ids, a dict (`TextPrompt`, `TokensPrompt`), or a list of these.
            params: for all, or one for each prompt; None: the model's own defaults.
            progress: show a progress bar; or a function to make one with, called as `tqdm` is.
            priority: lower values are served first, where the policy is "priority"; for all, or one for each.
            input_options: `add_special_tokens` and `truncate_prompt_tokens`, see `InputProcessor.make`.

        Returns:
            An output for each prompt, in their order.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served; then none has been started.
            RequestFailedError: something broke while it ran.
        """
        self._check_awake()
        inputs = self._inputs.make_batch(prompts, params, priority=priority, **input_options)
        return self._run([_with_kind(input, RequestOutputKind.FINAL_ONLY) for input in inputs], progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Callable[..., Any] = False,
        priority: int | Sequence[int] = 0,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several.

        Args:
            messages: a list of messages, each with `role` and `content`, or a list of such lists.
            template_options: `tools`, `chat_template`, `add_generation_prompt`, `continue_final_message`,
                `chat_template_kwargs`, see `InputProcessor.render_chat`.
        """
        self._check_awake()
        conversations: Sequence[Any] = [messages] if _is_conversation(messages) else messages
        prompts = [
            self._inputs.render_chat(conversation, **template_options) for conversation in conversations
        ]
        return self.generate(prompts, params, progress=progress, priority=priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        progress: bool | Callable[..., Any] = False,
    ) -> list[BeamSearchOutput]:
        """Finds each prompt's likeliest outputs with beams; see `jaxllm.engine.beam_search`.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served, such as more beams than half
                of the engine's `max_logprobs`; then nothing has been started.
            RequestFailedError: something broke while it ran.
        """
        self._check_awake()
        search = BeamSearch(self._inputs, prompts, params)
        with _progress_bar(progress, search.max_rounds, unit="token") as bar:
            while requests := search.next_requests():
                search.advance(self._run(requests, progress=False))
                bar.update()
        return search.outputs()

    def score(self, prompts: Prompt | Sequence[Prompt], **input_options: Any) -> list[PromptScore]:
        """How likely the model finds texts: the log probability of each prompt's tokens.

        Arguments and errors are those of `generate`. A text has to be shorter than `max_model_len`.
        """
        self._check_awake()
        inputs = self._inputs.make_batch(prompts, SCORING_PARAMS, **input_options)
        return [prompt_score(output) for output in self._run(inputs, progress=False)]

    def _run(self, inputs: Sequence[EngineInput], progress: bool | Callable[..., Any]) -> list[RequestOutput]:
        """Runs requests to their ends; none of them is left behind if this is interrupted."""
        ids = [self._next_id() for _ in inputs]
        bar = _progress_bar(progress, len(ids))
        done: dict[str, RequestOutput] = {}
        try:
            with self._mail.reading(ids) as outputs:
                for request_id, input in zip(ids, inputs, strict=True):
                    self._core.add(request_id, input)
                while len(done) < len(ids):
                    output = next(outputs)
                    done[output.request_id] = output
                    bar.update()
        finally:
            bar.close()
        return [self._checked(done[request_id]) for request_id in ids]

    def _checked(self, output: RequestOutput) -> RequestOutput:
        """The output, unless the request failed."""
        if any(sample.finish_reason == "error" for sample in output.outputs):
            if isinstance(output.error, ValueError):
                raise output.error
            raise RequestFailedError(f"{output.request_id} failed") from self._core.last_error
        return output

    # Answers as they grow

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **input_options: Any
    ) -> Generator[RequestOutput, None, None]:
        """Completes one prompt and yields what is new with each step.

        The outputs are deltas unless `params.output_kind` asks for something else than the default. A stream
        that is not read to its end is aborted when it is closed.
        """
        self._check_awake()
        input = self._inputs.make(prompt, params, **input_options)
        if input.params.output_kind is RequestOutputKind.CUMULATIVE:
            input = _with_kind(input, RequestOutputKind.DELTA)
        return self._stream(input)

    def stream_chat(
        self, messages: Conversation, params: SamplingParams | None = None, **template_options: Any
    ) -> Generator[RequestOutput, None, None]:
        """Answers a conversation as `stream` completes a prompt."""
        self._check_awake()
        return self.stream(self._inputs.render_chat(messages, **template_options), params)

    def _stream(self, input: EngineInput) -> Generator[RequestOutput, None, None]:
        request_id = self._next_id()
        with self._mail.reading([request_id]) as outputs:
            self._core.add(request_id, input)
            finished = False
            while not finished:
                output = next(outputs)
                finished = output.finished
                yield self._checked(output)

    # One step at a time

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **input_options: Any,
    ) -> None:
        """Adds a request for `step` to work on.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served, or an id in use.
        """
        self.add_input(request_id, self.make_input(prompt, params, priority=priority, **input_options))

    def make_input(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> EngineInput:
        """Tokenizes and checks a request; see `InputProcessor.make`. May be called from any thread."""
        return self._inputs.make(prompt, params, **options)

    def begin_grammar(self, params: SamplingParams | None) -> "Future[Grammar] | None":
        """See `InputProcessor.begin_grammar`. May be called from any thread."""
        return self._inputs.begin_grammar(params)

    def render_chat(self, messages: Conversation, **template_options: Any) -> TokensPrompt:
        """A conversation as a prompt; see `InputProcessor.render_chat`. May be called from any thread."""
        return self._inputs.render_chat(messages, **template_options)

    def add_input(self, request_id: str, input: EngineInput) -> None:
        """Adds a request that `make_input` made.

        Raises:
            ValueError: the id is in use, or the request can never fit.
        """
        self._check_awake()
        self._core.add(request_id, input)

    def step(self) -> list[RequestOutput]:
        """Runs one step, and returns the outputs of requests that have something new."""
        self._check_awake()
        self._mail.advance()
        return self._mail.take_unclaimed()

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request; its last output, or None if there is no unfinished request of this id."""
        output = self._core.abort(request_id)
        if output is not None:
            self._mail.tell_reader(output)
        return output

    def abort_all(self) -> list[RequestOutput]:
        """Ends every request; their last outputs."""
        outputs = self._core.abort_all()
        for output in outputs:
            self._mail.tell_reader(output)
        return outputs

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that have not given out their last output."""
        return self._core.num_unfinished

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self._core.has_unfinished or self._mail.has_unclaimed

    def _next_id(self) -> str:
        """An id that no unfinished request has."""
        while (request_id := f"request-{next(self._ids)}") in self._core:
            pass
        return request_id

    # The engine itself

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing is forgotten, while requests are running."""
        if len(self._cores) > 1 and self._core.has_unfinished:
            return False  # else some replicas might forget, and others not
        done = [core.scheduler.reset_prefix_cache() for core in self._cores]
        return all(done)

    def sleep(self, level: int = 1) -> None:
        """Gives the device's memory back until `wake_up`: all pages, and the weights.

        Args:
            level: 1 keeps the weights in the host's memory, 2 drops them, and `wake_up` loads them again.

        Raises:
            ValueError: another level.
            RuntimeError: requests are running.
        """
        self._check_awake()
        self._sleep.begin(level)

    def wake_up(self) -> None:
        """Takes the device's memory again after `sleep`. Does nothing while awake.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_open()
        self._sleep.end()

    def restart(self) -> None:
        """Starts over after `step` or `generate` has failed for a reason that was no request's own.

        Unfinished requests are forgotten, pages are empty, and nothing is compiled again. Weights are
        loaded again only where experts were being moved.

        Raises:
            RuntimeError: the engine is closed.
            Exception: pages cannot be made, or weights cannot be loaded. It may be tried again.
        """
        self._check_open()
        self._mail.clear()
        self._core.restart()

    def limit_restarts(self, most: int, seconds: float) -> None:
        """Has each of several replicas start over by itself at most so often within so many seconds."""
        if isinstance(self._core, Replicas):
            self._core.limit_restarts(most, seconds)

    @property
    def is_sleeping(self) -> bool:
        """Whether it sleeps."""
        return self._sleep.active

    def close(self) -> None:
        """Ends all requests and frees the device's memory. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self.abort_all()
            if isinstance(self._core, Replicas):
                self._core.close()
            for core in self._cores:
                core.runner.close()
            self._inputs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed, and when the interpreter goes the memory goes with it
        if hasattr(self, "_closed") and not sys.is_finalizing():
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make another")

    def _check_awake(self) -> None:
        self._check_open()
        if self.failure is not None:
            raise EngineFailedError("the engine has failed; call restart()") from self.failure
        if self._sleep.active:
            raise RuntimeError("the engine sleeps; call wake_up() first")


def _is_conversation(messages: Any) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping)


def _with_kind(input: EngineInput, kind: RequestOutputKind) -> EngineInput:
    return dataclasses.replace(input, params=dataclasses.replace(input.params, output_kind=kind))


def _progress_bar(progress: bool | Callable[..., Any], total: int, unit: str = "request") -> Any:
    make = progress if callable(progress) else tqdm
    return make(total=total, desc="Generating", unit=unit, disable=not progress)
