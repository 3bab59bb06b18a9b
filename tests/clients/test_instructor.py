"""instructor: answers of a form, by tools and by schemas."""

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict

pytestmark = pytest.mark.clients
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Place(BaseModel):
    """Where, and how warm."""

    model_config = ConfigDict(extra="forbid")  # a random model would add properties without an end
    city: Literal["Paris", "Rome"]
    warm: bool


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_an_answer_of_a_form(url: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=mode)
        found = client.create(response_model=Place, max_retries=0, **ASK)
        assert found.city in ("Paris", "Rome")
        *_, last = client.create_partial(response_model=Place, max_retries=0, **ASK)
        assert (last.city, last.warm) == (found.city, found.warm)
