import csv
import io
import json

import pytest

from fairy_compile.bench.tables import FORMATS, render
from tests.bench.results import COMPARISON, RESULT


def markdown_rows(text):
    """Return the tables of a Markdown text: one list of rows (lists of cells) each."""
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    split = [[line.replace("\\|", "/") for line in block] for block in blocks]
    return [[[c.strip() for c in line.strip("|").split("|")] for line in block] for block in split]


def test_markdown_has_the_columns_of_llama_bench_and_ours():
    tests, kernels = markdown_rows(render(RESULT, "md"))
    assert tests[0][:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert tests[0][7:] == ["median", "min..max", "cores", "GB/s", "% of read"]
    model = ["tiny/model llama w2", "3.00 GiB", "6.74 B", "cpu:0 (cpu, int8)", "2"]
    assert tests[2] == [*model, "pp512", "32.00 ± 2.83", "32.00", "30.00..34.00", "1.88", "-", "-"]
    # 8 tokens/s x 1.5 GB; of a plain read: median of 9/15, 12/16 and 15/20.
    assert tests[3] == [
        *model, "tg128 @ d64", "8.00 ± 2.00", "8.00", "6.00..10.00", "1.50", "12.00", "75%",
    ]  # fmt: skip
    assert kernels[0][0] == "one decode step at depth 64"
    assert kernels[2] == ["phase_gemm_a", "32", "75000", "75.0%"]


def test_comparison_begins_with_ratios_of_medians():
    pairs = markdown_rows(render(COMPARISON, "md"))[0]
    assert pairs[2] == [
        "pp512", "llama.cpp Q4_K_M", "4.00 GiB", "33.00 ± 0.00", "11.00 ± 0.00", "3.00x", "3.00x",
    ]  # fmt: skip
    assert pairs[3][-4:] == ["8.50 ± 0.50", "4.25 ± 0.25", "2.00x", "2.00x"]
    assert "Q4_K 3000.0 MB, F32 1.0 MB" in render(COMPARISON, "md")


def test_table_is_aligned_and_names_machine_and_command():
    text = render(RESULT, "table")
    head, rule, first, second = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    assert "Some CPU, 2 cores, 24 GiB, Linux x86_64, load 0.25 before" in text
    assert "15.0 to 20.0 GB/s" in text
    assert "command: fairy_compile bench x" in text


def test_csv_has_one_line_a_test_and_side():
    rows = list(csv.DictReader(io.StringIO(render(COMPARISON, "csv"))))
    assert [row["test"] for row in rows] == ["pp512", "tg128 @ d64"] + 2 * ["pp512"] + 2 * [
        "tg128 @ d64"
    ]
    assert rows[-1]["model"] == "llama.cpp Q4_K_M"
    assert float(rows[-1]["median_ts"]) == 4.25
    assert float(rows[1]["stddev_ts"]) == 2.0


def test_json_holds_samples_and_what_follows_from_them():
    data = json.loads(render(COMPARISON, "json"))
    decode = data["result"]["tests"][1]
    assert decode["test"] == "tg128 @ d64"
    assert decode["tokens_per_second"] == {
        "mean": 8.0, "stddev": 2.0, "median": 8.0, "min": 6.0, "max": 10.0,
        "samples": [6.0, 8.0, 10.0],
    }  # fmt: skip
    assert decode["read_share"] == 0.75
    assert data["result"]["model"]["manifest_sha256"].startswith("0123")
    assert data["runs"][0]["pairs"][0]["ratio"] == 3.0


@pytest.mark.parametrize("form", FORMATS)
def test_unmeasured_values_are_left_out(form):
    from dataclasses import replace

    bare = replace(
        RESULT,
        peak_resident_bytes=None,
        machine=replace(RESULT.machine, load_average=None),
        tests=tuple(replace(t, read_bytes_per_second=None) for t in RESULT.tests),
    )
    text = render(bare, form)
    assert "None" not in text
    assert "nan" not in text
