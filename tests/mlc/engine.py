"""MLC's own engine with an artifact, driven token by token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """What the engine wrote to one choice of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


class MlcEngine:
    """MLC's engine in this thread, with an artifact on a device.

    Args:
        artifact: the model directory.
        device: TVM's name of it.
        linked: the name of a library that this process is linked with, which is taken instead of
            the artifact's.
        config: fields of MLC's ``EngineConfig``.

    Requests are token ids: MLC's tokenizer adds no tokens of its own, and what is compared is the
    model.
    """

    def __init__(
        self, artifact: Path, device: str = "cpu", linked: str | None = None, **config: Any
    ) -> None:
        import tvm
        from mlc_llm.serve import EngineConfig
        from mlc_llm.serve.sync_engine import SyncMLCEngine

        class Config(EngineConfig):
            """What the engine is told, whose Python only takes libraries that are files."""

            def asjson(self) -> str:
                other = {"model_lib": f"system://{linked}"} if linked else {}
                return json.dumps(json.loads(super().asjson()) | other)

        self.artifact = artifact
        (library,) = artifact.glob("model.*")
        sizes = {"max_num_sequence": 4, "max_total_sequence_length": 1024}
        self._engine = SyncMLCEngine(
            model=str(artifact),
            model_lib=str(library),
            device=tvm.device(device),
            mode="server",
            engine_config=Config(**{**sizes, **config}),
        )

    def generate(self, prompts: list[list[int]], **generation: Any) -> list[list[Answer]]:
        """Run requests together; return every request's choices.

        ``generation`` are fields of MLC's ``GenerationConfig``, the same for all requests. Stop
        tokens are those given here, none by default.
        """
        from mlc_llm.protocol.generation_config import GenerationConfig
        from mlc_llm.serve.data import TokenData

        settings = {"n": 1, "top_p": 1.0, "stop_token_ids": [], **generation}
        config = GenerationConfig(**settings)
        answers = [[Answer() for _ in range(config.n)] for _ in prompts]

        def receive(outputs: list[Any]) -> None:
            for output in outputs:
                request, streams = output.unpack()
                if len(streams) == config.n:  # else it reports usage
                    for answer, stream in zip(answers[int(request)], streams, strict=True):
                        _add(answer, stream)

        self._engine._ffi["set_request_stream_callback"](receive)
        for i, prompt in enumerate(prompts):
            request = self._engine.create_request(str(i), [TokenData(prompt)], config)
            self._engine.add_request(request)
        for _ in range(len(prompts) * config.n * (config.max_tokens + max(map(len, prompts)))):
            if all(answer.finish for choices in answers for answer in choices):
                return answers
            self._engine.step()
        raise AssertionError(f"the engine did not finish: {answers}")

    def drafts(self) -> tuple[list[int], list[int]]:
        """Return how many tokens a draft model proposed, and how many of them were accepted.

        Numbers are those of the first, second, ... token of a step, which is not the draft's.
        """
        counts = self._engine.metrics().metrics["spec_decode"]
        return counts["draft_count"], counts["accept_count"]


def _add(answer: Answer, stream: Any) -> None:
    """Append what one step gave to an answer."""
    answer.tokens += list(stream.delta_token_ids)
    for text in stream.delta_logprob_json_strs or ():
        answer.logprobs.append(json.loads(text)["logprob"])
    answer.finish = answer.finish or stream.finish_reason
