"""The page in a headless Chromium of the system, as a user has it before them."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 30
WIDE, PHONE = (1360, 850), (390, 780)


def find_chromium() -> str:
    """The browser's path.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"none of {', '.join(NAMES)} is on the PATH: apt-get install chromium")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without pages. As root it runs without its sandbox, which it cannot have there."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        yield browser
        browser.close()


expect.set_options(timeout=SECONDS * 1000)


class Screen:
    """A page of the server, in a window of its own.

    Attributes:
        problems: errors of scripts and breaches of the page's policy; requests that are refused are none.
    """

    def __init__(self, browser: Browser, url: str, size: tuple[int, int] = WIDE, **options: Any) -> None:
        self._context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self._context.grant_permissions(["clipboard-read", "clipboard-write"])
        self._context.set_default_timeout(SECONDS * 1000)
        self.page: Page = self._context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self._url = url

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.problems.append(text)

    def open(self) -> "Screen":
        """Goes to the page."""
        self.page.goto(self._url)
        return self

    def close(self) -> None:
        """Closes the window."""
        self._context.close()

    def set(self, **fields: object) -> "Screen":
        """Fills in settings by their names."""
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        return self

    def ask(self, text: str, *, wait: bool = True) -> Locator:
        """Types a message and presses Enter; the answer to it."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        return self.answer() if wait else self.page.locator("article.reply").last

    def answer(self) -> Locator:
        """The last answer, once it is complete."""
        self.page.wait_for_selector("article.reply:last-child:not([data-state=writing])")
        return self.page.locator("article.reply").last

    def status(self, text: str) -> None:
        """Waits until the bar at the top says this."""
        self.page.wait_for_function(
            "text => document.getElementById('status-text').textContent.includes(text)", arg=text
        )

    def slow_down(self, milliseconds: int) -> None:
        """Lets each event of a stream take this long on its way."""
        self.page.evaluate(
            """(milliseconds) => {
                const real = fetch;
                const late = (signal) => async (chunk, to) => {
                    for (const event of new TextDecoder().decode(chunk).split(/(?<=\\n\\n)/)) {
                        await new Promise((done) => setTimeout(done, milliseconds));
                        signal.throwIfAborted();
                        to.enqueue(new TextEncoder().encode(event));
                    }
                };
                window.fetch = async (path, options) => {
                    const answer = await real(path, options);
                    if (!String(path).includes("chat") || !answer.ok) return answer;
                    const slow = new TransformStream({ transform: late(options.signal) });
                    return new Response(answer.body.pipeThrough(slow), answer);
                };
            }""",
            milliseconds,
        )

    def answer_with(self, *texts: str) -> None:
        """Lets the server be quoted with these texts, one after the other in a stream."""

        def fulfill(route: Route) -> None:
            chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
            chunks[-1]["choices"][0]["finish_reason"] = "stop"
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            route.fulfill(body=body, content_type="text/event-stream")

        self.page.route("**/v1/chat/completions", fulfill)

    @property
    def focused(self) -> str:
        """The id of the element with the focus, or its text; BODY if the page has it as a whole."""
        return self.page.evaluate(
            """() => { const { id, tagName, textContent } = document.activeElement;
                return tagName === "BODY" ? tagName : id || textContent }"""
        )
