"""One entry of calibration data, a line of JSON or a row of a table, as a `Sample`.

Accepted are `{"text"}`, `{"messages": [{"role", "content"}]}`, `{"prompt", "completion"}`, `{"question", "answer"}`,
ShareGPT's `{"conversations": [{"from", "value"}]}` and Alpaca's `{"instruction", "input", "output"}`; other keys may
stand with them, and a key whose value is null counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_compress.errors import DscError

FORMS = (
    '{"text"}, {"messages"}, {"prompt", "completion"}, {"question", "answer"}, {"conversations"} or '
    '{"instruction", "output"}'
)
COLUMNS = (  # of a table; `input` alone is no form
    ("text",), ("messages",), ("prompt", "completion"), ("question", "answer"), ("conversations",),
    ("instruction", "output"), ("input",),
)  # fmt: skip
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # other roles stay


class Sample(NamedTuple):
    """A piece of calibration text: either `text`, or `messages` that the model's chat template turns into text."""

    origin: str  # "file.jsonl:12"
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def sample_of(origin: str, entry: object) -> Sample | None:
    """Return the sample that `entry` holds; None where all its text is blank. Raises DscError naming `origin`."""
    if not isinstance(entry, Mapping):
        raise DscError(f"{origin}: not a JSON object", f"each line must be {FORMS}")
    sample = _sample(origin, entry)
    content = "".join([sample.text, *(part for message in sample.messages for part in message.values())])
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise DscError(f"{origin}: unpaired UTF-16 surrogate", "write the text as UTF-8") from None
    blank = not sample.text.strip() and not any(message["content"].strip() for message in sample.messages)
    return None if blank else sample


def _sample(origin: str, entry: Mapping[str, Any]) -> Sample:
    if _texts(entry, "text"):
        return Sample(origin, entry["text"])
    for first, second in (("prompt", "completion"), ("question", "answer")):
        if _texts(entry, first, second):
            return Sample(origin, messages=(_message("user", entry[first]), _message("assistant", entry[second])))
    if _texts(entry, "instruction", "output"):
        more = entry.get("input")
        asked = f"{entry['instruction']}\n\n{more}" if isinstance(more, str) and more.strip() else entry["instruction"]
        return Sample(origin, messages=(_message("user", asked), _message("assistant", entry["output"])))
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        messages = entry.get(key)
        if isinstance(messages, list) and messages:
            for number, message in enumerate(messages, start=1):
                if not isinstance(message, Mapping) or not _texts(message, role, content):
                    what = f"{origin}: found the keys {key!r}, but message {number} has no text as {role} and {content}"
                    raise DscError(what, f'write each as {{"{role}": "user", "{content}": "..."}}')
            return Sample(
                origin, messages=tuple(_message(SHAREGPT.get(m[role], m[role]), m[content]) for m in messages)
            )
    given = ", ".join(repr(key) for key, value in entry.items() if value is not None) or "none"
    raise DscError(f"{origin}: found the keys {given[:200]}", f"each line must be {FORMS}, with text as values")


def _texts(entry: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(entry.get(key), str) for key in keys)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
