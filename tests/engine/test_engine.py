"""What the engine does for its caller: answers, streams, and steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import golden, greedy, small_engine
from small_text import BOS, USER, text_checkpoint

from jaxllm import Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.engine.core import EngineCore

SIZES: dict[str, Any] = {"max_model_len": 96, "num_pages": 60}
"""As in the other tests, so that their compiled programs serve here."""
REFERENCE = golden("llama")
PROMPT: list[int] = REFERENCE["prompt0"].tolist()
EXPECTED: list[int] = REFERENCE["tokens0"].tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with small_engine(str(folder), skip_tokenizer_init=False, **SIZES) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_left_behind(engine: Engine) -> Iterator[None]:
    yield
    assert not engine.has_unfinished_requests()
    assert engine._core.scheduler.cache.stats().num_used == 0


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Steps until nothing is left; each request's last output."""
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    return last


# Whole answers


def test_every_form_of_prompt(engine: Engine) -> None:
    ids = engine.get_tokenizer().encode("what is it")
    assert ids[0] == BOS
    forms: list[Any] = ["what is it", ids, {"prompt": "what is it"}, {"prompt_token_ids": ids}]
    together = engine.generate(forms, GREEDY)
    alone = [engine.generate(form, GREEDY) for form in forms]
    assert [len(outputs) for outputs in alone] == [1] * 4
    assert [output.prompt for output in together] == ["what is it", None] * 2
    for output in [*together, *(outputs[0] for outputs in alone)]:
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == together[0].outputs[0].token_ids
        assert output.outputs[0].text == together[0].outputs[0].text
        assert output.finished


def test_the_text_is_what_the_tokens_say(engine: Engine) -> None:
    [output] = engine.generate([PROMPT], GREEDY)
    assert output.outputs[0].token_ids == EXPECTED[:12]
    assert output.outputs[0].text == engine.get_tokenizer().decode(EXPECTED[:12], skip_special_tokens=True)
    assert output.outputs[0].finish_reason == "length"


def test_one_set_of_parameters_or_one_for_each(engine: Engine) -> None:
    lengths = [1, 5, 3]
    each = [dataclasses.replace(GREEDY, max_tokens=length) for length in lengths]
    assert tokens(engine.generate([PROMPT] * 3, each)) == [EXPECTED[:length] for length in lengths]
    assert tokens(engine.generate([PROMPT] * 3, GREEDY)) == [EXPECTED[:12]] * 3
    with pytest.raises(ValueError, match="sampling_params: 3 given for 2 prompts"):
        engine.generate([PROMPT] * 2, each)


def test_more_prompts_than_rows_come_back_in_order(engine: Engine) -> None:
    prompts = [PROMPT[: 3 + i] for i in range(15)]
    together = engine.generate(prompts, [greedy(1 + 5 * (i % 3)) for i in range(15)])
    assert [output.prompt_token_ids for output in together] == prompts
    assert [len(output.outputs[0].token_ids) for output in together] == [1, 6, 11] * 5


def test_no_prompts(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_progress(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    class Bar:
        def __init__(self, *, total: int, **options: Any) -> None:
            self.total, self.done, self.closed = total, 0, False
            made.append(self)

        def update(self) -> None:
            self.done += 1

        def close(self) -> None:
            self.closed = True

    engine.generate([PROMPT] * 3, GREEDY, progress=Bar)
    assert [(bar.total, bar.done, bar.closed) for bar in made] == [(3, 3, True)]
    assert capsys.readouterr() == ("", "")
    engine.generate([PROMPT] * 3, GREEDY, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err


def test_interrupted_work_is_dropped(engine: Engine) -> None:
    class Bar:
        def __init__(self, **options: Any) -> None:
            pass

        def update(self) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT] * 3, [greedy(2), greedy(40), greedy(40)], progress=Bar)
    assert engine.num_unfinished_requests == 0
    assert tokens(engine.generate([PROMPT], GREEDY)) == [EXPECTED[:12]]


def test_samples(engine: Engine) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True)
    [output] = engine.generate([PROMPT], params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    assert all(sample.finished() for sample in output.outputs)


def test_chat(engine: Engine) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
    [output] = engine.chat(conversation, GREEDY)
    assert output.prompt == "<s><|user|>hi<|user|>you>"
    assert output.prompt_token_ids.count(USER) == 2
    assert output.prompt_token_ids.count(BOS) == 1
    [plain] = engine.generate(output.prompt_token_ids, GREEDY)
    assert output.outputs[0].text == plain.outputs[0].text
    several = engine.chat([conversation, conversation[:1]], GREEDY, add_generation_prompt=False)
    assert [o.prompt for o in several] == ["<s><|user|>hi<|user|>you", "<s><|user|>hi"]
    assert "".join(o.outputs[0].text for o in engine.stream_chat(conversation, GREEDY)) == (
        output.outputs[0].text
    )


def test_low_values_are_served_first() -> None:
    with small_engine(policy="priority", enforce_eager=True, **SIZES) as engine:
        for i in range(18):
            engine.add_request(f"{i}", PROMPT[: 5 + i], greedy(4), priority=-i)
        order = []
        while engine.has_unfinished_requests():
            order += [int(output.request_id) for output in engine.step() if output.finished]
    assert sorted(order) == list(range(18))
    assert set(order[:6]) == set(range(12, 18))
    assert set(order[-6:]) == set(range(6))


def test_a_list_of_priorities(engine: Engine) -> None:
    assert tokens(engine.generate([PROMPT] * 2, GREEDY, priority=[3, 1])) == [EXPECTED[:12]] * 2
    with pytest.raises(ValueError, match="priority: 3 given for 2 prompts"):
        engine.generate([PROMPT] * 2, GREEDY, priority=[1, 2, 3])


# Answers as they grow


def test_deltas_join_to_the_whole(engine: Engine) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=40, logprobs=2)
    [whole] = engine.generate([PROMPT], params)
    deltas = list(engine.stream(PROMPT, params))
    samples = [delta.outputs[0] for delta in deltas]
    assert len(deltas) > 30
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert "".join(sample.text for sample in samples) == whole.outputs[0].text
    assert [token for sample in samples for token in sample.token_ids] == whole.outputs[0].token_ids
    assert [entry for sample in samples for entry in sample.logprobs or ()] == whole.outputs[0].logprobs
    assert samples[-1].cumulative_logprob == whole.outputs[0].cumulative_logprob


