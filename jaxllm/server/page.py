"""The page at `/`: a chat, and a view of what the engine does. Off with `--no-ui`.

Its files lie in `ui/` beside this one and are served as they are: there is no build step, and nothing is
loaded from elsewhere. They say nothing about the server, so they need no key; what they ask for does.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxllm.server.errors import ApiError

FOLDER = Path(__file__).parent / "ui"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SECURITY = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # no string becomes HTML, whoever wrote it
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of every file: https://www.w3.org/TR/CSP3/ and https://w3c.github.io/trusted-types/dist/spec/"""

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """A file of the page, with the headers that it is sent with."""

    body: bytes
    headers: dict[str, str]


@cache
def page_files() -> dict[str, PageFile]:
    """The page's files by their paths on the server: `/`, `/ui/page.js` and so on.

    Raises:
        RuntimeError: they are not there; the package was not installed whole.
    """
    found = {
        "/" if path.name == INDEX else f"/ui/{path.name}": _read(path)
        for path in sorted(FOLDER.glob("*"))
        if path.suffix in TYPES
    }
    if "/" not in found:
        raise RuntimeError(f"{FOLDER / INDEX} is missing: install jaxllm again, or serve with --no-ui")
    return found


def _read(path: Path) -> PageFile:
    body = path.read_bytes()
    headers = {
        "Content-Type": f"{TYPES[path.suffix]}; charset=utf-8",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        # asked for each time, so that no file of one version meets those of another
        "Cache-Control": "no-cache",
    }
    return PageFile(body, headers | SECURITY)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, "/")


@router.api_route("/ui/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """One of its files."""
    return _answer(request, f"/ui/{name}")


def _answer(request: Request, path: str) -> Response:
    file = page_files().get(path)
    if file is None:
        raise ApiError(404, f"no such path: {request.url.path}")
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.headers["ETag"] in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, headers=file.headers)
