"""`LLM`, the class that scripts written for vLLM begin with."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jaxllm.engine.beam_search import BeamSearchOutput
from jaxllm.engine.chat import Conversation
from jaxllm.engine.engine import Engine
from jaxllm.engine.inputs import Prompt
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.vllm_options import translate
from jaxllm.sampling.params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLM:
    """Generates text with a model, under vLLM's names; `Engine` under our own, with streaming besides.

        llm = LLM(model="smollm2-135m-instruct", gpu_memory_utilization=0.8)
        outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0))

    https://docs.vllm.ai/en/stable/api/vllm/entrypoints/llm.html

    Args:
        model: a Hugging Face repo id, a folder, a GGUF file, or a name such as "smollm2-135m-instruct".
        seed: for requests that give none; None stands for 0.
        chat_template: a Jinja template to use in `chat` instead of the tokenizer's own.
        generation_config: "auto": requests without parameters get those of the model's
            generation_config.json; "vllm": they get `SamplingParams()`.
        options: vLLM's engine arguments, such as `tensor_parallel_size`, `dtype`, `max_model_len`,
            `gpu_memory_utilization`, `enable_prefix_caching`, `enforce_eager`; or any of `EngineConfig`'s
            own. Arguments that mean nothing on JAX (such as `swap_space`) are accepted, with one warning.

    Raises:
        CheckpointError: the model cannot be found, read or recognised.
        NotImplementedError: an argument that asks for what is not available (such as `quantization`); the
            message says what to do instead.
        TypeError: an argument that neither vLLM nor jaxllm has.
        ValueError: an argument out of range, or one that does not suit the model or the machine.
    """

    def __init__(
        self,
        model: str,
        *,
        seed: int | None = 0,
        chat_template: str | None = None,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        if generation_config not in ("auto", "vllm"):
            raise NotImplementedError(
                f"generation_config={generation_config!r}: not supported; "
                'choose "auto" (the model\'s) or "vllm" (none), or pass SamplingParams'
            )
        self._chat_template = chat_template
        self._neutral_defaults = generation_config == "vllm"
        self.llm_engine = Engine.from_pretrained(model, seed=seed or 0, **translate(options))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all in the same batches.

        Args:
            prompts: a string, a list of token ids, a dict (`TextPrompt`, `TokensPrompt`), or a list of these.
            sampling_params: for all, or one for each prompt; None: `get_default_sampling_params()`.
            use_tqdm: show a progress bar; or a function to make one with.
            lora_request: not supported.
            priority: one for each prompt; lower values are served first, with `scheduling_policy="priority"`.
            tokenization_kwargs: `truncate_prompt_tokens` and `add_special_tokens`.

        Returns:
            An output for each prompt, in their order.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served; then none has been started.
        """
        _refuse("lora_request", lora_request, "merge the adapter into the weights")
        return self.llm_engine.generate(
            prompts,
            self._params(sampling_params),
            progress=use_tqdm,
            priority=0 if priority is None else priority,
            **_tokenization(tokenization_kwargs),
        )

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several.

        Args:
            messages: a list of messages, each with `role` and `content`, or a list of such lists.
            sampling_params: for all, or one for each conversation; None: `get_default_sampling_params()`.
            use_tqdm: show a progress bar; or a function to make one with.
            lora_request: not supported.
            chat_template: a Jinja template to use instead of the tokenizer's own.
            chat_template_content_format: "auto" or "string": templates are given messages' content as text.
            add_generation_prompt: end each prompt with what introduces the assistant's answer.
            continue_final_message: leave the last message open, for the model to go on writing it.
            tools: functions that the model may call, as JSON schemas.
            chat_template_kwargs: more variables for the template.
            mm_processor_kwargs: not supported.

        Raises:
            ValueError, TypeError: messages or parameters that cannot be served; then none has been started.
        """
        _refuse("lora_request", lora_request, "merge the adapter into the weights")
        _refuse("mm_processor_kwargs", mm_processor_kwargs, "models here read text only")
        if chat_template_content_format not in ("auto", "string"):
            _refuse("chat_template_content_format", chat_template_content_format, 'choose "auto" or "string"')
        return self.llm_engine.chat(
            messages,
            self._params(sampling_params),
            progress=use_tqdm,
            chat_template=chat_template or self._chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: None = None,
    ) -> list[BeamSearchOutput]:
        """Finds each prompt's likeliest outputs with beams; see `jaxllm.engine.beam_search`.

        Args:
            prompts: a string, a list of token ids, a dict (`TextPrompt`, `TokensPrompt`), or a list of these.
            params: for all of them.
            lora_request: not supported.
            use_tqdm: show a progress bar; or a function to make one with.
            concurrency_limit: not supported: beams of all prompts share the batches as far as they fit.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served, such as more beams than half
                of `max_logprobs`; then nothing has been started.
        """
        _refuse("lora_request", lora_request, "merge the adapter into the weights")
        _refuse("concurrency_limit", concurrency_limit, "beams wait for room by themselves; leave it out")
        return self.llm_engine.beam_search(prompts, params, progress=use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without parameters get: the model's own, unless `generation_config="vllm"`."""
        if self._neutral_defaults:
            return SamplingParams()
        return self.llm_engine.default_params

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer.

        Raises:
            ValueError: there is none (`skip_tokenizer_init`).
        """
        return self.llm_engine.get_tokenizer()

    def get_metrics(self) -> dict[str, float]:
        """Counts and times so far, see `Metrics.snapshot` (a flat dict, where vLLM has a list of objects)."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing is forgotten, while requests are running."""
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Gives the device's memory back until `wake_up`; level 1 keeps the weights on the host."""
        self.llm_engine.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Takes the device's memory again after `sleep`.

        Args:
            tags: not supported: weights and pages come back together.
        """
        _refuse("tags", tags, "weights and pages come back together; leave it out")
        self.llm_engine.wake_up()

    def close(self) -> None:
        """Ends all requests and frees the device's memory, as `del` does."""
        self.llm_engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> SamplingParams | Sequence[SamplingParams] | None:
        return SamplingParams() if params is None and self._neutral_defaults else params


def _refuse(name: str, value: object, advice: str) -> None:
    if value is not None:
        raise NotImplementedError(f"{name}={value!r}: not supported; {advice}")


def _tokenization(options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = ("truncate_prompt_tokens", "add_special_tokens")
    for name in options or {}:
        if name not in known:
            raise TypeError(f"tokenization_kwargs: unknown {name!r}; known are {', '.join(known)}")
    return dict(options or {})
