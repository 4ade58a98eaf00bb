import errno
import os
import re
import shutil
import subprocess
import sys

import pytest

from fairy_compile import __version__
from fairy_compile.cli import VERBS, app, guard

HEAVY = {"tvm", "tvm_ffi", "torch", "transformers", "rich", "numpy", "tokenizers", "jinja2"}
PROGRAM = [sys.executable, "-m", "fairy_compile.cli"]


def test_help_lists_the_verbs_and_only_those(cli):
    result = cli("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  (\w+)  ", result.stdout.split("Commands:")[1], re.M)
    assert listed == [
        "build",
        "convert",
        "run",
        "chat",
        "serve",
        "bench",
        "eval",
        "inspect",
        "verify",
        "package",
        "tune",
        "train",
        "targets",
    ]
    assert listed == [verb.__name__ for verb in VERBS]


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_every_verb_has_help(cli, verb):
    result = cli(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout or verb in ("chat", "serve")


def test_common_options_are_the_same_everywhere(cli):
    def option_lines(verb):
        text = " ".join(cli(verb, "--help").stdout.split())
        return {name: text.split(name)[1][:40] for name in ("--quant", "--scale", "--force")}

    assert option_lines("build") == option_lines("convert")


def test_help_imports_nothing_heavy_and_is_fast():
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *PROGRAM[1:], "--help"], capture_output=True, text=True
    )
    after = os.times()
    assert result.returncode == 0
    imported = {
        line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "|" in line
    }
    assert "typer" in imported
    assert not HEAVY & {name.split(".")[0] for name in imported}
    # Processor time, which a busy machine does not stretch.
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


def test_version(cli):
    assert cli("--version").stdout.strip() == f"fairy_compile {__version__}"


@pytest.mark.parametrize("module", ["fairy_compile", "fairy_compile.cli"])
def test_modules_run_as_the_command_does(module):
    for arguments in (["--version"], ["build", "--help"], ["bulid"]):
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments], capture_output=True, text=True
        )
        assert result.returncode == (2 if arguments == ["bulid"] else 0)
        text = result.stdout + result.stderr
        assert text.startswith(("fairy_compile ", "Usage: fairy_compile "))
        assert "python" not in text


def test_unknown_verb_and_option_end_with_2(cli):
    assert cli("bulid").exit_code == 2
    assert cli("build", "x", "--quont", "w2").exit_code == 2


def failing(error):
    def verify(*args, **kwargs):
        raise error

    return verify


def test_an_unexpected_error_is_one_line_that_asks_for_a_report(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("fairy_compile.artifact.verify", failing(ValueError("odd\n  thing")))
    result = cli("verify", tmp_path)
    assert result.exit_code == guard.EXIT_BUG == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "ValueError: odd thing; please report this" in result.stderr
    assert "fairy_compile --debug verify" in result.stderr
    debugged = cli("--debug", "verify", tmp_path)
    assert "Traceback (most recent call last)" in debugged.stderr
    assert "Traceback" not in cli("verify", tmp_path).stderr


def test_ctrl_c_is_one_line_and_130(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("fairy_compile.artifact.verify", failing(KeyboardInterrupt()))
    result = cli("verify", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_full_disk_is_not_a_bug(cli, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("fairy_compile.artifact.verify", failing(full))
    result = cli("verify", tmp_path)
    assert result.exit_code == guard.EXIT_ERROR == 2
    assert result.stderr.startswith("error: the disk is full: ")
    assert "report" not in result.stderr


def test_a_missing_permission_is_not_a_bug(cli, tmp_path, monkeypatch):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x/model.so")
    monkeypatch.setattr("fairy_compile.artifact.verify", failing(error))
    result = cli("verify", tmp_path)
    assert result.exit_code == guard.EXIT_ERROR
    assert result.stderr.startswith("error: the system refuses: ")
    assert "x/model.so" in result.stderr
    assert "report" not in result.stderr


def test_a_wrong_tvm_is_refused_only_where_tvm_is_used(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("fairy_compile.tvm_pair.TVM_PAIR", {"apache-tvm": "0.0.1"})
    for verb in (["build", checkpoint, "-o", tmp_path / "a"], ["run", tmp_path, "-p", "x"]):
        result = cli(*verb)
        assert result.exit_code == 2
        assert "pip install apache-tvm==0.0.1" in result.stderr
    assert cli("convert", checkpoint, "-o", tmp_path / "packed").exit_code == 0


def test_ctrl_c_while_typer_is_imported_is_one_line(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [*PROGRAM, "targets"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_around_a_verb_shows_no_traceback(moment):
    """While typer reads the verbs' options, and while libraries are told that all is over."""
    program = {
        "before": "cli.app = lambda **_: signal.raise_signal(signal.SIGINT); cli.main()",
        "after": "atexit.register(lambda: [signal.raise_signal(2) for _ in '12']); cli.main()",
    }[moment]
    # A shell's background jobs, as these tests may be, ignore Ctrl-C, and so do their children.
    heeded = "import atexit, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", f"{heeded}; from fairy_compile import cli; {program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    if moment == "before":
        assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_closed_stdout_is_not_a_bug(artifact):
    command = [*PROGRAM, "run", artifact[0], "--prompt", "a", "--max-tokens", "1"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_a_directory_whose_name_is_not_unicode(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / os.fsdecode(b"odd\xff"))
    output = tmp_path / os.fsdecode(b"out\xff")
    built = subprocess.run(
        [*PROGRAM, "build", model, "-o", output], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "odd? (llama) for cpu" in built.stdout
    ran = subprocess.run(
        [*PROGRAM, "run", output, "--prompt", "a", "--max-tokens", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_both_program_names_are_declared():
    from importlib.metadata import entry_points

    names = {e.name for e in entry_points(group="console_scripts") if "fairy" in e.value}
    assert names == {"fairy_compile", "fairy-compile"}
    assert callable(app)
