"""What the page at `/` makes of texts: of hostile ones, of Markdown, and of tokens."""

import pytest

pytest.importorskip("playwright")

from browser import Screen
from playwright.sync_api import expect

pytestmark = pytest.mark.ui

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> "
    "**<b>bold</b>** [here](javascript:document.title='taken') `<i>` <svg onload=alert(1)>\n\n"
    "```html\n<iframe srcdoc='<script>alert(1)</script>'></iframe>\n```\n- <a href='//elsewhere'>a</a>"
)


def test_hostile_text_stays_text(screen: Screen) -> None:
    screen.answer_with(HOSTILE[:30], HOSTILE[30:])
    answer = screen.ask(HOSTILE)
    inside = screen.page.locator("#transcript")
    for tag in ("img", "script", "svg", "iframe", "b", "i", "a"):
        assert inside.locator(tag).count() == 0, tag
    assert "<img src=x onerror=" in screen.page.locator(".question .text").inner_text()
    assert "<img src=x onerror=" in answer.locator(".answer").inner_text()
    expect(answer.locator("strong")).to_have_text("<b>bold</b>")
    assert screen.page.title() == "jaxllm"


def test_no_string_becomes_html_even_if_a_script_wanted_it(screen: Screen) -> None:
    tried = "() => { try { document.body.innerHTML = 'x'; return '' } catch (error) { return error.name } }"
    assert screen.page.evaluate(tried) == "TypeError"
    screen.problems.clear()  # the browser has told of it


def test_markdown(screen: Screen) -> None:
    screen.answer_with(
        "# Head\nA *b* **c _d_** `e*` 2 * 3 * 4 snake_case_name \\*f\\*\nsame\n\n",
        "1. one\n   more\n2. two\n   - in\n\n",
        "> said\n\n---\n```python\nx = '**'\n```\n[site](https://example.org/a?b=1) ** open",
    )
    answer = screen.ask("x").locator(".answer")
    kinds = "e => [...e.children].map(child => child.tagName.toLowerCase())"
    assert answer.evaluate(kinds) == ["h3", "p", "ol", "blockquote", "hr", "div", "p"]
    assert answer.locator("p").first.inner_text() == "A b c d e* 2 * 3 * 4 snake_case_name *f*\nsame"
    assert answer.locator("em").all_inner_texts() == ["b", "d"]
    assert answer.locator("ol > li").count() == 2
    assert answer.locator("ol > li > ul > li").all_inner_texts() == ["in"]
    assert answer.locator("pre code").inner_text() == "x = '**'"
    link = answer.locator("a")
    assert link.get_attribute("href") == "https://example.org/a?b=1"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert answer.locator("p").last.inner_text().endswith("** open")


TABLE = (
    "Prices:\n| Name | Price | Say |\n|:-----|------:|:---:|\n| a \\| b | **1** | `x` |\n| short |\n"
    "| <i> | 2 | 3 | more |\n\nno | table\n- one"
)


def test_a_table(screen: Screen) -> None:
    screen.answer_with(TABLE)
    answer = screen.ask("x").locator(".answer")
    kinds = "e => [...e.children].map(child => child.className || child.tagName.toLowerCase())"
    assert answer.evaluate(kinds) == ["p", "table", "p", "ul"]
    assert answer.locator("th").all_inner_texts() == ["Name", "Price", "Say"]
    rows = answer.locator("tbody tr")
    assert [row.locator("td").all_inner_texts() for row in rows.all()] == [
        ["a | b", "1", "x"],
        ["short", "", ""],
        ["<i>", "2", "3", "more"],
    ]
    looks = "e => getComputedStyle(e).textAlign"
    assert [cell.evaluate(looks) for cell in rows.first.locator("td").all()] == ["left", "right", "center"]
    assert answer.locator("td strong").inner_text() == "1"


def test_a_table_that_is_still_written(screen: Screen) -> None:
    """It is a table from its first line on; what only began like one is text in the end."""
    shapes = """async (text) => {
        const { parseBlocks } = await import("/ui/markdown.js");
        const kinds = (text) => parseBlocks(text, true).map((block) => block.kind).join(" ");
        return Array.from(text, (_, i) => kinds(text.slice(0, i + 1)));
    }"""
    assert set(screen.page.evaluate(shapes, "| a | b |\n|:-|-|\n| 1 | 2 |\n")) == {"table"}
    assert screen.page.evaluate(shapes, "| a | b |\nno")[-1] == "paragraph"
    assert screen.page.evaluate(shapes, "| a | b |\n|-|\nno")[-1] == "paragraph"
    screen.answer_with("|x| is the size of x")
    assert screen.ask("x").locator(".answer p").inner_text() == "|x| is the size of x"