def test_a_stream_of_samples(engine: Engine) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=8, ignore_eos=True)
    [whole] = engine.generate([PROMPT], params)
    texts = ["", ""]
    for output in engine.stream(PROMPT, params):
        for sample in output.outputs:
            texts[sample.index] += sample.text
    assert texts == [sample.text for sample in whole.outputs]


def test_a_stream_that_is_closed_is_aborted(engine: Engine) -> None:
    stream = engine.stream(PROMPT, greedy(50))
    next(stream)
    assert engine.num_unfinished_requests == 1
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert engine.num_unfinished_requests == 0
    for _ in engine.stream(PROMPT, greedy(50)):
        break
    assert engine.num_unfinished_requests == 0


def test_streams_side_by_side(engine: Engine) -> None:
    """Each reads what the steps of others have brought for it."""
    found: dict[int, list[int]] = {0: [], 1: []}
    streams = {i: engine.stream(PROMPT, greedy(12)) for i in found}
    engine.add_request("mine", PROMPT, greedy(12))
    first = next(streams[0])
    found[0] += first.outputs[0].token_ids
    mine = finish(engine)
    assert mine.keys() == {"mine"}
    assert tokens(engine.generate([PROMPT], greedy(12))) == [EXPECTED[:12]]
    while streams:
        for i, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[i]
            else:
                found[i] += output.outputs[0].token_ids
    assert found == {0: EXPECTED[:12], 1: EXPECTED[:12]}


def test_a_stream_whose_request_is_ended_by_others_ends(engine: Engine) -> None:
    for abort in (lambda output: engine.abort_request(output.request_id), lambda _: engine.abort_all()):
        stream = engine.stream(PROMPT, greedy(50))
        found = [next(stream), next(stream)]
        abort(found[0])
        found += stream
        assert found[-1].finished
        assert found[-1].outputs[0].finish_reason == "abort"
        assert [token for output in found for token in output.outputs[0].token_ids] == EXPECTED[:2]


# One step at a time


def test_ids_that_look_like_our_own(engine: Engine) -> None:
    [output] = engine.generate([PROMPT], greedy(1))
    number = int(output.request_id.removeprefix("request-"))
    engine.add_request(f"request-{number + 1}", PROMPT, GREEDY)
    assert tokens(engine.generate([PROMPT], greedy(2))) == [EXPECTED[:2]]
    assert finish(engine)[f"request-{number + 1}"].outputs[0].token_ids == EXPECTED[:12]


