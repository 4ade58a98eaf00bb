"""CPUs a process may use, on systems simulated by their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.runtime import cpus
from fairy_compile.runtime.threads import default_threads


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("0", [0]), ("0-3,6", [0, 1, 2, 3, 6]), (" 5 , 1-2,1", [5, 1, 2])]
)
def test_parse(text, expected):
    assert cpus.parse_cpus(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0x1", "1-", "999999"])
def test_parse_refuses(text):
    with pytest.raises(FairyError, match="such as 0-3,6"):
        cpus.parse_cpus(text)


def test_check():
    assert cpus.check_cpus([2, 1, 2], {0, 1, 2}) == [1, 2]
    with pytest.raises(FairyError, match=r"cpus is \[1, 7\]; allowed: some of \[0, 1\]"):
        cpus.check_cpus([7, 1], {0, 1})
    with pytest.raises(FairyError, match=r"cpus is \[\]"):
        cpus.check_cpus([], {0, 1})
    with pytest.raises(FairyError, match="leave --cpus out"):
        cpus.check_cpus([0], None)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ([1024] * 4, [0, 1, 2, 3]),
        ([250] * 4 + [1024] * 4, [4, 5, 6, 7]),  # four little cores would hold the big ones back
        ([300, 300, 300, 750, 750, 750, 750, 1024], [3, 4, 5, 6, 7]),  # 5 x 750 of 8 x 300
        ([600, 600, 1024, 1024], [0, 1, 2, 3]),  # 4 x 600 beats 2 x 1024
        ([512, 512, 1024, 1024][::-1], [0, 1, 2, 3]),  # a tie takes more cores: shorter parts
    ],
)
def test_worthwhile_cpus(monkeypatch, tmp_path, speeds, expected):
    write(tmp_path, {f"cpu{i}/cpu_capacity": f"{speed}\n" for i, speed in enumerate(speeds)})
    monkeypatch.setattr(cpus, "SYS_CPU", tmp_path)
    assert cpus.worthwhile_cpus(range(len(speeds))) == expected


def test_speed_from_frequencies(monkeypatch, tmp_path):
    frequencies = {0: 1_000_000, 1: 3_000_000, 2: 3_000_000}
    write(tmp_path, {f"cpu{i}/cpufreq/cpuinfo_max_freq": str(f) for i, f in frequencies.items()})
    monkeypatch.setattr(cpus, "SYS_CPU", tmp_path)
    assert cpus.worthwhile_cpus(frequencies) == [1, 2]


def test_physical_cores(monkeypatch, tmp_path):
    siblings = ["0,2", "1,3", "0,2", "1,3"]
    write(
        tmp_path,
        {f"cpu{i}/topology/thread_siblings_list": f"{s}\n" for i, s in enumerate(siblings)},
    )
    monkeypatch.setattr(cpus, "SYS_CPU", tmp_path)
    assert cpus.physical_cores(range(4)) == 2
    assert cpus.physical_cores([0, 2]) == 1
    assert cpus.physical_cores([8, 9]) == 2  # the system tells nothing about these


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (
            "4:cpu,cpuacct:/a\n3:cpuset:/c\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_quota(monkeypatch, tmp_path, groups, files, expected):
    write(tmp_path, {"proc/self/cgroup": groups} | {f"cg/{name}": t for name, t in files.items()})
    monkeypatch.setattr(cpus, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cpus, "CGROUP", tmp_path / "cg")
    assert cpus.quota() == expected


@pytest.mark.parametrize(("granted", "expected"), [(None, 4), (2.5, 2), (0.5, 1), (64.0, 4)])
def test_default_threads_respects_the_quota(monkeypatch, granted, expected):
    monkeypatch.setattr("fairy_compile.runtime.threads.quota", lambda: granted)
    monkeypatch.setattr("fairy_compile.runtime.threads.physical_cores", len)
    assert default_threads(range(4)) == expected
