"""How a request's answers are read, and what they are held to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.engine.prompts import Prompt
from jaxllm.sampling import SamplingParams
from jaxllm.server.answer_parts import CallArguments, CallBegin, Part, Reasoning, Text, merge_parts
from jaxllm.server.call_grammars import (
    Literals,
    auto_grammar,
    named_grammar,
    reasoning_grammar,
    required_grammar,
)
from jaxllm.server.errors import CONSTRAINT, ApiError
from jaxllm.server.reasoning_parsers import REASONING_PARSERS, ReasoningParser
from jaxllm.server.service import Service
from jaxllm.server.tool_parsers import (
    TOOL_PARSERS,
    CallParser,
    NamedCallParser,
    RequiredCallsParser,
    ToolParser,
)
from jaxllm.server.tools import ToolUse
from jaxllm.structured import StructuredOutputsParams


@dataclass(frozen=True)
class AnswerForm:
    """What is to be found in a request's answers.

    Attributes:
        use: of tools.
        tool_parser: what reads calls; None: there are none.
        reasoning_parser: what reads reasoning; None: it is a part of the text.
        include_reasoning: whether reasoning is given out.
        continued: a part of the answer that stands in the prompt.
        new_id: makes ids of calls.
        literals: the vocabulary, for grammars; None without a tokenizer.
    """

    use: ToolUse
    tool_parser: type[ToolParser] | None = None
    reasoning_parser: type[ReasoningParser] | None = None
    include_reasoning: bool = True
    continued: str = ""
    new_id: Callable[[], str] = CallParser.new_id
    literals: Literals | None = None

    def shape(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """The parameters with which such an answer to a prompt is made.

        Raises:
            ValueError: the output is to be held to something that leaves no room for calls.
        """
        if self.tool_parser is not None and self.tool_parser.needs_special_tokens:
            params = replace(params, skip_special_tokens=False)
        held = params.structured_outputs
        if held is not None and self.use.mode != "none":
            raise ValueError(
                "structured_outputs: an output that is held to a form has no calls; leave it out, or set "
                "tool_choice to 'none'"
            )
        held = held or self._calls_alone()
        if held is not None and self.reasoning_parser is not None and self.literals is not None:
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
            parser = self.reasoning_parser(text or "", self.continued)
            held = replace(held, prefix=reasoning_grammar(parser, self.literals))
        return replace(params, structured_outputs=held)

    def rename(self, params: Mapping[str, Any]) -> dict[str, str]:
        """The request's names of what the engine calls otherwise, for errors.

        Args:
            params: what the request asks for by itself.
        """
        return {} if params.get(CONSTRAINT) or self.use.mode == "none" else {CONSTRAINT: "tools"}

    def _calls_alone(self) -> StructuredOutputsParams | None:
        """What holds the output to calls."""
        use = self.use
        if use.mode == "named":
            return StructuredOutputsParams(grammar=named_grammar(use.allowed[0]))
        if use.mode == "required":
            return StructuredOutputsParams(grammar=required_grammar(use.allowed, parallel=use.parallel))
        parser = self.tool_parser
        if parser is None or not any(tool.strict for tool in use.allowed) or self.literals is None:
            return None
        grammar = auto_grammar(use.allowed, parser, self.literals, parallel=use.parallel)
        return StructuredOutputsParams(grammar=grammar)

    def reader(self, prompt: str | None) -> "AnswerReader":
        """What reads one answer to a prompt."""
        reasoning = self.reasoning_parser
        return AnswerReader(
            None if reasoning is None else reasoning(prompt or "", self.continued),
            None if self.tool_parser is None else self.tool_parser(self.use.names),
            include_reasoning=self.include_reasoning,
            parallel=self.use.parallel,
            new_id=self.new_id,
        )

    def shown_tools(self, service: Service) -> list[dict[str, Any]] | None:
        """The tools for the chat template."""
        left_out = service.config.answer.exclude_tools_when_tool_choice_none and self.use.mode == "none"
        return None if left_out or not self.use.tools else [tool.shown() for tool in self.use.tools]


def answer_form(
    use: ToolUse, service: Service, *, include_reasoning: bool = True, continued: str = ""
) -> AnswerForm:
    """What is to be found in the answers to a request.

    Raises:
        ApiError: 400, the server cannot read the calls that the request allows.
    """
    config = service.config.answer
    parser: type[ToolParser] | None = None
    if use.mode == "named":
        parser = NamedCallParser
    elif use.mode == "required":
        parser = RequiredCallsParser
    elif use.mode == "auto":
        if not config.enable_auto_tool_choice or config.tool_call_parser is None:
            text = (
                "tool_choice: 'auto' needs a server that was started with --enable-auto-tool-choice and "
                "--tool-call-parser; 'required', 'none' or a function's name work without"
            )
            raise ApiError(400, text, param="tool_choice", code="unsupported_parameter")
        parser = TOOL_PARSERS.get(config.tool_call_parser)
        if "tools" not in (service.chat_template or service.model_template):
            text = "tools: the chat template has no place for them, so the model would not see them"
            raise ApiError(400, text, param="tools", code="unsupported_parameter")
    reasoning = None if config.reasoning_parser is None else REASONING_PARSERS.get(config.reasoning_parser)
    own = CallParser if config.tool_call_parser is None else TOOL_PARSERS.get(config.tool_call_parser)
    literals = None if service.vocabulary is None else Literals(service.vocabulary)
    return AnswerForm(use, parser, reasoning, include_reasoning, continued, own.new_id, literals)


class AnswerReader:
    """Takes one answer apart, as it arrives."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        calls: ToolParser | None,
        *,
        include_reasoning: bool = True,
        parallel: bool = True,
        new_id: Callable[[], str] = CallParser.new_id,
    ) -> None:
        self._reasoning, self._calls, self._new_id = reasoning, calls, new_id
        self._include_reasoning, self._parallel = include_reasoning, parallel
        self.called = False
        """Whether the answer calls a tool."""

    @property
    def reasoning(self) -> ReasoningParser | None:
        """What reads its reasoning."""
        return self._reasoning

    def read(self, text: str, *, finished: bool) -> list[Part]:
        """Reads on.

        Args:
            finished: whether that is the rest.
        """
        parts: Iterable[Part] = [Text(text)] if text else []
        if self._reasoning is not None:
            parts = [*self._reasoning.feed(text), *(self._reasoning.finish() if finished else ())]
        found = [after for part in parts for after in self._read_calls(part)]
        if finished and self._calls is not None:
            found += self._calls.finish()
        return merge_parts(self._named(part) for part in found if self._is_given(part))

    def _named(self, part: Part) -> Part:
        unnamed = isinstance(part, CallBegin) and not part.id
        return replace(part, id=self._new_id()) if unnamed else part

    def _read_calls(self, part: Part) -> Iterable[Part]:
        return self._calls.feed(part.text) if self._calls and isinstance(part, Text) else (part,)

    def _is_given(self, part: Part) -> bool:
        if isinstance(part, Reasoning):
            return self._include_reasoning
        if isinstance(part, CallBegin | CallArguments):
            self.called = True
            return self._parallel or part.index == 0
        return True
