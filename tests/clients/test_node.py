"""OpenAI's client for Node: streams of text, of calls, and of responses."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from scripted import CALL, TOOLS, writes

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node, which is not on the PATH"),
]
PACKAGE = "openai@^7"
SCRIPT = """
import OpenAI from "openai";
const [url, tools] = [process.argv[2], JSON.parse(process.argv[3])];
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const ask = { model: "tiny", messages: [{ role: "user", content: "hi" }], temperature: 0, tools };

let text = "", pieces = 0;
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  pieces += 1;
}
const stream = client.chat.completions.stream(ask);
const message = (await stream.finalChatCompletion()).choices[0].message;
const events = [];
for await (const event of await client.responses.create({
  model: "tiny", input: "hi", stream: true,
  tools: tools.map((tool) => ({ type: "function", ...tool.function })),
})) events.push(event);
console.log(JSON.stringify({ text, pieces, message, response: events.at(-1).response }));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the client is installed."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "ask.mjs").write_text(SCRIPT)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), PACKAGE]
    subprocess.run(command, check=True, timeout=200)
    return folder


def test_streams(folder: Path, url: str) -> None:
    with writes(f"Well. {CALL}"):
        done = subprocess.run(
            ["node", str(folder / "ask.mjs"), url, json.dumps(TOOLS)],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    found = json.loads(done.stdout)
    assert (found["text"], found["message"]["content"]) == ("Well.", "Well.")
    assert found["pieces"] > 2
    [call] = found["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", '{"city": "Paris"}')
    assert [item["type"] for item in found["response"]["output"]] == ["message", "function_call"]
