"""Whatever becomes of a command's output, it ends without a traceback; and no text steers the terminal."""

from __future__ import annotations

import errno
import io
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain.utils.errors import UserError, run_command
from raytrain.utils.output import READER_GONE, Output, console, visible

START = "import sys, threading, time\nfrom raytrain.utils.errors import UserError, run_command\n"
SPEAKERS = {
    "much": "for number in range(100_000): print('line', number)",
    "little": "print('a')\nprint('b')",
    "written at once": "for number in range(100): print('line', number, flush=True); time.sleep(0.01)",
    "from a thread": (
        "def speak():\n    for number in range(100): print('line', number, flush=True); time.sleep(0.01)\n"
        "threading.Thread(target=speak, daemon=True).start()\ntime.sleep(20)"
    ),
    "a table": (
        "from raytrain.utils.output import console\n"
        "for number in range(2000): console().print('line', number)\ntime.sleep(0.1)"
    ),
    "a file without end": "open_file = sys.stdout\nwhile True: open_file.write('x' * 1000)",
    "caught": (
        "try:\n    for number in range(100_000): print('line', number)\n"
        "except OSError as error:\n    raise UserError('a corpus cannot be written')"
    ),
    "help": "import argparse\nargparse.ArgumentParser().parse_args(['--help'])",
}


def script(body: str) -> list[str]:
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return [sys.executable, "-c", f"{START}def main():\n{lines}run_command(main)\n"]


def run(body: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **settings.pop("env", {})}  # type: ignore[dict-item]
    known = {"capture_output": True, "text": True, "timeout": 60, "check": False, "env": environment}
    return subprocess.run(script(body), **{**known, **settings})  # type: ignore[call-overload, no-any-return]


