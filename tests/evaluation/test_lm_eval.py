"""The lm-eval adapter on tasks of our own: nothing is downloaded."""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.evaluation.scores import log_softmax

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

CHOICES = [" return", " import x", " def"]


@pytest.fixture(scope="module")
def lm(artifact):
    from fairy_compile.evaluation.lm_eval_model import FairyCompileLM

    with fc.load(artifact) as model:
        yield FairyCompileLM(model)


def request(*args):
    return SimpleNamespace(args=args)


def by_hand(lm, context, continuation):
    """Return (log-likelihood, greedy) from the logits of the whole sequence."""
    ids = [*context, *continuation]
    log_p = log_softmax(lm.model.logits(ids[:-1]))[len(context) - 1 :]
    total = log_p[np.arange(len(continuation)), continuation].sum()
    return total, bool((log_p.argmax(axis=1) == continuation).all())


def test_likelihoods_of_choices_equal_the_logits(lm):
    questions = ["def function(argument):\n   ", "import", "return argument"]
    requests = [request(q, c) for q in questions for c in CHOICES]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (total, greedy), (question, choice) in zip(found, (r.args for r in requests), strict=True):
        want, same = by_hand(lm, *lm._encode_pair(question, choice))
        assert math.isclose(total, want, rel_tol=1e-5)
        assert greedy == same
    assert lm.model.engine.cache.sequences == []


