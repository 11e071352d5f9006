"""The terminal conversation: lines, blocks, commands, breaking off."""

import io
import json

import pytest

from ropewalk.cli import chat as chat_command
from ropewalk.cli import main
from ropewalk.cli.chat import messages, talk
from ropewalk.errors import UserError


class Echo:
    """Answers with what it was told, in two pieces; `long` is too long."""

    def __init__(self, *_, **sampling) -> None:
        self.messages: list[dict[str, str]] = []
        self.notice = None
        self.dropped = 0
        self.sampling = sampling

    def say(self, text: str):
        if text == "long":
            raise UserError("the message is too long")
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"you said {text}"},
        ]
        yield "you said "
        yield text

    def reset(self) -> None:
        self.messages.clear()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_line_of_a_pipe_is_a_message():
    out, echo = io.StringIO(), Echo()
    talk(echo, io.StringIO("one\n\ntwo\n"), out)
    assert out.getvalue() == "you said one\nyou said two\n"
    assert len(echo.messages) == 4


@pytest.mark.parametrize("end", ["/exit", "/quit"])
def test_exit_ends_and_reset_forgets(end):
    out, echo = io.StringIO(), Echo()
    talk(echo, io.StringIO(f"one\n/reset\ntwo\n{end}\nthree\n"), out)
    assert [m["content"] for m in echo.messages] == ["two", "you said two"]


@pytest.mark.parametrize("interactive", [False, True])
def test_a_block_between_fences_is_one_message(interactive, monkeypatch):
    text = 'first\n"""\ndef f():\n\n    return 1\n"""\nlast'
    lines = iter(text.split("\n"))

    def read(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    found = list(messages(io.StringIO(text), interactive))
    assert found == ["first", "def f():\n\n    return 1", "last"]


def test_a_block_that_is_not_closed_still_counts():
    assert list(messages(io.StringIO('"""\na\nb'), False)) == ["a\nb"]


def test_a_message_that_is_too_long_ends_a_pipe_but_not_a_conversation(monkeypatch, capsys):
    with pytest.raises(UserError):
        talk(Echo(), io.StringIO("long\none\n"), io.StringIO())
    typed = iter(["long", "one", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    out = Terminal()
    talk(Echo(), Terminal(), out)
    assert out.getvalue().endswith("you said one\n")
    assert "too long" in capsys.readouterr().err


def test_ctrl_c_breaks_off_an_answer_and_not_the_conversation(monkeypatch):
    class Breaking(Echo):
        def say(self, text: str):
            yield "some"
            if text == "break":
                raise KeyboardInterrupt
            yield "thing"

    typed = iter(["break", "go on", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    monkeypatch.setattr("sys.stdin", Terminal())
    out = Terminal()
    talk(Breaking(), Terminal(), out)
    assert out.getvalue().endswith("some\nsomething\n")


def test_the_command_passes_its_options_and_prints_json(monkeypatch, capsys):
    made = []
    monkeypatch.setattr("ropewalk.serve.Chat", lambda *a, **k: made.append(Echo(*a, **k)) or made[-1])
    monkeypatch.setattr(chat_command, "load", lambda source, dtype, device: (source, dtype))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert (
        main(["chat", "somewhere", "--json", "--temperature", "0.5", "--stop", "X", "--dtype", "float32"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["messages"][1]["content"] == "you said hello"
    assert made[0].sampling["temperature"] == 0.5
    assert made[0].sampling["stop"] == ("X",)
