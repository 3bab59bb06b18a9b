"""Paths of vLLM's and OpenAI's servers that a model which writes text cannot serve: they say so, and why."""

from fastapi import APIRouter
from starlette.responses import Response

from jaxllm.server.errors import ApiError

router = APIRouter(include_in_schema=False)


@router.post("/v1/embeddings")
@router.post("/pooling")
@router.post("/classify")
@router.post("/score")
@router.post("/v1/score")
@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def embed() -> Response:
    """Nothing is embedded, ranked or classified."""
    text = (
        "the model writes text, and embeds, ranks or classifies none; ask /v1/completions or "
        "/v1/chat/completions"
    )
    raise ApiError(400, text, code="unsupported_by_model")