def test_the_greedy_answer_is_known_as_such(lm):
    prompt = [5, 6, 7]
    answer = []
    for _ in range(4):
        answer.append(int(lm.model.logits([*prompt, *answer])[-1].argmax()))
    wrong = [*answer[:3], (answer[3] + 1) % 320]
    found = lm._loglikelihood_tokens(
        [(("", ""), prompt, answer), (("", ""), prompt, wrong)], disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_an_empty_context_is_the_end_of_text(lm):
    ((total, _),) = lm.loglikelihood([request("", "return")], disable_tqdm=True)
    want, _ = by_hand(lm, [lm.prefix_token_id], lm.tok_encode("return"))
    assert math.isclose(total, want, rel_tol=1e-5)


def test_long_contexts_lose_their_beginning(lm):
    ids = np.random.default_rng(0).integers(1, 300, 300).tolist()
    ((total, _),) = lm._loglikelihood_tokens([(("", ""), ids, [3, 4])], disable_tqdm=True)
    want, _ = by_hand(lm, ids[-127:], [3, 4])
    assert math.isclose(total, want, rel_tol=1e-5)
    with pytest.raises(fc.FairyError, match="context of 128 tokens must hold them"):
        lm._loglikelihood_tokens([(("", ""), ids, ids)], disable_tqdm=True)


def test_rolling_likelihood_is_of_disjoint_windows(lm):
    text = "def function(argument):\n    return argument\n" * 16
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 128
    want = by_hand(lm, [lm.prefix_token_id], ids[:128])[0]
    # The rest gets as much context as fits: its last token is not fed.
    want += by_hand(lm, ids[len(ids) - 129 : 128], ids[128:])[0]
    assert math.isclose(
        lm.loglikelihood_rolling([request(text)], disable_tqdm=True)[0], want, rel_tol=1e-5
    )


def test_answers_end_before_the_stop_string(lm):
    options = {"until": [], "max_gen_toks": 20, "do_sample": False}
    (whole,) = lm.generate_until([request("def function", options)], disable_tqdm=True)
    stop = whole[5:7]
    assert whole == lm.model.generate(
        lm.tok_encode("def function"), 20, temperature=0.0, top_p=1.0, repetition_penalty=1.0
    )
    (text,) = lm.generate_until(
        [request("def function", options | {"until": stop})], disable_tqdm=True
    )
    assert text == whole[: whole.index(stop)]
    with pytest.raises(fc.FairyError, match="asks for 500 tokens of answer"):
        lm.generate_until([request("x", {"max_gen_toks": 500})], disable_tqdm=True)
    with pytest.raises(fc.FairyError, match="generation option 'num_beams'"):
        lm.generate_until([request("x", {"num_beams": 4})], disable_tqdm=True)


def test_a_chat_is_rendered_by_the_models_template(lm):
    messages = [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(messages) == lm.model.template.render(messages)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write a multiple-choice, a perplexity and a generation task over local files."""
    from lm_eval import tasks

    # Reading the thousands of tasks of the harness itself takes half a minute.
    own = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", own)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with (tmp_path / "data.jsonl").open("w") as out:
        for i in range(6):
            entry = {"question": f"def function{i}(argument):\n   ", "choices": CHOICES, "gold": 0}
            out.write(json.dumps(entry) + "\n")
    head = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f'task: tiny_choice\n{head}output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: tiny_text\n{head}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (tmp_path / "answer.yaml").write_text(
        f'task: tiny_answer\n{head}output_type: generate_until\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["\\n"]\n'
        "  max_gen_toks: 8\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return tmp_path


def test_tasks_run_through_the_harness(lm, artifact, tasks):
    from fairy_compile.evaluation import evaluate_tasks

    names = ["tiny_choice", "tiny_text", "tiny_answer"]
    result = evaluate_tasks(artifact, names, include_path=tasks)
    rows = {(row.task, row.metric): row for row in result.rows}
    chosen = rows["tiny_choice", "acc,none"]
    assert chosen.examples == 6
    right = 0
    for i in range(6):
        question = f"def function{i}(argument):\n   "
        scores = [by_hand(lm, *lm._encode_pair(question, c))[0] for c in CHOICES]
        right += int(np.argmax(scores) == 0)
    assert math.isclose(chosen.value, right / 6)
    assert rows["tiny_text", "bits_per_byte,none"].value > 1
    assert 0 <= rows["tiny_answer", "exact_match,none"].value <= 1
    json.dumps(result.to_json())
    with pytest.raises(fc.FairyError, match=r"no task 'tiny_choise'\. Did you mean tiny_ch"):
        evaluate_tasks(artifact, ["tiny_choise"], include_path=tasks)
    with pytest.raises(fc.FairyError, match="--limit is 0"):
        evaluate_tasks(artifact, names, limit=0)


def test_tasks_from_the_command_line(artifact, tasks):
    from typer.testing import CliRunner

    from fairy_compile.cli import app

    options = ["--tasks", "tiny_choice", "--include-path", str(tasks), "--limit", "2"]
    result = CliRunner().invoke(app, ["eval", str(artifact), *options])
    assert result.exit_code == 0, result.stderr
    assert "acc,none" in result.stdout
    assert "first 2 examples" in result.stdout


def test_results_are_those_of_the_harness_own_model(lm, packed):
    """Its model for transformers, running the same codes: the same figures for every request."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from fairy_compile.evaluation.torch_model import TorchModel
    from fairy_compile.frontends.source import open_source

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(packed / "tokenizer.json"), eos_token="<|end|>", pad_token="<|end|>"
    )
    model = TorchModel(open_source(packed))._model
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=128)
    long = "def function(argument):\n    return argument\n" * 20
    pairs = [("", "return x"), ("def f(x):\n ", " return"), (long, " import"), (long, long[:99])]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    want = theirs.loglikelihood(requests, disable_tqdm=True)
    for ours, other in zip(lm.loglikelihood(requests, disable_tqdm=True), want, strict=True):
        assert math.isclose(ours[0], other[0], rel_tol=1e-5)
        assert ours[1] == other[1]
    requests = [instance("loglikelihood_rolling", t) for t in ("return", long, long + long[:50])]
    np.testing.assert_allclose(
        lm.loglikelihood_rolling(requests, disable_tqdm=True),
        theirs.loglikelihood_rolling(requests, disable_tqdm=True),
        rtol=1e-5,
    )
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [instance("generate_until", t, dict(options)) for t in ("def f", long)]
    want = theirs.generate_until(requests, disable_tqdm=True)
    assert lm.generate_until(requests, disable_tqdm=True) == want


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)
