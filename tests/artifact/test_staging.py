from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fairy_compile.artifact import check_output, staged_directory
from fairy_compile.artifact.staging import check_apart
from fairy_compile.errors import FairyError

Usage = namedtuple("Usage", "total used free")


def entries(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def interrupt(output: Path, error: BaseException, resume_key: str | None = None) -> None:
    """Write a file into the staged directory, then fail."""
    with staged_directory(output, force=False, resume_key=resume_key) as work:
        (work / "a").write_text("1")
        raise error


def test_directory_appears_when_complete(tmp_path):
    with staged_directory(tmp_path / "out", force=False) as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert work.parent == tmp_path
    assert entries(tmp_path) == {"out"}
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, FairyError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        interrupt(tmp_path / "new" / "deep" / "out", error("stop"))
    assert entries(tmp_path) == set()


def test_existing_output_needs_force(tmp_path):
    (tmp_path / "fairy.json").touch()
    with pytest.raises(FairyError, match="--force"):
        check_output(tmp_path, force=False)


def test_empty_output_needs_no_force(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out", force=False) as work:
        (work / "a").touch()
    assert entries(tmp_path / "out") == {"a"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fairy.json", ""),
        ("config.json", '{"quantization_config": {"quant_method": "fairy"}}'),
    ],
)
def test_force_replaces_what_is_ours(tmp_path, name, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    with staged_directory(out, force=True) as work:
        (work / "a").touch()
        assert entries(out) == {name}
    assert entries(out) == {"a"}
    assert entries(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("thesis.tex", ""), ("config.json", "{}"), ("config.json", "["), ("config.json", "[]")],
)
def test_force_does_not_replace_what_is_not_ours(tmp_path, name, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(FairyError, match="did not write"), staged_directory(out, force=True):
        pass
    assert (out / name).read_text() == text


def test_force_does_not_replace_home_or_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "fairy.json").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FairyError, match="did not write"):
        check_output(tmp_path, force=True)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(FairyError, match="did not write"):
        check_output(tmp_path, force=True)


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FairyError, match="is a file"):
        check_output(tmp_path / "out", force=True)


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(FairyError, match="cannot create"),
        staged_directory(tmp_path / "file" / "out", force=False),
    ):
        pass


@pytest.mark.parametrize("length", [240, 300])
def test_output_with_too_long_a_name(tmp_path, length):
    output = tmp_path / ("x" * length)
    with pytest.raises(FairyError, match=rf"name has {length} bytes.*choose a shorter --output"):
        check_output(output, force=False)
    with pytest.raises(FairyError, match="too many"), staged_directory(output, force=False):
        pass
    assert entries(tmp_path) == set()


def test_output_on_a_file_system_without_writing(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("fairy_compile.artifact.staging.os.open", refuse)
    with (
        pytest.raises(FairyError, match=r"cannot write .*: Read-only file system; choose another"),
        staged_directory(tmp_path / "out", force=False),
    ):
        pass
    assert entries(tmp_path) == set()


def test_what_cannot_be_read_is_not_taken_for_the_output(tmp_path):
    """Beside the output or anywhere else; tests may run as one who reads all."""

    def use(file: Path) -> None:
        with staged_directory(tmp_path / "out", force=False):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    for file in (tmp_path / "model" / "config.json", Path("/elsewhere/tokenizer.json")):
        with pytest.raises(FairyError, match=f"cannot open {file}: Permission denied; give files"):
            use(file)
    for file in (tmp_path, tmp_path / "out" / "x", tmp_path / ".out.lock"):
        with pytest.raises(FairyError, match=f"cannot write {file}: Permission denied; choose"):
            use(file)


def test_output_that_is_a_mounted_file_system(tmp_path, monkeypatch):
    """As a container's volume: found before the work, or by the system when it takes the name."""
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FairyError, match=r"out is a mounted .*; name a directory in it, such as"):
        check_output(tmp_path / "out", force=True)
    monkeypatch.undo()

    def refuse(self, _):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with (
        pytest.raises(FairyError, match=r"cannot write .*out: Device or resource busy; choose"),
        staged_directory(tmp_path / "out", force=True),
    ):
        pass
    assert entries(tmp_path) == {"out"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_output_where_no_file_can_be(tmp_path):
    with (
        pytest.raises(FairyError, match=r"cannot write /proc/.*: No such file.*; choose another"),
        staged_directory("/proc/out", force=False),
    ):
        pass


def test_output_that_would_replace_what_it_is_made_from(tmp_path):
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output, how in ((source, "is"), (tmp_path / "link", "is"), (tmp_path / "a", "holds")):
        with pytest.raises(FairyError, match=f"the output .* {how} what it is made from, .*source"):
            check_apart(output, source)
    check_apart(source / "inner", source)
    check_apart(tmp_path / "b", source)


def test_output_that_is_the_root():
    with pytest.raises(FairyError, match="whole file system"):
        check_output("/", force=True)


def test_too_little_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 1_100_000_000))
    with pytest.raises(FairyError, match=r"needs 3\.2 GB, but its disk has only 1\.1 GB"):
        check_output(tmp_path / "a" / "out", force=False, needed_bytes=3_200_000_000)
    with (
        pytest.raises(FairyError, match="needs"),
        staged_directory(tmp_path / "a" / "out", force=False, needed_bytes=3_200_000_000),
    ):
        pass
    assert entries(tmp_path) == set()