def test_a_wide_table_scrolls_by_itself(screen: Screen) -> None:
    row = "|" + "|".join(f"column-{i}" for i in range(40)) + "|\n"
    screen.answer_with(row + "|" + "-|" * 40 + "\n" + row)
    table = screen.ask("x").locator(".table")
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && e.clientWidth <= 720")
    assert screen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    grow = """async () => {
        const { Answer } = await import("/ui/answer.js");
        const answer = new Answer(document.querySelector(".answer"));
        answer.element.replaceChildren();
        const row = "|" + "wide-column|".repeat(40) + "\\n", text = row + "|" + "-|".repeat(40) + "\\n" + row;
        answer.show(text, [], true);
        answer.element.firstChild.scrollLeft = 77;
        answer.show(text + row, [], true);
        return [answer.element.firstChild.scrollLeft, answer.element.querySelectorAll("tbody tr").length];
    }"""
    assert screen.page.evaluate(grow) == [77, 2]


def test_markdown_of_anything_ends_soon_and_loses_nothing(screen: Screen) -> None:
    check = """async () => {
        const { parseBlocks, parseInline } = await import("/ui/markdown.js");
        const parts = ["**", "*", "_", "`", "```", "[", "](https://a.b)", "\\n", "\\n\\n", "- ", "1. ", "# ",
            "> ", "|", "|---|\\n", "---|:-:\\n",
            " ", "word", "\\\\", "~~~"];
        let seed = 1;
        const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
        const covered = (source, nodes) => nodes.map((node) =>
            node.children ? covered(source, node.children) : source.slice(node.start, node.end)).join("");
        for (let round = 0; round < 2000; round += 1) {
            const part = () => parts[Math.floor(random() * parts.length)];
            const source = Array.from({ length: 30 }, part).join("");
            const shown = parseBlocks(source, round % 2 === 1).map((block) => {
                const ranges = block.items ?? block.lines ?? block.rows?.flat() ?? [block.body ?? block];
                const shown = ranges.map((range) => covered(source, parseInline(source, range)));
                return [block.language, ...shown].join(" ");
            }).join(" ");
            const words = (text) => (text.match(/word/g) ?? []).length;
            if (words(shown) !== words(source)) return source;
        }
        const begin = performance.now();
        for (const source of parts.map((part) => "a" + part.repeat(20000)))
            parseBlocks(source).forEach((block) => parseInline(source, block));
        return performance.now() - begin;
    }"""
    found = screen.page.evaluate(check)
    assert isinstance(found, float | int), f"words were lost of {found!r}"
    assert found < 5000


def test_tokens_stand_where_their_text_is(screen: Screen) -> None:
    place = """async ([pieces, texts]) => {
        const { Tokens } = await import("/ui/tokens.js");
        const tokens = new Tokens();
        let text = "";
        pieces.forEach((bytes, i) => {
            text += texts[i];
            tokens.add([{ token: "?", bytes, logprob: -1, top_logprobs: [] }], text);
        });
        tokens.add([], text, true);
        return tokens.placed.map(({ start, end }) => text.slice(start, end));
    }"""

    def placed(*pieces: tuple[bytes, str]) -> list[str]:
        given = [[list(data) for data, _ in pieces], [text for _, text in pieces]]
        return screen.page.evaluate(place, given)

    assert placed((b"a", "a"), (b" b", " b")) == ["a", " b"]
    assert placed((b" a", "a"), (b" b", " b"), (b"</s>", "")) == ["a", " b", ""]
    smile = "😀".encode()
    assert placed((smile[:2], ""), (smile[2:], "😀"), (b"!", "!")) == ["", "😀", "!"]
    assert placed((b"a", ""), (b"\n", ""), (b"b", "a\nb")) == ["a", "\n", "b"]
    assert placed((b"go", "go"), (b" END", " E")) == ["go", " E"]
