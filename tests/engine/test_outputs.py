"""What a request gives out, of each kind and for one sample or several."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers_made
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.engine.assembler import OutputAssembler, TokenLogprobs
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.sampling.params import RequestOutputKind, SamplingParams

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizers_made.byte_level())


@cache
def ids(*tokens: str) -> tuple[int, ...]:
    vocab = tokenizers_made.byte_level().get_vocab()
    return tuple(vocab[token] for token in tokens)


def request(**values: Any) -> EngineInput:
    params = SamplingParams(**values)
    return EngineInput(
        prompt="cat",
        prompt_token_ids=ids("cat", "ab", "c"),
        params=params,
        max_tokens=16,
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
    )


def assembler(**values: Any) -> OutputAssembler:
    return OutputAssembler("r", request(**values), vocabulary())


def likely(token_id: int, *top: int) -> TokenLogprobs:
    """Logprobs of a position; its own token has the rank of its place in `top`, or 9."""
    rank = 1 + top.index(token_id) if token_id in top else 9
    return TokenLogprobs(-0.5, rank, top, [-0.5 - i for i in range(len(top))])


def take(made: OutputAssembler) -> RequestOutput:
    output = made.take()
    assert output is not None
    return output


def test_cumulative_outputs_hold_all_so_far() -> None:
    made = assembler()
    made.num_cached_tokens = 2
    made.add_tokens(0, ids("ab"))
    first = take(made)
    made.add_tokens(0, ids("c", "</s>"), finish_reason="stop")
    last = take(made)
    so_far = CompletionOutput(0, "ab", list(ids("ab")), None, None)
    assert first == RequestOutput("r", "cat", list(ids("cat", "ab", "c")), None, [so_far], False, None, 2)
    assert last.finished
    assert last.outputs == [CompletionOutput(0, "abc", list(ids("ab", "c", "</s>")), None, None, "stop")]
    assert last.outputs[0].finished()
    assert made.take() is None


def test_deltas_hold_what_is_new() -> None:
    made = assembler(output_kind=DELTA)
    assert made.take() is None
    made.add_tokens(0, ids("ab"))
    assert take(made).outputs == [CompletionOutput(0, "ab", list(ids("ab")), None, None)]
    assert made.take() is None
    made.add_tokens(0, ids("c"), finish_reason="length")
    last = take(made)
    assert last.outputs == [CompletionOutput(0, "c", list(ids("c")), None, None, "length")]
    assert last.finished
    assert made.take() is None


def test_a_final_output_comes_once() -> None:
    made = assembler(output_kind=FINAL_ONLY)
    made.add_tokens(0, ids("ab"))
    assert made.take() is None
    made.add_tokens(0, ids("c"), finish_reason="stop", stop_reason=ids("c")[0])
    expected = CompletionOutput(0, "ab", list(ids("ab", "c")), None, None, "stop", ids("c")[0])
    assert take(made).outputs == [expected]
    assert made.take() is None


def test_a_stop_string_ends_a_sample_whatever_else_would_have() -> None:
    made = assembler(stop=["bc"], logprobs=0)
    position = likely(0)
    met = made.add_tokens(0, ids("ab", "c", "ab"), logprobs=[position] * 3, finish_reason="length")
    assert met == "bc"
    assert made.finished
    output = take(made).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "bc")
    assert output.token_ids == list(ids("ab", "c"))  # the tokens that wrote it stay, those after it do not
    assert output.logprobs is not None
    assert len(output.logprobs) == 2
    assert output.cumulative_logprob == -1.0


def test_text_that_may_begin_a_stop_string_is_not_shown() -> None:
    for kind, texts in ((CUMULATIVE, ["", "ac"]), (DELTA, ["", "ac"])):
        made = assembler(stop=["ab"], output_kind=kind)
        made.add_tokens(0, ids("a"))
        shown = [take(made).outputs[0].text]
        made.add_tokens(0, ids("c"))
        assert [*shown, take(made).outputs[0].text] == texts
        made.add_tokens(0, ids("a"), finish_reason="length")
        assert take(made).outputs[0].text == ("a" if kind is DELTA else "aca")


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_samples_are_merged_in_order_of_their_index(kind: RequestOutputKind) -> None:
    made = assembler(n=3, output_kind=kind)
    seen: list[RequestOutput | None] = []
    made.add_tokens(2, ids("c"))
    made.add_tokens(0, ids("a"))
    seen.append(made.take())
    made.add_tokens(0, ids("ab", "</s>"), finish_reason="stop")
    made.add_tokens(2, ids("cat"), finish_reason="length")
    seen.append(made.take())
    made.add_tokens(1, ids("b"), finish_reason="length")
    seen.append(made.take())
    shown = [out and {o.index: (o.text, o.finish_reason) for o in out.outputs} for out in seen]
    final = {0: ("aab", "stop"), 1: ("b", "length"), 2: ("ccat", "length")}
    expected = {
        CUMULATIVE: [{0: ("a", None), 1: ("", None), 2: ("c", None)}, final | {1: ("", None)}, final],
        DELTA: [
            {0: ("a", None), 2: ("c", None)},
            {0: ("ab", "stop"), 2: ("cat", "length")},
            {1: ("b", "length")},
        ],
        FINAL_ONLY: [None, None, final],
    }
    assert shown == expected[kind]
    assert all([o.index for o in out.outputs] == sorted(o.index for o in out.outputs) for out in seen if out)
    assert [out.finished for out in seen if out][-1]
    assert not any(out.finished for out in seen[:-1] if out)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 280), min_size=1, max_size=5), st.booleans())
    ),
    st.lists(st.sampled_from(["a", "ab", "cat", "é"]), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_all_kinds_say_the_same(history: list[tuple[int, list[int], bool]], stop: list[str]) -> None:
    """Deltas put together, the last cumulative output and the final output are one and the same."""
    kinds = {kind: assembler(n=3, stop=stop, logprobs=0, output_kind=kind) for kind in RequestOutputKind}
    outputs: dict[RequestOutputKind, list[RequestOutput]] = {kind: [] for kind in kinds}
    for kind, made in kinds.items():
        ended = set()
        for index, token_ids, finishes in history:
            if index not in ended:
                positions = [likely(token_id) for token_id in token_ids]
                reason = "length" if finishes else None
                met = made.add_tokens(index, token_ids, logprobs=positions, finish_reason=reason)
                ended.update({index} if finishes or met else ())
            outputs[kind] += [output for output in [made.take()] if output is not None]
        made.abort()
        outputs[kind] += [output for output in [made.take()] if output is not None]
        assert made.finished
    final = outputs[FINAL_ONLY][-1].outputs
    assert len(outputs[FINAL_ONLY]) == 1
    assert outputs[CUMULATIVE][-1].outputs == final
    for sample in final:
        deltas = [o for output in outputs[DELTA] for o in output.outputs if o.index == sample.index]
        assert "".join(o.text for o in deltas) == sample.text
        assert [token for o in deltas for token in o.token_ids] == sample.token_ids
        assert [position for o in deltas for position in o.logprobs or []] == sample.logprobs
        assert deltas[-1].cumulative_logprob == sample.cumulative_logprob
        assert [o.finish_reason for o in deltas if o.finished()] == [sample.finish_reason]
        shown = [o.text for output in outputs[CUMULATIVE] for o in output.outputs if o.index == sample.index]
        assert all(sample.text.startswith(text) for text in shown)


def test_logprobs_have_the_sampled_token_first_and_then_the_likeliest() -> None:
    made = assembler(logprobs=2)
    a, b, c = ids("a", "b", "c")
    ranked = TokenLogprobs(-3.0, 7, np.array([a, b, c]), np.array([-0.25, -0.5, -1.0], np.float32))  # pyright: ignore[reportArgumentType]
    made.add_tokens(0, [c, b], logprobs=[ranked, ranked._replace(logprob=-0.5, rank=1)])
    output = take(made).outputs[0]
    assert output.logprobs is not None
    assert output.logprobs == [
        {c: Logprob(-3.0, 7, "c"), a: Logprob(-0.25, 1, "a"), b: Logprob(-0.5, 2, "b")},
        {
            b: Logprob(-0.5, 1, "b"),
            a: Logprob(-0.25, 1, "a"),
        },  # its own rank is the sampler's (ties share one)
    ]
    assert [list(position) for position in output.logprobs] == [[c, a, b], [b, a]]
    assert output.cumulative_logprob == -3.5
    assert all(type(entry.logprob) is float for position in output.logprobs for entry in position.values())


def test_the_text_of_tokens_inside_characters() -> None:
    """What begins a character has no text, what completes one all of it, among the alternatives too."""
    made = assembler(logprobs=2)
    begins, completes, other = ids("æĹ", "¥", "¦")
    made.add_tokens(0, [begins], logprobs=[likely(begins, completes)])
    made.add_tokens(0, [completes], logprobs=[likely(completes, other, begins)])
    logprobs = take(made).outputs[0].logprobs
    assert logprobs is not None
    texts = [{token: entry.decoded_token for token, entry in position.items()} for position in logprobs]
    assert texts == [{begins: "", completes: "\ufffd"}, {completes: "日", other: "\u65e6", begins: ""}]


def test_prompt_logprobs_have_none_for_the_first_token() -> None:
    made = assembler(n=2, prompt_logprobs=1, output_kind=DELTA)
    _, second, third = made.input.prompt_token_ids
    made.add_prompt_logprobs([likely(second, third)])
    made.add_tokens(1, ids("a"))
    assert take(made).prompt_logprobs is None  # not all are known
    made.add_prompt_logprobs([likely(third, third)])
    made.add_tokens(0, ids("a"))
    assert take(made).prompt_logprobs == [
        None,
        {second: Logprob(-0.5, 9, "ab"), third: Logprob(-0.5, 1, "c")},
        {third: Logprob(-0.5, 1, "c")},
    ]
    made.add_tokens(0, ids("a"))
    assert take(made).prompt_logprobs is None  # deltas do not repeat them
    with pytest.raises(RuntimeError, match="prompt_logprobs"):
        assembler().add_prompt_logprobs([likely(second)])


def test_without_detokenize_there_is_no_text() -> None:
    made = OutputAssembler("r", request(detokenize=False, logprobs=0), None)
    made.add_tokens(0, ids("a"), logprobs=[likely(ids("a")[0])])
    output = take(made).outputs[0]
    assert (output.text, output.logprobs) == ("", [{ids("a")[0]: Logprob(-0.5, 9, None)}])
    with pytest.raises(ValueError, match="detokenize"):
        OutputAssembler("r", request(), None)


def test_an_abort_gives_out_what_there_is() -> None:
    made = assembler(n=2, output_kind=FINAL_ONLY, stop=["cat"])
    made.add_tokens(0, ids("a"), finish_reason="length")
    made.add_tokens(1, ids("b", "c", "a"))
    made.abort()
    output = take(made)
    assert output.finished
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("a", "length"), ("bca", "abort")]
    with pytest.raises(RuntimeError, match=r"'r'.*sample 1.*finished"):
        made.add_tokens(1, ids("a"))


def test_missing_logprobs_are_noticed() -> None:
    with pytest.raises(ValueError, match="2 tokens came without as many logprobs"):
        assembler(logprobs=1).add_tokens(0, [1, 2], logprobs=[likely(1)])


def test_outputs_print_as_what_they_are() -> None:
    made = assembler()
    made.add_tokens(0, ids("cat"), finish_reason="length")
    shown = repr(take(made))
    assert shown.startswith("RequestOutput(request_id='r', prompt='cat', prompt_token_ids=[")
    assert "CompletionOutput(index=0, text='cat'" in shown
    assert "finish_reason='length'" in shown
