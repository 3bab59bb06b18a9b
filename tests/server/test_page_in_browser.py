"""The page at `/` in Chromium, with the server behind it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

from browser import PHONE, Screen
from playwright.sync_api import Browser, expect
from running import Running, running

pytestmark = pytest.mark.ui


@pytest.fixture
def window(browser: Browser) -> Iterator[Callable[..., Screen]]:
    """Makes other windows."""
    opened = []

    def make(url: str, **options: Any) -> Screen:
        opened.append(Screen(browser, url, **options))
        return opened[-1]

    yield make
    for found in opened:
        found.close()


def test_an_answer_streams_in(screen: Screen, server: Running) -> None:
    screen.set(max_tokens=100, temperature=0)
    watch = """() => { window.lengths = new Set();
        const shown = () => document.querySelector(".answer")?.textContent.length ?? 0;
        new MutationObserver(() => window.lengths.add(shown())).observe(
            document.getElementById("transcript"), { childList: true, subtree: true }) }"""
    screen.page.evaluate(watch)
    screen.slow_down(20)  # the model is so small that all would come within a frame
    answer = screen.ask("go on")
    assert screen.page.evaluate("window.lengths.size") > 2, "none of it was shown before all of it"
    body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 100, "temperature": 0}
    whole = server.post("/v1/chat/completions", **body).json()
    assert answer.locator(".token").count() > 20
    written = whole["choices"][0]["message"]["content"]
    marks = re.compile(r"[\s*_`\\]")  # what is or may be Markdown
    assert marks.sub("", answer.locator(".answer").inner_text()) == marks.sub("", written)
    said = answer.locator(".figures").inner_text()
    assert f"{whole['usage']['completion_tokens']} tokens" in said
    assert "tokens/s" in said


def test_what_is_sent_is_what_was_set(screen: Screen) -> None:
    screen.page.click("summary")
    screen.set(system="Be short.", temperature=0.5, top_p=0.9, top_k=7, min_p=0.01, max_tokens=3, seed=5)
    screen.set(stop="first\n\\n\\n", presence_penalty=0.1, frequency_penalty=-0.1, repetition_penalty=1.1)
    screen.page.select_option("#model", "small")
    with screen.page.expect_request("**/v1/chat/completions") as request:
        screen.ask("hello")
    assert request.value.post_data_json == {
        "model": "small",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "max_tokens": 3, "seed": 5,
        "presence_penalty": 0.1, "frequency_penalty": -0.1, "repetition_penalty": 1.1,
        "stop": ["first", "\n\n"], "logprobs": True, "top_logprobs": 5,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    screen.page.click("label[for=probabilities-off]")
    with screen.page.expect_request("**/v1/chat/completions") as request:
        screen.ask("again")
    assert "logprobs" not in (request.value.post_data or "")


def test_stopping(screen: Screen, server: Running) -> None:
    screen.slow_down(200)
    for stop in (
        lambda: screen.page.keyboard.press("Escape"),
        lambda: screen.page.click("#stop-answer"),
    ):
        answer = screen.ask("count", wait=False)
        expect(screen.page.locator("#stop-answer")).to_be_visible()
        stop()
        expect(answer).to_have_attribute("data-state", "stopped")
        expect(answer.locator(".figures")).to_contain_text("stopped")
        expect(screen.page.locator("#send")).to_be_visible()
        server.wait_idle()


def test_probabilities_of_tokens(screen: Screen) -> None:
    answer = screen.set(max_tokens=12, temperature=0).ask("tokens")
    card = screen.page.locator("#token-card")
    expect(card).to_be_hidden()
    answer.locator(".token").nth(3).hover()
    expect(card.locator("tr")).to_have_count(5)
    expect(card.locator("tr.chosen")).to_have_count(1)
    shares = [float(text.strip("<%")) for text in card.locator("td.number").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5
    background = "e => getComputedStyle(e).backgroundColor"
    unlikely = answer.locator(".token.p0, .token.p1").first
    assert unlikely.evaluate(background) == "rgba(0, 0, 0, 0)"
    screen.page.click("label[for=probabilities-colour]")
    assert unlikely.evaluate(background) != "rgba(0, 0, 0, 0)"
    screen.page.click("label[for=probabilities-off]")
    answer.locator(".token").nth(3).hover()
    expect(card).to_be_hidden()


def test_with_the_keyboard_alone(screen: Screen) -> None:
    press = screen.page.keyboard.press
    assert screen.focused == "question"
    for word in ("one", "two"):
        screen.page.keyboard.type(word)
        press("Shift+Enter")
    assert screen.page.input_value("#question") == "one\ntwo\n"
    screen.set(max_tokens=6)
    screen.page.focus("#question")
    press("Enter")
    screen.answer()
    assert screen.focused == "question"
    expect(screen.page.locator("#announcer")).to_contain_text("Answer:")
    seen = []
    outline = "getComputedStyle(document.activeElement.labels?.[0] ?? document.activeElement).outlineStyle"
    while not seen or screen.focused != "question":
        press("Tab")
        seen.append(screen.focused)
        of_label = seen[-1].startswith("probabilities")
        of_element = outline if of_label else outline.replace(".labels?.[0] ?? document.activeElement", "")
        assert seen[-1] == "BODY" or screen.page.evaluate(of_element) != "none", seen
        assert len(seen) < 60
    inputs = {
        "new-chat",
        "settings-toggle",
        "engine-toggle",
        "model",
        "system",
        "temperature",
        "seed",
        "stop",
    }
    assert inputs | {"probabilities-hover", "transcript", "Copy", "Edit", "Again", "send"} <= set(seen)
    screen.page.focus(".answer")
    press("ArrowRight")
    press("ArrowRight")
    marked = screen.page.locator(".token.marked")
    assert marked.get_attribute("data-token") == "1"
    expect(screen.page.locator("#token-card")).to_be_visible()
    press("Escape")
    expect(screen.page.locator("#token-card")).to_be_hidden()


def test_again_edit_copy_and_a_new_chat(screen: Screen) -> None:
    screen.set(max_tokens=5, temperature=0)
    first = screen.ask("first question").locator(".answer").inner_text()
    screen.ask("second")
    replies, page = screen.page.locator("article.reply"), screen.page
    expect(replies).to_have_count(2)
    page.get_by_label("Answer again").first.click()
    expect(replies).to_have_count(1)
    assert screen.answer().locator(".answer").inner_text() == first
    page.get_by_role("button", name="Edit").click()
    editor = page.get_by_label("Edited message")
    expect(editor).to_be_focused()
    editor.fill("never sent")
    editor.press("Escape")
    expect(page.locator(".question")).to_contain_text("first question")
    page.get_by_role("button", name="Edit").click()
    editor.fill("another question")
    editor.press("Enter")
    expect(page.locator(".question .text")).to_have_text("another question")
    text = screen.answer().locator(".answer").inner_text()
    replies.get_by_role("button", name="Copy").click()
    expect(replies.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").strip() == text.strip()
    page.click("#new-chat")
    expect(replies).to_have_count(0)
    expect(page.locator(".welcome")).to_be_visible()


def test_a_value_that_the_server_refuses(screen: Screen) -> None:
    screen.set(top_p=3)
    answer = screen.ask("hello")
    expect(answer.locator(".problem")).to_contain_text("top_p=3")
    expect(screen.page.locator("#top_p")).to_have_attribute("aria-invalid", "true")
    screen.set(top_p="", max_tokens=2)
    screen.page.get_by_label("Answer again").click()
    expect(screen.answer().locator(".problem")).to_be_hidden()
    expect(screen.page.locator("[aria-invalid]")).to_have_count(0)


def test_the_engine_at_work(screen: Screen, server: Running) -> None:
    panel = screen.page.locator("#engine")
    for _ in range(4):
        screen.ask("the same long prompt each time, so that it is found")
    screen.page.wait_for_timeout(1200)
    text = panel.inner_text()
    assert "0 of 6" in text
    figures = server.figures()
    assert f"{figures['num_pages']:.0f} pages of 4 tokens" in text
    assert "0 used" in text
    assert "waiting for one" in text
    said = panel.locator(".pages-picture").get_attribute("aria-label") or ""
    assert said.startswith("Cache: ")
    painted = """e => new Set(new Uint32Array(
        e.getContext("2d").getImageData(0, 0, e.width, e.height).data.buffer)).size"""
    assert panel.locator(".pages-picture").evaluate(painted) >= 3  # free, cached, the gaps
    lines = "paths => paths.map(path => path.getAttribute('d').length)"
    assert min(panel.locator("svg path").evaluate_all(lines)) > 0


def test_loading_and_programs_that_still_compile(window: Callable[..., Screen], server: Running) -> None:
    screen = window(server.url)
    progress = {"seconds": 5.0, "done": {}, "programs": 8, "programs_compiled": 3, "seconds_left": 8.2}
    state = {"status": "loading", "names": ["tiny"], "progress": progress, "engine": None}
    screen.page.route("**/ui/state", lambda route: route.fulfill(json=state))
    screen.open().status("loading · 3/8")
    expect(screen.page.locator("#engine")).to_contain_text("Compiled 3 of 8 programs, about 9 s left.")
    assert screen.page.locator("progress").evaluate("e => [e.value, e.max]") == [3, 8]
    screen.page.unroute("**/ui/state")
    screen.status("ready")
    expect(screen.page.locator("progress")).to_be_hidden()
    assert screen.problems == []


def test_keys_and_a_server_that_has_gone(window: Callable[..., Screen], model: Path) -> None:
    with running(model, api_key=["right"]) as served:
        screen = window(served.url).open()
        screen.status("key wanted")
        key = screen.page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(screen.page.locator("#key-note")).to_contain_text("This server wants a key.")
        expect(screen.page.locator("#engine")).to_contain_text("The server wants an API key.")
        key.fill("wrong")
        key.press("Tab")
        expect(screen.page.locator("#key-note")).to_have_text("The server did not take this key.")
        expect(screen.ask("hello").locator(".problem")).to_contain_text("did not take this API key")
        key.fill("schlüssel")
        expect(screen.ask("hello").locator(".problem")).to_contain_text("key")
        key.fill("right")
        key.press("Tab")
        screen.status("ready")
        screen.set(max_tokens=3)
        expect(screen.ask("hello").locator(".problem")).to_be_hidden()
        stores = "[localStorage.length, document.cookie, JSON.stringify(sessionStorage)]"
        assert screen.page.evaluate(stores) == [0, "", '{"jaxllm.key":"right"}']
        screen.page.reload()
        screen.status("ready")
    screen.status("no answer")
    expect(screen.page.locator("#engine")).to_contain_text("does not answer. Is it still running?")
    expect(screen.ask("hello").locator(".problem")).to_contain_text("does not answer. Is it still running?")
    assert screen.problems == []


def test_a_stream_that_breaks_off(screen: Screen) -> None:
    chunk = 'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
    screen.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=chunk))
    answer = screen.ask("hello")
    expect(answer.locator(".problem")).to_contain_text("broke off before the answer was complete")
    expect(answer.locator(".answer")).to_have_text("half")
    failed = 'data: {"error":{"message":"the request failed on the server"}}\n\ndata: [DONE]\n\n'
    screen.page.unroute("**/v1/chat/completions")
    screen.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=chunk + failed))
    expect(screen.ask("more").locator(".problem")).to_contain_text("the request failed on the server.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(window: Callable[..., Screen], server: Running, scheme: str) -> None:
    screen = window(server.url, color_scheme=scheme).open()
    shades = screen.page.evaluate(
        """() => [document.body, ...document.querySelectorAll("button, input, .note, label, h1")].map((e) => {
            const { color, backgroundColor } = getComputedStyle(e); return [color, backgroundColor] })"""
    )
    paper = _brightness(shades[0][1])
    assert paper > 0.9 if scheme == "light" else paper < 0.1
    for color, background in shades:
        behind = paper if "rgba(0, 0, 0, 0)" in background else _brightness(background)
        light, dark = sorted((_brightness(color), behind), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
    assert screen.problems == []


def _brightness(color: str) -> float:
    """Relative luminance: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_on_a_phone(window: Callable[..., Screen], server: Running) -> None:
    screen = window(server.url, size=PHONE, has_touch=True, is_mobile=True).open()
    screen.status("ready")
    expect(screen.page.locator("#settings")).to_be_hidden()
    screen.page.tap("#settings-toggle")
    screen.set(max_tokens=40)
    screen.page.tap("#engine-toggle")
    expect(screen.page.locator("#settings")).to_be_hidden()
    expect(screen.page.locator(".pages-picture")).to_be_visible()
    screen.page.tap("#engine-toggle")
    screen.ask("hello there, small screen")
    wider = "() => document.documentElement.scrollWidth - innerWidth"
    assert screen.page.evaluate(wider) <= 0
    assert screen.problems == []