# ------------------------------------------------------------------------------------------- the reader


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("speaker", SPEAKERS)
def test_a_reader_that_has_enough_ends_the_command_quietly(speaker: str, unbuffered: str) -> None:
    process = subprocess.Popen(
        script(SPEAKERS[speaker]), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert process.stdout is not None
    if speaker not in ("little", "help"):
        process.stdout.read(4)
    process.stdout.close()
    started = time.monotonic()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(15) == READER_GONE
    assert time.monotonic() - started < 15, "it ends then, not later"


def test_both_outputs_may_go() -> None:
    read, write = os.pipe()
    body = "print('a', flush=True)\ntime.sleep(0.5)\nprint('b', flush=True)\nraise UserError('x')"
    process = subprocess.Popen(script(body), stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    assert process.wait(30) == READER_GONE


def test_what_was_begun_is_ended_when_the_reader_goes(tmp_path: Path) -> None:
    body = f"try:\n{SPEAKERS['much']}\nfinally: open({str(tmp_path / 'kept')!r}, 'w').close()".replace(
        "\nfor", "\n    for"
    )
    process = subprocess.Popen(script(body), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == READER_GONE
    assert (tmp_path / "kept").exists()


def test_a_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run(SPEAKERS["much"], stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (2, f"error: the output cannot be written: {os.strerror(errno.ENOSPC)}\n")


def test_a_closed_output_is_none() -> None:
    command = shlex.join(script("print('a')\nraise UserError('b')"))
    done = subprocess.run(["bash", "-c", f"{command} >&-"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "error: b\n")
    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "a\n")


# ----------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_what_the_output_cannot_show_is_an_escape(encoding: str) -> None:
    text = "ü \N{GRINNING FACE} \\udcff"
    table = "from raytrain.utils.output import console\nfrom rich.table import Table\n"
    table += "table = Table('ü')\ntable.add_row('\N{GRINNING FACE}')\nconsole().print(table)"
    done = run(f"print('{text}')\n{table}\nraise UserError('{text}')", text=False, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 2
    shown, said = (part.decode(encoding.partition(":")[0]) for part in (done.stdout, done.stderr))
    assert "Traceback" not in said
    assert said.count("\n") == 1
    for part in (shown, said):
        assert ("ü" in part) == (not encoding.startswith("ascii"))
        assert ("\N{GRINNING FACE}" in part) == encoding.startswith("utf")
        assert "\\udcff" in part


def test_an_argument_in_another_encoding_than_the_locale_is_one_line() -> None:
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*script("print('never')"), "dir-ü"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the locale reads names as ascii, not as UTF-8: set PYTHONUTF8=1 or LC_ALL=C.UTF-8\n"


EVIL = "a\x1b]0;title\x07b\x1b[2Jc\rd\x7fe\x9b31mf\u202eg\x08h\0i"
SAFE = "a\\x1b]0;title\\x07b\\x1b[2Jc\\rd\\x7fe\\x9b31mf\\u202eg\\x08h\\x00i"


def on_a_terminal(body: str) -> str:
    """What a terminal gets of a command."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        script(body), stdout=follower, stderr=follower, stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    )  # fmt: skip
    os.close(follower)
    parts = []
    try:
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    process.wait(30)
    os.close(leader)
    return b"".join(parts).decode()


def test_no_text_steers_the_terminal() -> None:
    evil = ascii(EVIL)
    body = (
        f"print({evil})\nimport logging\nlogging.getLogger('x').warning({evil})\n"
        "from raytrain.utils.output import console\nfrom rich.table import Table\nfrom rich.markup import escape\n"
        f"table = Table('[bold]x[/bold]')\ntable.add_row(escape({evil}))\nconsole().print(table)\n"
        f"console().print(escape({evil}), style='red')\nraise UserError({evil})"
    )
    shown = on_a_terminal(body)
    assert "\x1b[31m" in shown, "colours of our own do pass"
    for code in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\x08", "\0", "\x7f"):
        assert code not in shown
    assert shown.replace("\r\n", "\n").count("\r") == 0
    assert shown.count(SAFE) >= 2
    assert shown.rstrip().endswith("error: " + SAFE.replace("\\rd", " d"))


def test_lines_and_ordinary_text_stay_as_they_are() -> None:
    text = "ü\t\N{GRINNING FACE}\n\N{MAN}\N{ZERO WIDTH JOINER}\N{GIRL} ~\\x1b"
    assert visible(text) == text
    stream = io.StringIO()
    print(text, file=Output(stream), end="")
    Output(stream).writelines(["a", "\x1b"])
    assert stream.getvalue() == text + "a\\x1b"


def test_the_help_of_options_keeps_its_colours() -> None:
    body = (
        "from dataclasses import dataclass\nfrom raytrain.config.cli import parse_options\n"
        "@dataclass\nclass Options:\n    'Says \\x1b]0;x\\x07.'\n    name: str = 'a\\x1b[2Jb'\n    'A name.'\n"
        "parse_options('x', Options, ['--help'])"
    )
    shown = on_a_terminal(body)
    assert "\x1b[1m" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "\\x1b[2J" in shown


# ------------------------------------------------------------------------------------- width and signals


@pytest.mark.parametrize("columns", ["1", "5", "0", "-3", "x", "39", "1000000000"])
def test_help_is_drawn_for_any_width(columns: str) -> None:
    body = (
        "from raytrain.config.cli import parse_options\nfrom raytrain.search.options import SearchOptions\n"
        "parse_options('x', SearchOptions, ['--help'])"
    )
    done = run(body, env={"COLUMNS": columns}, timeout=30)
    assert done.returncode == 0
    assert "--num-samples" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_the_command(number: int, tmp_path: Path) -> None:
    file = tmp_path / "partial"
    body = (
        f"try:\n    open({str(file)!r}, 'w').close()\n    print('ready', flush=True)\n    time.sleep(20)\n"
        f"finally:\n    import os\n    os.unlink({str(file)!r})"
    )
    # a suite that was started by nohup hands down that the signal is ignored
    process = subprocess.Popen(
        script(body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(15) == 128 + number
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert not file.exists()


def test_under_nohup_a_command_goes_on() -> None:
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nprint('still here')"
    done = run(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_streams_and_signals_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)

    def refuse() -> None:
        raise UserError("two\nlines")

    ends: list[Callable[[], None]] = [lambda: None, refuse, lambda: sys.exit(3)]
    statuses: list[object] = []
    for main in ends:
        try:
            run_command(main)
            statuses.append(None)
        except SystemExit as ended:
            statuses.append(ended.code)
        assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)) == before
    assert statuses == [None, 2, 3]
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize(
    ("file", "line"), [("/x/y", "error: the disk is full: /x/y\n"), (None, "error: the disk is full\n")]
)
def test_a_full_disk_is_one_line(file: str | None, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    with pytest.raises(SystemExit, match="2"):
        run_command(fill)
    assert capsys.readouterr().err == line


def test_outside_a_command_a_console_is_an_ordinary_one(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n"
