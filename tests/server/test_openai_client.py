"""OpenAI's own client on completions and chats: every field does what it does in the engine."""

import asyncio
import json

import openai
import pytest
from running import Running

PROMPT = "abc"
GREEDY = {"model": "tiny", "temperature": 0}


def text(server: Running, prompt=PROMPT, **params) -> str:
    return (
        server.openai.completions.create(prompt=prompt, **{**GREEDY, "max_tokens": 8, **params})
        .choices[0]
        .text
    )


def test_models(server: Running) -> None:
    assert [model.id for model in server.openai.models.list()] == ["tiny", "small"]
    assert server.openai.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_prompts_as_text_ids_and_lists_of_both(server: Running) -> None:
    client = server.openai
    ids = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    one = client.completions.create(prompt=PROMPT, max_tokens=6, **GREEDY)
    assert (
        client.completions.create(prompt=ids, max_tokens=6, **GREEDY).choices[0].text == one.choices[0].text
    )
    other = text(server, "xyz", max_tokens=6)
    both = client.completions.create(prompt=[PROMPT, "xyz"], max_tokens=6, **GREEDY)
    assert [choice.text for choice in both.choices] == [one.choices[0].text, other]
    mixed = client.completions.create(prompt=["xyz", ids], max_tokens=6, **GREEDY)
    assert [(choice.index, choice.text) for choice in mixed.choices] == [(0, other), (1, one.choices[0].text)]
    assert mixed.usage.prompt_tokens == 2 * len(ids)
    assert mixed.usage.completion_tokens == 12


def test_a_stream_joins_to_the_whole(server: Running) -> None:
    client = server.openai
    whole = client.completions.create(prompt=[PROMPT, "q"], max_tokens=20, **GREEDY)
    parts = ["", ""]
    reasons, usage = {}, None
    options = {"include_usage": True}
    for chunk in client.completions.create(
        prompt=[PROMPT, "q"], max_tokens=20, stream=True, stream_options=options, **GREEDY
    ):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert parts == [choice.text for choice in whole.choices]
    assert reasons == {0: "length", 1: "length"}
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 40


def test_chat_and_its_stream(server: Running) -> None:
    client, messages = server.openai, [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(messages=messages, max_completion_tokens=12, **GREEDY)
    answer = whole.choices[0].message
    assert (answer.role, whole.choices[0].finish_reason) == ("assistant", "length")
    chunks = list(
        client.chat.completions.create(
            messages=messages,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            **GREEDY,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)


def test_chat_goes_to_the_end_of_the_context_without_a_limit(server: Running) -> None:
    answer = server.openai.chat.completions.create(
        messages=[{"role": "user", "content": "hi"}], extra_body={"ignore_eos": True}, **GREEDY
    )
    assert answer.usage.total_tokens == 128


def test_the_async_client_many_at_once(server: Running) -> None:
    expected = [text(server, prompt, max_tokens=10) for prompt in "abcdefghijkl"]

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def stream(prompt: str) -> str:
                found = await client.completions.create(prompt=prompt, max_tokens=10, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in found])

            assert await asyncio.gather(*map(stream, "abcdefghijkl")) == expected

    asyncio.run(main())
    server.wait_idle()


def test_seed_and_n(server: Running) -> None:
    def sample(**params):
        found = server.openai.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=1.5, **params
        )
        return [choice.text for choice in found.choices]

    three = sample(n=3, seed=5)
    assert three == sample(n=3, seed=5)
    assert len(set(three)) == 3
    assert sample(seed=5) == three[:1]
    assert sample(seed=6) != three[:1]


def test_stop(server: Running) -> None:
    whole = text(server, max_tokens=16)
    stop = whole[3:5]
    found = server.openai.completions.create(prompt=PROMPT, max_tokens=16, stop=[stop], **GREEDY).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert found.model_dump()["stop_reason"] == stop
    kept = {"include_stop_str_in_output": True}
    end = whole.index(stop) + len(stop)
    assert text(server, max_tokens=16, stop=stop, extra_body=kept) == whole[:end]


def test_what_steers_the_choice(server: Running) -> None:
    first = server.post("/tokenize", prompt="z", add_special_tokens=False).json()["tokens"][0]
    assert text(server, max_tokens=3, logit_bias={str(first): 100}) == "zzz"
    assert text(server, max_tokens=3, extra_body={"allowed_token_ids": [first]}) == "zzz"
    plain = text(server, max_tokens=12)
    assert text(server, max_tokens=12, extra_body={"bad_words": [plain[0]]})[0] != plain[0]
    assert text(server, max_tokens=60, extra_body={"repetition_penalty": 1.8}) != text(server, max_tokens=60)
    assert text(server, max_tokens=60, frequency_penalty=2) != text(server, max_tokens=60)
    assert text(server, max_tokens=12, temperature=1.3, extra_body={"top_k": 1}) == plain
    assert text(server, max_tokens=12, temperature=1.3, top_p=1e-6) == plain
    assert text(server, max_tokens=12, temperature=1.3, extra_body={"min_p": 1.0}) == plain


