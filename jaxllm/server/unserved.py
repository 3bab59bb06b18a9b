"""Paths of vLLM's and OpenAI's servers that a model which writes text cannot serve: they say so, and why."""

from fastapi import APIRouter
from starlette.responses import Response

from jaxllm.server.errors import ApiError

router = APIRouter(include_in_schema=False)


@router.post("/v1/embeddings")
@router.post("/pooling")
@router.post("/score")
@router.post("/rerank")
async def embed() -> Response:
    """Nothing is embedded or ranked."""
    text = "the model writes text, and embeds or ranks none; ask /v1/completions or /v1/chat/completions"
    raise ApiError(400, text, code="unsupported_by_model")
