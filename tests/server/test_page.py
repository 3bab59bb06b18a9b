"""The page at `/` without a browser: how its files are served, what is in them, and what they are told."""

import asyncio
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from running import Running
from test_status import not_loaded

from jaxllm.server.live import MOST_RUNS
from jaxllm.server.page import FOLDER, SECURITY, page_files
from jaxllm.server.service import Status

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(FOLDER.glob("*.js"))
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def test_files_are_served_with_their_types_and_a_strict_policy(server: Running) -> None:
    http = server.http
    for path in page_files():
        answer = http.get(path)
        assert answer.is_success
        assert answer.headers["content-type"].startswith(TYPES.get(path.rpartition(".")[2], "text/html"))
        assert {name: answer.headers[name] for name in SECURITY} == SECURITY
    policy = SECURITY["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none';")


def test_files_are_sent_again_only_when_they_have_changed(server: Running) -> None:
    first = server.http.get("/")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for given in (tag, f'W/{tag}, "other"'):
        again = server.http.get("/", headers={"if-none-match": given})
        assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/", headers={"if-none-match": '"other"'}).content == first.content
    head = server.http.head("/ui/page.js")
    assert (head.status_code, head.content) == (200, b"")


def test_nothing_else_is_in_the_folder(server: Running) -> None:
    for path in ("/ui/", "/ui/nothing.js", "/ui/..%2fpage.py", "/ui/index.html", "/ui/%2e%2e/keys.py"):
        answer = server.http.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["message"].startswith("no such path")
    assert server.http.post("/").status_code == 405


def test_the_page_has_a_word_for_each_status() -> None:
    [table] = re.findall(r"const STATUS = .*?\(\{(.*?)\}\)", (FOLDER / "page.js").read_text(), re.DOTALL)
    assert set(get_args(Status)) <= set(re.findall(r"(\w+): ", table))


def test_the_page_loads_what_there_is_and_nothing_from_elsewhere() -> None:
    files = page_files()
    index = files["/"].body.decode()
    linked = re.findall(r'(?:src|href)="([^"]+)"', index)
    assert {f"/{path}" for path in linked} <= set(files)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", index)
    reached = {"/ui/page.js"}
    for script in SCRIPTS:
        reached |= {f"/ui/{name}" for name in re.findall(r'from "\./([\w.]+)"', script.read_text())}
    assert reached == {f"/ui/{script.name}" for script in SCRIPTS}
    for path in FOLDER.iterdir():
        code = re.sub(r"^\s*(//|/?\*).*$", "", path.read_text(), flags=re.M)
        assert set(re.findall(r"https?://[\w.]+", code)) <= {"http://www.w3.org"}, path
        assert "@import" not in code


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_never_turn_text_into_html(script: Path) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|DOMParser"
    assert not re.search(ways, script.read_text())
    assert "localStorage" not in script.read_text()  # a key must not outlive its tab


def test_labels_and_ids_belong_together() -> None:
    index = page_files()["/"].body.decode()
    ids = re.findall(r'\bid="([^"]+)"', index)
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:\bfor|aria-controls|aria-describedby)="([^"]+)"', index)
    assert set(named) <= set(ids)
    for script in SCRIPTS:
        assert set(re.findall(r'find\("([\w-]+)"', script.read_text())) <= set(ids)
    inputs = re.findall(r"<(?:input|textarea|select)\b[^>]*\bid=\"([^\"]+)\"", index)
    assert set(inputs) <= set(re.findall(r'\bfor="([^"]+)"', index))


def test_without_the_page() -> None:
    async def main() -> None:
        client, _ = not_loaded(ui=False)
        async with client:
            for path in ("/", "/ui/page.js", "/ui/state"):
                assert (await client.get(path)).status_code == 404
        client, _ = not_loaded(ui=False, keys=["k"])
        async with client:
            assert (await client.get("/")).status_code == 401

    asyncio.run(main())


@pytest.mark.parametrize(("root_path", "sent"), [("", ""), ("/llm", "/llm"), ("/llm", "")])
def test_only_its_files_need_no_key(root_path: str, sent: str) -> None:
    async def main() -> None:
        client, _ = not_loaded(keys=["k"], root_path=root_path)
        async with client:

            async def status(path: str, **headers: str) -> int:
                url = f"http://server{sent}{path}"
                return (await client.get(url, headers=headers)).status_code

            for path in page_files():
                assert await status(path) == 200
            for path in ("/ui/state", "/ui/", "/ui/nothing.js", "//", "/ui/%70age.js", "/ui/page.js/", "/ui"):
                assert await status(path) == 401, path
                assert await status(path, authorization="Bearer wrong") == 401
            assert await status("/ui/state", authorization="Bearer k") == 200

    asyncio.run(main())


def test_state_while_loading() -> None:
    async def main() -> None:
        client, service = not_loaded(served_model_name=("a", "b"))
        async with client:
            state = (await client.get("/ui/state")).json()
            assert state == {"status": "loading", "names": ["a", "b"], "progress": {}, "engine": None}
            service.loaded(RuntimeError("no such model"))
            assert (await client.get("/ui/state")).json()["status"] == "failed"

    asyncio.run(main())


def test_state_of_an_engine(server: Running) -> None:
    server.post("/v1/completions", prompt="what the page is told", max_tokens=5, ignore_eos=True)
    server.wait_idle()
    state = server.http.get("/ui/state").json()
    engine, figures = state["engine"], server.figures()
    assert (state["status"], state["names"]) == ("ready", ["tiny", "small"])
    assert (engine["max_num_seqs"], engine["page_size"], engine["max_model_len"]) == (6, 4, 128)
    assert engine["defaults"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    same = set(engine["figures"]) - {"uptime_seconds", "step_seconds_total", "programs_pending"}
    assert {name: engine["figures"][name] for name in same} == {name: figures[name] for name in same}
    assert engine["figures"]["step_seconds_total"] > 0
    pages = engine["pages"]
    assert len(pages["used"]) == len(pages["cached"]) <= MOST_RUNS
    assert (pages["run"], sum(pages["used"])) == (1, figures["pages_used"])
    assert sum(pages["cached"]) > 0


def test_every_file_of_the_packages_is_packed_into_the_wheel() -> None:
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for top in ("jaxllm", "pallas_kernels", "converters"):
        packages = [init.parent for init in (ROOT / top).rglob("__init__.py")]
        packed = {
            path
            for package in packages
            for owner, patterns in given.items()
            if owner in ("*", ".".join(package.relative_to(ROOT).parts))
            for pattern in patterns
            for path in package.glob(pattern)
        }
        packed |= {path for package in packages for path in package.glob("*.py")}
        others = {".pyc", ".so", ".md"}
        there = {path for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix not in others}
        assert there - packed == set()
