"""Load a server with many clients: throughput against one client, equal answers, flat memory.

    python benchmarks/serve.py ARTIFACT --clients 32 --seconds 300 [-- OPTIONS OF serve]

Starts `fairy_compile serve ARTIFACT`, asks every job alone (the reference and the single-stream
throughput), then lets the clients ask random jobs at once for the given time. Some leave in the
middle of their answer. Ends with status 1 if an answer differed or an error came back.
Build the artifact with `--max-batch` of at least the number of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

PROMPTS = (
    "def mean(values):",
    "import json\n",
    "class Stack:\n    def __init__(self",
    "for i in range(",
    "# Return the sum of all values\n" * 12,
    "x = 3\n",
    "try:\n    value = int(text)\nexcept ",
    '"""Tests of ',
)
LENGTHS = (24, 48, 96)
LEAVERS = 0.05  # share of requests whose client leaves after the first piece
WARM_UP = 0.2  # share of the time after which memory must stay


@dataclass
class Result:
    """What was measured; tokens are completion tokens."""

    clients: int
    seconds: float = 0.0
    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    left: int = 0
    single_tokens_per_second: float = 0.0
    batched_tokens_per_second: float = 0.0
    rss_start: int = 0
    rss_end: int = 0

    @property
    def speedup(self) -> float:
        """Batched throughput over single-stream throughput."""
        return self.batched_tokens_per_second / self.single_tokens_per_second

    @property
    def rss_growth(self) -> float:
        """Growth of resident memory after warm-up, as a share."""
        return self.rss_end / self.rss_start - 1


class Load:
    """Jobs, their answers, and the clients that ask for them."""

    def __init__(self, address: str, clients: int, lengths: Sequence[int]):
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        self.http = httpx.AsyncClient(base_url=address, timeout=300, limits=limits)
        self.jobs = [(prompt, length) for prompt in PROMPTS for length in lengths]
        self.expected: dict[tuple[str, int], str] = {}
        self.result = Result(clients)
        self.tokens = 0

    def body(self, job: tuple[str, int], **more: object) -> dict:
        return {"model": "m", "prompt": job[0], "max_tokens": job[1], "temperature": 0, **more}

    async def ask(self, job: tuple[str, int]) -> tuple[str, int]:
        """Return the text of a job and its number of tokens."""
        reply = await self.http.post("/v1/completions", json=self.body(job))
        reply.raise_for_status()
        answer = reply.json()
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    async def alone(self) -> None:
        """Ask every job by itself, twice; the second time counts."""
        for _ in range(2):
            start, tokens = time.perf_counter(), 0
            for job in self.jobs:
                self.expected[job], count = await self.ask(job)
                tokens += count
            self.result.single_tokens_per_second = tokens / (time.perf_counter() - start)

    async def leave(self, job: tuple[str, int]) -> None:
        async with self.http.stream(
            "POST", "/v1/completions", json=self.body(job, stream=True)
        ) as reply:
            async for _ in reply.aiter_bytes():
                break

    async def client(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < until:
            job = rng.choice(self.jobs)
            try:
                if rng.random() < LEAVERS:
                    await self.leave(job)
                    self.result.left += 1
                    continue
                text, tokens = await self.ask(job)
            except httpx.HTTPError as error:
                self.result.errors.append(repr(error))
                continue
            self.result.answers += 1
            self.result.wrong += text != self.expected[job]
            self.tokens += tokens

    async def together(self, seconds: float, server: psutil.Process) -> None:
        start = time.perf_counter()
        until = start + seconds
        tasks = [
            asyncio.create_task(self.client(seed, until)) for seed in range(self.result.clients)
        ]
        samples = []
        while time.perf_counter() < until:
            await asyncio.sleep(min(1.0, seconds / 50))
            if time.perf_counter() - start >= WARM_UP * seconds:
                samples.append(server.memory_info().rss)
        await asyncio.gather(*tasks)
        self.result.seconds = time.perf_counter() - start
        self.result.batched_tokens_per_second = self.tokens / self.result.seconds
        tenth = max(1, len(samples) // 10)
        self.result.rss_start = sum(samples[:tenth]) // tenth
        self.result.rss_end = sum(samples[-tenth:]) // tenth


async def measure(
    address: str, clients: int, seconds: float, lengths: Sequence[int], pid: int
) -> Result:
    load = Load(address, clients, lengths)
    async with load.http:
        await load.alone()
        await load.together(seconds, psutil.Process(pid))
    return load.result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of answers")
    parser.add_argument("--json", action="store_true")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    command = [sys.executable, "-m", "fairy_compile.cli", "serve", str(args.artifact)]
    command += ["--port", "0", "--model-name", "m", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                print(line, end="", file=sys.stderr)
                if found := re.search(r"at (http://\S+)/v1", line):
                    break
            else:
                return 2
            result = asyncio.run(
                measure(found[1], args.clients, args.seconds, args.lengths, server.pid)
            )
        finally:
            server.terminate()
    if args.json:
        values = {"speedup": result.speedup, "rss_growth": result.rss_growth}
        print(json.dumps(asdict(result) | values))
    else:
        print(
            f"{result.clients} clients, {result.seconds:.0f} s: {result.answers} answers, "
            f"{result.wrong} differ from the single-stream answer, {len(result.errors)} errors, "
            f"{result.left} left early\n"
            f"tokens/s: {result.single_tokens_per_second:.0f} alone, "
            f"{result.batched_tokens_per_second:.0f} together ({result.speedup:.2f}x)\n"
            f"resident memory: {result.rss_start / 1e6:.1f} MB after warm-up, "
            f"{result.rss_end / 1e6:.1f} MB at the end ({result.rss_growth:+.1%})"
        )
    return int(bool(result.wrong or result.errors))


if __name__ == "__main__":
    sys.exit(main())
