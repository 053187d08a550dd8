"""The commands that answer: generate, chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseek_compress import console
from deepseek_compress.cli import options as o
from deepseek_compress.errors import DscError

if TYPE_CHECKING:
    from deepseek_compress.generation.sampling import Sampling
    from deepseek_compress.generation.speaker import Answer, Prompt, Speaker

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A checkpoint, an output of dsc export, or http://HOST:PORT.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer.")]
OWN = "the model's"
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, help="0: greedy.", show_default=OWN)]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest tokens of this share.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Draw from so many tokens; 0: all.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Of onnxruntime or llama.cpp.", show_default="one a core")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Of a checkpoint: auto, cpu, cuda or cuda:N.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A first message to the model.")]


def generate(
    target: Target,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to answer.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file with the prompt; - for stdin.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text; no chat template.")] = False,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    seed: o.Seed = None,
    threads: Threads = 0,
    device: Device = "auto",
    quick: o.Quick = False,
    json: o.Json = False,
) -> None:
    """Answer one prompt: text on standard output, statistics on standard error."""
    text = _prompt(prompt, file)
    speaker, sampling = _open(target, threads, device, temperature, top_p, top_k, greedy, seed, quick)
    if not json:
        _tell(speaker, sampling)
    messages = [*_system(system), {"role": "user", "content": text}]
    asked: Prompt = text if raw or not speaker.has_chat else messages
    answer, pieces = speaker.reply(asked, sampling, max_tokens)
    following = f"dsc chat {quote(target)}" if speaker.has_chat else f"dsc generate {quote(target)} --prompt TEXT"
    if json:
        written = "".join(piece.text for piece in pieces)
        facts = {"target": target, "text": written, "sampling": sampling.model_dump(), **answer.facts()}
        console.print_json({**facts, "next": following})
        return
    for piece in pieces:
        console.stream(piece.text, piece.thought)
    console.stream("\n")
    console.note(f"{answer}")
    console.note(f"next: {following}")


def chat(
    target: Target,
    system: System = None,
    max_tokens: MaxTokens = 2048,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    seed: o.Seed = None,
    threads: Threads = 0,
    device: Device = "auto",
    quick: o.Quick = False,
) -> None:
    """Talk with a model: a line is a message, Ctrl-C stops an answer, Ctrl-D ends."""
    speaker, sampling = _open(target, threads, device, temperature, top_p, top_k, greedy, seed, quick)
    if not speaker.has_chat:
        raise DscError(f"{target}: has no chat template", f"use dsc generate {quote(target)} --prompt TEXT")
    speaker.prepare()
    _tell(speaker, sampling)
    if sys.stdin.isatty():
        console.note("a line is a message; Ctrl-C stops an answer, Ctrl-D ends")
    messages = _system(system)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        try:
            said = _turn(speaker, messages, sampling, max_tokens)
            if said:
                messages.append({"role": "assistant", "content": said})
            else:  # stopped before a word came: as if nothing had been asked
                messages.pop()
        except DscError as error:
            if not sys.stdin.isatty():
                raise
            console.errors(error)
            messages.pop()
    console.note(f"next: dsc generate {quote(target)} --prompt TEXT")


def _turn(speaker: Speaker, messages: list[dict[str, str]], sampling: Sampling, limit: int) -> str:
    """Show one answer; returns it without its thoughts, as far as it came before Ctrl-C."""
    answer: Answer | None = None
    shown, written = False, []
    try:
        answer, pieces = speaker.reply(messages, sampling, limit)
        for piece in pieces:
            shown = True
            console.stream(piece.text, piece.thought)
            written += [] if piece.thought else [piece.text]
    except KeyboardInterrupt as error:
        if type(error) is not KeyboardInterrupt:  # SIGTERM ends the session
            raise
        if answer is not None:
            answer.stopped = "interrupted"
    finally:
        console.stream("\n" if shown else "")
    made = answer if answer is not None and answer.tokens else ""
    stopped = answer is None or answer.stopped == "interrupted"
    console.note(f"{made}{' (stopped)' if stopped else ''}".strip())
    return "".join(written).strip()


def _lines() -> Iterator[str]:
    """Messages: lines typed, or lines of standard input. Empty ones are left out."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt or not sys.stdin.isatty():
                raise
            console.stream("\n")
            console.note("Ctrl-D ends the session")
            continue
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _prompt(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise DscError("give one of --prompt and --file", 'for instance --prompt "What is 2 + 2?"')
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DscError(f"{file}: not UTF-8 text", "give a text file") from None
    if not text or not text.strip():
        raise DscError("the prompt is empty", "give --prompt TEXT, or --file FILE")
    return text


def _open(
    target: str,
    threads: int,
    device: str,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    greedy: bool,
    seed: int | None,
    quick: bool,
) -> tuple[Speaker, Sampling]:
    """Return what answers, and how it chooses: the model's own settings, changed by what was given."""
    from deepseek_compress.generation.loaded import check_sampling, choose_sampling
    from deepseek_compress.generation.targets import open_target
    from deepseek_compress.planning.device import choose

    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None}
    check_sampling(given)
    speaker = open_target(target, threads, choose(device), quick)
    return speaker, choose_sampling(speaker, given, greedy)


def _tell(speaker: Speaker, sampling: Sampling) -> None:
    """Show what was decided."""
    for text in [speaker.note, f"sampling: {sampling}"]:
        console.note(text) if text else None
