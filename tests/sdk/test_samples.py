"""The documentation's samples run as they stand, but for the host and the key."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import Any

import httpx
import pytest
import samples
from samples import mine
from station import Station, clean_env

NODE = shutil.which("node")
CURL = shutil.which("curl")
node_needed = pytest.mark.skipif(NODE is None, reason="node is not installed")
curl_needed = pytest.mark.skipif(CURL is None, reason="curl is not installed")
SAYS = "This is nbgate's demo model {}. It does not think, it repeats what you said: {}"


def run(argv: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=clean_env(**env))


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", code], **env)


def javascript(code: str) -> subprocess.CompletedProcess[str]:
    assert NODE is not None
    return run([NODE, "--input-type=module", "-e", code])


def curl(station: Station, key: str, name: str) -> Any:
    done = run(["sh", "-c", mine(samples.CURL[name], station.url, key)])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@curl_needed
@pytest.mark.parametrize(("name", "said"), [("quick", "Hello"), ("chat", "What is AI?")])
def test_sample_curl_chat(station: Station, key: str, name: str, said: str) -> None:
    answer = curl(station, key, name)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "role": "assistant", "content": SAYS.format("gpt-4o", said), "refusal": None, "annotations": [],
    }  # fmt: skip
    assert answer["usage"]["completion_tokens"] > 5


@curl_needed
def test_sample_curl_responses_takes_the_documented_max_tokens(station: Station, key: str) -> None:
    answer = curl(station, key, "responses")
    assert (answer["object"], answer["status"], answer["max_output_tokens"]) == ("response", "completed", 500)
    assert answer["output"][0]["content"][0]["text"] == SAYS.format("gpt-4o", "Explain quantum computing")


@curl_needed
def test_sample_curl_messages_needs_no_version_header(station: Station, key: str) -> None:
    answer = curl(station, key, "messages")
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "end_turn")
    assert answer["content"] == [{"type": "text", "text": SAYS.format("claude-3-5-sonnet", "Hello Claude")}]


@curl_needed
def test_sample_curl_embeddings_answers_in_the_documented_shape(station: Station, key: str) -> None:
    answer = curl(station, key, "embeddings")
    assert set(answer) == {"object", "data", "model", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "text-embedding-3-small")
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    assert all(isinstance(number, float) for number in answer["data"][0]["embedding"])
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}


@curl_needed
def test_sample_curl_images(station: Station, key: str) -> None:
    answer = curl(station, key, "images")
    assert len(answer["data"]) == 1
    assert answer["data"][0]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(("name", "said"), [("quick", "Hello"), ("chat", "What is AI?")])
def test_sample_python_chat(station: Station, key: str, name: str, said: str) -> None:
    done = python(mine(samples.PYTHON[name], station.url, key))
    assert (done.returncode, done.stdout) == (0, SAYS.format("gpt-4o", said) + "\n"), done.stderr


def test_sample_python_messages(station: Station, key: str) -> None:
    done = python(mine(samples.PYTHON["messages"], station.url, key), ANTHROPIC_BASE_URL=station.url)
    assert (done.returncode, done.stdout) == (0, SAYS.format("claude-3-5-sonnet", "Hello Claude") + "\n"), done.stderr


def test_sample_python_stream_works_in_the_form_that_the_sdk_has(station: Station, key: str) -> None:
    printed = mine(samples.PYTHON_STREAM, station.url, key)
    done = python(printed)
    assert done.returncode == 1
    assert "has no attribute 'text_stream'" in done.stderr
    right = printed.replace("for text in stream.text_stream():", "for chunk in stream:").replace(
        "print(text,", 'print(chunk.choices[0].delta.content or "",'
    )
    done = python(right)
    assert (done.returncode, done.stdout) == (0, SAYS.format("gpt-4o", "Hello")), done.stderr


@node_needed
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quick", SAYS.format("gpt-4o", "Hello")),
        ("chat", SAYS.format("gpt-4o", "What is AI?")),
        ("messages", SAYS.format("claude-3-5-sonnet", "Hello Claude")),
    ],
)
def test_sample_javascript(station: Station, key: str, name: str, text: str) -> None:
    done = javascript(mine(samples.JAVASCRIPT[name], station.url, key))
    assert (done.returncode, done.stdout) == (0, text + "\n"), done.stderr


@node_needed
def test_sample_javascript_stream_prints_every_delta_and_throws_at_done(station: Station, key: str) -> None:
    code = mine(samples.JAVASCRIPT_STREAM, station.url, key)
    log = "console.log = one => process.stdout.write(JSON.stringify(one) + '\\n');\n"
    done = javascript(f"{log}{code}await streamChat('Hello');")
    deltas = [json.loads(line) for line in done.stdout.splitlines()]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == SAYS.format("gpt-4o", "Hello")
    assert deltas[-1] == {}
    assert done.returncode == 1
    assert re.search(r"SyntaxError: .*\[DONE\]", done.stderr) or "SyntaxError: Unexpected token" in done.stderr


def test_sample_query_key(station: Station, key: str) -> None:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(mine(samples.QUERY_URL, station.url, key), json=body, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == SAYS.format("gpt-4o", "Hello")
    wrong = httpx.post(mine(samples.QUERY_URL, station.url, key + "x"), json=body, trust_env=False)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")


RETRY = """
import json, sys
import openai

client = openai.OpenAI(api_key="YOUR_API_KEY", base_url="https://www.nbapi.com.cn")
ask = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
for _ in range(2):
    client.chat.completions.create(**ask)  # the whole minute's allowance
slept = []

def sleep(seconds):
    slept.append(seconds)
    if len(slept) >= COME_BACK:
        client.api_key = "OTHER_KEY"  # a minute is over

time.sleep = sleep
try:
    print("answer:", call_api_with_retry(client, **ask).choices[0].message.content)
except Exception as exc:
    print("gave up:", exc)
print("slept:", json.dumps(slept))
"""


def retry(station: Station, key: str, other: str, come_back: int) -> tuple[list[float], list[float], str]:
    """Run the sample; return what it slept, what it says it slept, its end."""
    code = samples.PYTHON_RETRY + RETRY.replace("OTHER_KEY", other).replace("COME_BACK", str(come_back))
    done = python(mine(code, station.url, key))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = [float(found) for found in re.findall(r"^Rate limited, waiting (.*)s$", done.stdout, re.MULTILINE)]
    return json.loads(lines[-1].removeprefix("slept: ")), said, lines[-2]


def test_sample_python_retry_sleeps_and_calls_again(station: Station, key: str, limited_key: str) -> None:
    slept, said, end = retry(station, limited_key, key, 3)
    assert len(said) == 1
    assert 1 <= said[0] <= 2
    assert slept[-1] == said[0]
    # What the SDK slept by itself is the station's retry-after: two calls a minute, so half a minute, less what passed.
    assert all(25 <= one <= 30 for one in slept[:-1])
    assert len(slept) == 3
    assert end == "answer: " + SAYS.format("gpt-4o", "Hello")


def test_sample_python_retry_gives_up_after_three_times(station: Station, key: str, limited_key: str) -> None:
    _, said, end = retry(station, limited_key, key, 1000)
    assert [int(one) for one in said] == [1, 2, 4]
    assert end == "gave up: Max retries exceeded"