def test_disk_that_fills_up_meanwhile(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FairyError, match="disk filled up") as caught:
        interrupt(tmp_path / "out", full, resume_key="k")
    assert "goes on from there" in str(caught.value)
    with staged_directory(tmp_path / "out", force=False, resume_key="k") as work:
        assert entries(work) == {"a"}


def test_interrupted_build_goes_on_with_the_same_key(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out", KeyboardInterrupt(), resume_key="k")
    assert not (tmp_path / "out").exists()
    with staged_directory(tmp_path / "out", force=False, resume_key="k") as work:
        assert entries(work) == {"a"}
    assert entries(tmp_path) == {"out"}
    assert entries(tmp_path / "out") == {"a"}


def test_other_key_removes_the_stale_directory(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out", KeyboardInterrupt(), resume_key="old")
    with staged_directory(tmp_path / "out", force=False, resume_key="new") as work:
        assert entries(work) == set()
        assert len([p for p in tmp_path.iterdir() if ".partial-" in p.name]) == 1


def test_partial_of_another_output_is_left_alone(tmp_path):
    (tmp_path / ".other.partial-1").mkdir()
    with staged_directory(tmp_path / "out", force=False):
        pass
    assert entries(tmp_path) == {"out", ".other.partial-1"}


def test_bad_input_leaves_nothing_to_resume(tmp_path):
    with pytest.raises(FairyError, match="NaN"):
        interrupt(tmp_path / "out", FairyError("a weight is NaN"), resume_key="k")
    assert entries(tmp_path) == set()


def test_interruption_before_any_file_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        staged_directory(tmp_path / "new" / "out", force=False, resume_key="k"),
    ):
        raise KeyboardInterrupt
    assert entries(tmp_path) == set()


def test_two_builds_of_one_output_exclude_each_other(tmp_path):
    with staged_directory(tmp_path / "out", force=False, resume_key="k") as work:
        (work / "a").touch()
        with (
            pytest.raises(FairyError, match="another process is writing"),
            staged_directory(tmp_path / "out", force=False, resume_key="k"),
        ):
            pass
        assert (work / "a").exists()
        with staged_directory(tmp_path / "out2", force=False):
            pass
    assert entries(tmp_path) == {"out", "out2"}


def test_killed_build_frees_the_lock_and_can_be_resumed(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from fairy_compile.artifact.staging import staged_directory\n"
        "with staged_directory(sys.argv[1], force=False, resume_key='k') as work:\n"
        "    (work / 'a').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], cwd=root)
    assert killed.returncode == -9
    with staged_directory(tmp_path / "out", force=False, resume_key="k") as work:
        assert entries(work) == {"a"}
    assert entries(tmp_path) == {"out"}


def test_failed_replacement_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fairy.json").touch()
    rename = Path.rename

    def fail_for_partial(self, target):
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(FairyError, match="cannot write"), staged_directory(out, force=True):
        pass
    assert entries(out) == {"fairy.json"}
    assert entries(tmp_path) == {"out"}


def test_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    (tmp_path / ".out.old-1").mkdir()
    (tmp_path / ".out.old-1" / "fairy.json").touch()
    with (
        pytest.raises(FairyError, match="--force"),
        staged_directory(tmp_path / "out", force=False),
    ):
        pass
    assert entries(tmp_path) == {"out"}
    assert entries(tmp_path / "out") == {"fairy.json"}


def test_output_through_a_link_replaces_what_it_points_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_directory(tmp_path / "link", force=False) as work:
        (work / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "real") == {"a"}