def test_steps(engine: Engine) -> None:
    engine.add_request("a", PROMPT, greedy(12))
    engine.add_request("b", PROMPT[:7], greedy(3))
    with pytest.raises(ValueError, match=r"request_id='a': .*choose another"):
        engine.add_request("a", PROMPT, greedy(3))
    assert engine.num_unfinished_requests == 2
    seen: dict[str, list[int]] = {"a": [], "b": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen[output.request_id].append(len(output.outputs[0].token_ids))
    assert seen == {"a": list(range(1, 13)), "b": [1, 2, 3]}
    assert engine.step() == []
    engine.add_request("a", PROMPT, greedy(12))  # the id is free again
    assert finish(engine)["a"].outputs[0].token_ids == EXPECTED[:12]


def test_abort(engine: Engine) -> None:
    engine.add_request("a", PROMPT, GREEDY)
    engine.add_request("b", PROMPT, GREEDY)
    while not (outputs := engine.step()):
        pass
    assert {output.request_id for output in outputs} <= {"a", "b"}
    aborted = engine.abort_request("a")
    assert aborted is not None
    assert aborted.finished
    assert aborted.outputs[0].finish_reason == "abort"
    assert 1 <= len(aborted.outputs[0].token_ids) < 12
    assert aborted.outputs[0].token_ids == EXPECTED[: len(aborted.outputs[0].token_ids)]
    assert engine.abort_request("a") is None
    rest = finish(engine)
    assert rest.keys() == {"b"}
    assert rest["b"].outputs[0].token_ids == EXPECTED[:12]


def test_abort_all(engine: Engine) -> None:
    for i in range(9):  # more than there are rows
        engine.add_request(f"{i}", PROMPT, GREEDY)
    engine.step()
    outputs = engine.abort_all()
    assert {output.request_id for output in outputs} == {f"{i}" for i in range(9)}
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}


def test_page_tables(engine: Engine) -> None:
    engine.add_request("a", PROMPT, greedy(4))
    engine.step()
    engine.step()
    [table] = engine.get_page_tables()["a"]
    assert len(table) == -(-len(PROMPT) // 4)
    assert len(set(table)) == len(table)
    assert 0 not in table
    finish(engine)
    assert engine.get_page_tables() == {}


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_generate_loses_nobody_elses_outputs(engine: Engine, kind: RequestOutputKind) -> None:
    engine.add_request("other", PROMPT, greedy(12, output_kind=kind))
    assert tokens(engine.generate([PROMPT[:9]], greedy(20)))
    assert engine.has_unfinished_requests()  # "other" has ended meanwhile, and nobody has read it
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"other"}
    assert outputs[-1].finished
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert (
        counts
        == {
            RequestOutputKind.CUMULATIVE: list(range(1, 13)),
            RequestOutputKind.DELTA: [1] * 12,
            RequestOutputKind.FINAL_ONLY: [12],
        }[kind]
    )


# The engine itself


def test_prefix_cache_is_forgotten(engine: Engine) -> None:
    assert engine.reset_prefix_cache()
    cached = []
    for _ in range(2):
        cached.append(engine.generate([PROMPT], GREEDY)[0].num_cached_tokens)
    assert engine.reset_prefix_cache()
    cached.append(engine.generate([PROMPT], GREEDY)[0].num_cached_tokens)
    assert cached == [0, 40, 0]
    engine.add_request("a", PROMPT, greedy(4))
    engine.step()
    assert not engine.reset_prefix_cache()
    finish(engine)
    assert engine.generate([PROMPT], GREEDY)[0].num_cached_tokens == 40


def test_metrics(engine: Engine) -> None:
    engine.reset_prefix_cache()
    before = engine.get_metrics()
    engine.generate([PROMPT, PROMPT[:9]], greedy(6))
    after = engine.get_metrics()
    grown = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert grown["requests_total"] == grown["requests_finished_length_total"] == 2
    assert grown["prompt_tokens_total"] == 41 + 9
    assert grown["generation_tokens_total"] == 12
    assert grown["programs_compiled_late_total"] == after["requests_running"] == after["pages_used"] == 0
    assert after["num_pages"] == 60
    assert after["programs"] > 5
    engine.add_request("a", PROMPT, greedy(4))
    engine.step()
    running = engine.get_metrics()
    assert running["requests_running"] == 1
    assert running["pages_used"] > 0
    finish(engine)


def test_tokenizer(engine: Engine) -> None:
    assert len(engine.get_tokenizer()) == 125
    with (
        small_engine(enforce_eager=True, **SIZES) as without,
        pytest.raises(ValueError, match="skip_tokenizer_init"),
    ):
        without.get_tokenizer()


def test_sleep_refusals(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"level=3: must be 1 .* or 2"):
        engine.sleep(3)
    engine.add_request("a", PROMPT, GREEDY)
    with pytest.raises(RuntimeError, match="1 unfinished request; finish or abort"):
        engine.sleep()
    engine.abort_request("a")
    assert tokens(engine.generate([PROMPT], GREEDY)) == [EXPECTED[:12]]


def test_a_step_in_flight_keeps_no_logits(engine: Engine) -> None:
    engine.add_request("one", "what is it", GREEDY)
    engine.step()
    core = engine._core
    assert isinstance(core, EngineCore)
    assert [step.step.forward for step in core._in_flight] == [None]
    finish(engine)
