import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from itertools import count

import pytest

from fairy_compile.cli import chat as chat_verb
from fairy_compile.cli import output

GREEDY = ["--temperature", "0", "--max-tokens", "6"]


def test_a_conversation_through_a_pipe(cli, artifact):
    script = "hello\n\n/stats\n/nonsense\nworld\n/exit\nnot read\n"
    result = cli("chat", artifact[0], *GREEDY, stdin=script)
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in result.stderr
    assert "tok/s" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert result.stderr.count("(cut at --max-tokens)") == 2
    assert ">" not in result.stdout.splitlines()[0][:1]


def test_messages_that_are_no_text(cli, artifact):
    result = cli("chat", artifact[0], *GREEDY, stdin=b"hello\n\xff\n")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: stdin is not utf-8 text: invalid")


def test_a_closed_stdin_has_no_messages(artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    chat_verb(artifact[0])


def test_reset_begins_again(cli, artifact):
    result = cli("chat", artifact[0], *GREEDY, stdin="hello\nthere\n/reset\nhello\n")
    alone = cli("chat", artifact[0], *GREEDY, stdin="hello\n")
    assert result.exit_code == 0
    assert result.stdout.startswith(alone.stdout)
    assert result.stdout.endswith(alone.stdout)
    assert "(a new conversation)" in result.stderr


def test_the_system_message_is_part_of_the_conversation(cli, artifact):
    with_system = cli("chat", artifact[0], "--system", "Be", *GREEDY, stdin="hello\n")
    joined = cli("run", artifact[0], "-p", "Be\nhello", *GREEDY)
    assert with_system.stdout == joined.stdout


def test_an_error_in_a_piped_chat_ends_with_2(cli, artifact):
    result = cli("chat", artifact[0], *GREEDY, stdin="x" * 300 + "\nhello\n")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: the conversation has 300 tokens")


def test_wrong_options_end_before_the_first_message(cli, artifact):
    result = cli("chat", artifact[0], "--top-p", "2", stdin="")
    assert result.exit_code == 2
    assert "top_p is 2.0" in result.stderr


def test_ctrl_c_stops_the_answer_not_the_program(cli, artifact, monkeypatch):
    pieces = []

    def write_text(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(chat_verb.__globals__, "write_text", write_text)
    before = signal.getsignal(signal.SIGINT)
    script = "hello\n/stats\nagain\n"
    result = cli("chat", artifact[0], "--temperature", "0", "--max-tokens", "50", stdin=script)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("(stopped)") == 1
    assert pieces[2] == "\n"
    assert len(pieces) > 10  # the next answer came
    assert signal.getsignal(signal.SIGINT) is before


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.write_text("a\x1b]0;title\x07\tb\n\x9bc é🙂")
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffd\tb\n\ufffdc é🙂"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_on_a_terminal_ctrl_d_leaves(artifact):
    main, terminal = os.openpty()
    program = [sys.executable, "-m", "fairy_compile.cli", "chat", str(artifact[0]), *GREEDY]
    # Programs started in the background ignore SIGINT, and so do theirs.
    undo = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with subprocess.Popen(program, preexec_fn=undo, **streams) as process:
        os.close(terminal)

        def read_until(text, poke=lambda: None):
            shown = ""
            for _ in range(120):
                if text in shown:
                    return shown
                poke()
                if select.select([main], [], [], 0.5)[0]:
                    shown += os.read(main, 1 << 16).decode("utf-8", "replace")
            raise AssertionError(f"{text!r} did not come: {shown!r}")

        try:
            assert "/exit leaves" in read_until("> ")
            # Ctrl-C while it waits; again, seconds later, if it came just before the wait began. A
            # busy machine takes long to answer the first, and a second one would end what follows.
            turns = count()
            read_until(
                "Ctrl-D or /exit leaves",
                lambda: next(turns) % 10 or process.send_signal(signal.SIGINT),
            )
            os.write(main, b"hello\n")
            read_until("(cut at --max-tokens)")
            for _ in range(60):  # Ctrl-D, until it comes when the line is being read
                os.write(main, b"\x04")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                    break
            assert process.returncode == 0
        finally:
            process.kill()
    os.close(main)
