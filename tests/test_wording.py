"""Phrases that messages of several floors share."""

import asyncio
import socket

import aiohttp
import httpx2
import pytest

from jaxllm.wording import counted, did_you_mean, how_to_install, refusal, size, unreachable


def test_one_is_not_many() -> None:
    assert [counted(n, "device") for n in (0, 1, 2)] == ["0 devices", "1 device", "2 devices"]


def test_sizes_have_few_digits() -> None:
    assert [size(n) for n in (999, 1.5e6, 1983676416, 2e14)] == ["1 KB", "1.50 MB", "1.98 GB", "200 TB"]


def test_only_near_names_are_proposed() -> None:
    known = ("--temperature", "--top-p")
    assert did_you_mean("--temprature", known) == "; did you mean --temperature?"
    assert did_you_mean("--nonsense", known) == ""


def test_an_extra_comes_from_the_clone() -> None:
    assert how_to_install("ray").endswith("pip install -e '.[ray]'")


@pytest.mark.parametrize(
    ("body", "message"),
    [('{"error": {"message": "no"}}', "no"), ('{"error": "x"}', '{"error": "x"}'), ("<html>" * 99, "<html>")],
)
def test_a_refusal_is_its_message(body: str, message: str) -> None:
    assert refusal(body).startswith(message)
    assert len(refusal(body)) <= 200


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{own.getsockname()[1]}"


async def ask_with_httpx(url: str) -> None:
    async with httpx2.AsyncClient() as client:
        await client.get(url)


async def ask_with_aiohttp(url: str) -> None:
    async with aiohttp.ClientSession() as client:
        await client.get(url)


def test_all_clients_say_alike_that_nobody_listens(closed: str) -> None:
    said = set()
    for url in (closed, closed.replace("127.0.0.1", "localhost")):
        for ask in (
            httpx2.get,
            lambda url: asyncio.run(ask_with_httpx(url)),
            lambda url: asyncio.run(ask_with_aiohttp(url)),
        ):
            with pytest.raises((httpx2.ConnectError, aiohttp.ClientConnectionError)) as failure:
                ask(url)
            said.add(unreachable(closed, failure.value))
    assert said == {f"cannot reach {closed}: connection refused; is the server running?"}


def test_a_host_without_an_address_is_no_connection() -> None:
    with pytest.raises(httpx2.ConnectError) as failure:
        httpx2.get("http://host.invalid:1")
    assert unreachable("U", failure.value).startswith("cannot reach U: ")
    assert "rrno" not in unreachable("U", failure.value)
