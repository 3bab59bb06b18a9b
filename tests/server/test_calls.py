"""What a router of replicas goes by, and the application called without a socket."""

import asyncio
import json
from typing import Any

import pytest
from running import Running

from jaxllm.server.asgi_call import call_app
from jaxllm.server.prompt_names import BLOCK, prompt_names


def names(**fields: Any) -> tuple[bytes, ...]:
    return prompt_names(json.dumps(fields).encode())


def test_prompts_that_begin_alike_share_names() -> None:
    one, two = names(prompt="x" * 200 + "a" * 200), names(prompt="x" * 200 + "b" * 200)
    common = [a == b for a, b in zip(one, two, strict=True)]
    assert len(common) == 400 // BLOCK
    assert common[:3] == [True] * 3
    assert not any(common[4:])  # names go by all that was before
    assert names(prompt="x" * 200, cache_salt="a")[0] != names(prompt="x" * 200)[0]
    chat = [{"role": "system", "content": "y" * 200}]
    asked = [
        names(messages=[*chat, {"role": "user", "content": text}], max_tokens=5) for text in ("hi", "ho")
    ]
    assert asked[0] == asked[1] != ()
    assert names(messages=chat, temperature=1)[:2] == asked[0][:2]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": "short"}', b"\xff\xfe"])
def test_other_bodies_have_none(body: bytes) -> None:
    assert prompt_names(body) == ()


def scope(path: str, method: str = "POST") -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    found = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    return found | {"method": method, "path": path, "query_string": b"", "headers": headers}


def test_a_call_is_answered_and_one_that_is_left_ends(server: Running) -> None:
    """In an event loop of its own: an engine serves any."""

    async def main() -> None:
        body = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        messages = [
            m async for m in call_app(server.app, scope("/v1/completions"), json.dumps(body).encode())
        ]
        assert messages[0]["status"] == 200
        answer = json.loads(b"".join(m.get("body", b"") for m in messages[1:]))
        assert answer["usage"]["completion_tokens"] == 5
        body |= {"stream": True, "max_tokens": 120}
        left = call_app(server.app, scope("/v1/completions"), json.dumps(body).encode())
        async for message in left:
            if message.get("body"):
                break
        await left.aclose()

    server.wait_idle()
    aborted = server.figures()["requests_finished_abort_total"]
    asyncio.run(asyncio.wait_for(main(), 30))
    server.wait_idle()
    assert server.figures()["requests_finished_abort_total"] == aborted + 1
