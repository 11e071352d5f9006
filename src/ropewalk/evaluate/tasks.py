"""Generation tasks: prompts with references from a JSON lines file, zero- or few-shot, and their scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.data.records import Record
from ropewalk.errors import UserError
from ropewalk.evaluate.clean_subset import CleanSubset, clean_subset
from ropewalk.evaluate.metrics import score_corpus, score_row
from ropewalk.evaluate.rows import read_records
from ropewalk.model import Transformer
from ropewalk.serve import generate

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation up to the turn that is asked for (`text`: without a chat template), and that turn."""

    messages: tuple[Message, ...]
    text: str
    reference: str

    @property
    def prompt(self) -> str:
        """What was asked last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class TaskResult:
    """Scores from 0 to 100 over all rows, and each row's prompt, answer, reference and scores.

    `clean` is of the rows that are not in the training data, where it is known which are.
    """

    name: str
    shots: int
    scores: dict[str, float]
    rows: list[dict[str, Any]]
    clean: CleanSubset | None = None

    def as_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "shots": self.shots, "scores": self.scores, "rows": self.rows}
        return own if self.clean is None else {**own, "clean": self.clean.as_dict()}


def run_task(
    model: Transformer,
    tokenizer: Any,
    *,
    name: str,
    path: str | Path,
    metrics: Sequence[str] = ("exact_match", "chrf"),
    instruction: str | None = None,
    shots: int = 0,
    shots_path: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    contaminated: frozenset[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Greedy answers to the prompts of `path`, compared with their references.

    With a chat template, prompts are user turns and the `shots` examples are turns before them; without
    one, all is plain text with blank lines between examples. `instruction` stands before every prompt.
    Rows in `contaminated` (numbers from 0) are left out of the scores in `clean`. `progress(rows done, of)`.
    Raises UserError that names the line of a bad row.
    """
    score_row(metrics, "", "")  # a missing extra is said now, not after the work
    examples = read_examples(path)[:limit]
    if not examples:
        raise UserError(f"{path}: no rows; task {name} needs at least one")
    worked = choose_shots(examples, shots, shots_path, name)
    chat = bool(tokenizer.chat_template)
    prompts = [build_prompt(example, worked, instruction, chat) for example in examples]
    done = 0

    def count(index: int, piece: str, ended: bool) -> None:
        nonlocal done
        done += ended
        if ended and progress is not None:
            progress(done, len(prompts))

    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        on_token=count,
    )
    answers = [completion.text.strip() for completion in completions]
    references = [example.reference.strip() for example in examples]
    rows = [
        {"prompt": example.prompt, "answer": a, "reference": r, "scores": score_row(metrics, a, r)}
        for example, a, r in zip(examples, answers, references, strict=True)
    ]
    clean = None if contaminated is None else clean_subset(metrics, rows, contaminated)
    return TaskResult(name, shots, score_corpus(metrics, answers, references), rows, clean)


def read_examples(path: str | Path) -> list[Example]:
    """The rows of a file with `messages` (the last one is the reference) or `prompt` and `completion`."""
    return [_example(record) for record in read_records(path)]


def _example(record: Record) -> Example:
    conversation = record.conversation
    if conversation is None:
        raise UserError(
            f"{record.where}: a task needs messages, or prompt and completion; this row has text only"
        )
    *before, last = conversation
    if last["role"] != "assistant" or not before or before[-1]["role"] in ("assistant", "system"):
        raise UserError(
            f"{record.where}: the last messages must be a question and the assistant's answer to it"
        )
    for message in conversation:
        if "content" not in message:
            raise UserError(f"{record.where}: a message has no content; tasks are scored on text")
    if record.prompt is not None:
        text = record.prompt
    else:
        text = "".join(message["content"] + "\n" for message in before)
    return Example(tuple(before), text, last["content"])


def choose_shots(
    examples: Sequence[Example], shots: int, path: str | Path | None, name: str
) -> list[Example]:
    """`shots` examples spread evenly over the file at `path`, none of them with a prompt that is tested."""
    if shots == 0:
        return []
    if path is None:
        raise UserError(f"task {name}: shots is {shots}; shots_path must say where the examples come from")
    tested = {example.prompt for example in examples}
    free = [example for example in read_examples(path) if example.prompt not in tested]
    if len(free) < shots:
        raise UserError(f"{path}: {len(free)} rows that task {name} does not test; shots asks for {shots}")
    return [free[i * len(free) // shots] for i in range(shots)]


def build_prompt(
    example: Example, shots: Sequence[Example], instruction: str | None, chat: bool
) -> list[Message] | str:
    """The conversation (`chat`) or plain text that asks for an example's reference after worked examples.

    System messages are the example's own; those of the shots are left out.
    """
    lead = instruction or ""
    if lead and not lead[-1].isspace():
        lead += "\n\n"
    if not chat:
        worked = [lead + shot.text + shot.reference for shot in shots]
        return "\n\n".join([*worked, lead + example.text])
    system = [message for message in example.messages if message["role"] == "system"]
    turns: list[Message] = []
    for shot in (*shots, example):
        *before, last = (message for message in shot.messages if message["role"] != "system")
        turns += [*before, {**last, "content": lead + last["content"]}]
        turns.append({"role": "assistant", "content": shot.reference})
    return system + turns[:-1]