def test_completion_logprobs(server: Running) -> None:
    found = server.openai.completions.create(prompt=PROMPT, max_tokens=5, logprobs=2, **GREEDY).choices[0]
    logprobs = found.logprobs
    assert "".join(logprobs.tokens) == found.text
    assert [found.text[i:].startswith(t) for i, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)]
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert max(top.values()) == logprob == top[token]
        assert len(top) == 2


def test_echo_scores_the_prompt(server: Running) -> None:
    def ask(**params):
        return server.openai.completions.create(prompt=PROMPT, echo=True, **GREEDY, **params).choices[0]

    whole, alone = ask(max_tokens=4, logprobs=1), ask(max_tokens=0, logprobs=1)
    assert whole.text == PROMPT + text(server, max_tokens=4)
    assert whole.logprobs.tokens[:4] == ["<s>", "a", "b", "c"]
    assert whole.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in whole.logprobs.token_logprobs[1:])
    assert alone.text == PROMPT
    assert alone.logprobs.token_logprobs == pytest.approx(whole.logprobs.token_logprobs[:4], abs=1e-4)
    streamed = [
        chunk.choices[0]
        for chunk in server.openai.completions.create(
            prompt=PROMPT, echo=True, max_tokens=4, logprobs=1, stream=True, **GREEDY
        )
    ]
    assert "".join(choice.text for choice in streamed) == whole.text
    offsets = [
        offset for choice in streamed if choice.logprobs for offset in choice.logprobs.text_offset or ()
    ]
    assert offsets == whole.logprobs.text_offset


def test_chat_logprobs_with_bytes(server: Running) -> None:
    answer = server.openai.chat.completions.create(
        messages=[{"role": "user", "content": "hi"}], max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    content = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.message.content
    for token in content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 3


def test_token_ids_come_back(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    found = server.post("/v1/completions", **body, logprobs=0, return_tokens_as_token_ids=True).json()[
        "choices"
    ][0]
    assert found["prompt_token_ids"] == server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert found["logprobs"]["tokens"] == [f"token_id:{i}" for i in found["token_ids"]]
    assert server.post("/detokenize", tokens=found["token_ids"]).json()["prompt"] == found["text"]
    chat = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        return_token_ids=True,
        prompt_logprobs=0,
    ).json()
    assert len(chat["choices"][0]["token_ids"]) == 4
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    assert chat["prompt_logprobs"][0] is None


def test_a_message_is_continued(server: Running) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]
    found = server.post("/tokenize", messages=messages, continue_final_message=True).json()["tokens"]
    answer = server.post(
        "/v1/chat/completions",
        messages=messages,
        continue_final_message=True,
        max_tokens=4,
        temperature=0,
        return_token_ids=True,
    ).json()
    assert answer["prompt_token_ids"] == found
    assert answer["choices"][0]["message"]["content"] == text(server, found, max_tokens=4)


def test_truncation_and_salt(server: Running) -> None:
    long = "abcdefgh" * 40
    short = server.post("/v1/completions", prompt=long, max_tokens=2, truncate_prompt_tokens=10).json()
    assert short["usage"]["prompt_tokens"] == 10
    ask = {"prompt": "salted prompt of some length", "max_tokens": 1}
    server.post("/v1/completions", **ask)
    again = server.post("/v1/completions", **ask).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    other = server.post("/v1/completions", **ask, cache_salt="mine").json()
    assert again > 0
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_events_are_well_formed(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = "".join(response.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2]
    )


def test_streams_bring_the_logprobs_of_prompts(server: Running) -> None:
    """Also where the first tokens may be a stop, and samples wait until others have ended."""
    fields = {"max_tokens": 3, "stream": True, "prompt_logprobs": 0, "n": 8}
    first = server.post("/tokenize", prompt="a", add_special_tokens=False).json()["tokens"][0]
    held = {"logit_bias": {str(first): 100}, "stop": ["aab"]}
    for path, prompt in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        lines = server.post(path, **fields, **held, **prompt).text.splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        parts = chunks if "messages" in prompt else [chunk["choices"][0] for chunk in chunks]
        found = [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part]
        assert len(found) == (1 if "messages" in prompt else 8)
        assert all(scores is not None and scores[0] is None and scores[1] for scores in found)
