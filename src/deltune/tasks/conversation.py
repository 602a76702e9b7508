"""Conversations: rows become messages, and a template turns messages into text.

Every kind of instruction data becomes a list of messages ``{"role": ..., "content": ...}`` with the roles
``system``, ``user`` and ``assistant``. A Jinja template renders them: the tokenizer's own chat template where
it has one, else ``TEMPLATES["alpaca"]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from deltune.errors import DataError, suggestion
from deltune.tasks._columns import check_text

Message = dict[str, str]

_REQUEST = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request."

TEMPLATES: dict[str, str] = {
    # The template of Stanford Alpaca (Taori et al. 2023), byte for byte where a row has one instruction; a
    # system message takes the place of its first line, and further turns repeat the headings.
    "alpaca": (
        "{{ begin }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% elif messages[0].context is defined %}"
        f"{{{{ '{_REQUEST}, paired with an input that provides further context. {_RESPOND}' }}}}"
        f"{{% else %}}{{{{ '{_REQUEST}. {_RESPOND}' }}}}{{% endif %}}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ '\\n\\n### Instruction:\\n' }}"
        "{{ message.instruction if message.context is defined else message.content }}"
        "{% if message.context is defined %}{{ '\\n\\n### Input:\\n' + message.context }}{% endif %}"
        "{{ '\\n\\n### Response:' }}"
        "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # Prompt and answer joined as they are, for data that hold their own headings.
    "raw": (
        "{{ begin }}{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name. ``begin`` is the tokenizer's start token where it puts one before text, else nothing."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bot": "assistant",
}

_NO_CONTEXT = ("", "<noinput>")


def resolve_template(template: str, tokenizer: Any) -> str:
    """The Jinja text of a template.

    Args:
        template: ``"auto"``, a name in ``TEMPLATES``, or Jinja text.
        tokenizer: ``"auto"`` takes its chat template, or ``"alpaca"`` where it has none.

    Returns:
        Jinja text. Where it would write today's date, the date is written into it now, so that training and
        later use see the same bytes.

    Raises:
        DataError: ``template`` is neither a known name nor Jinja text.
    """
    if template == "auto":
        template = "alpaca" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    text = TEMPLATES.get(template, template)
    check_template(text)
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
        lambda call: repr(date.today().strftime(call[2])),
        text,
    )


def check_template(template: Any) -> None:
    """Refuses what is neither ``"auto"``, nor the name of a template, nor Jinja text."""
    names = ("auto", *TEMPLATES)
    if not isinstance(template, str) or (template not in names and "{{" not in template):
        raise DataError(
            f"There is no template {template!r}. {suggestion(str(template), names)} "
            "A template of your own is Jinja text over 'messages', with {{ ... }}."
        )


def render(tokenizer: Any, template: str, messages: Sequence[Message], row: int, *, answering: bool) -> str:
    """Text of a conversation.

    Args:
        tokenizer: Renders the template and gives the special tokens.
        template: Jinja text.
        messages: The conversation.
        row: Number of the row, counting from 1, for messages to people.
        answering: Whether to end where the assistant's next answer begins.

    Raises:
        DataError: The template refuses the conversation.
    """
    from jinja2 import TemplateError

    begin = _start_token(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answering,
            begin=begin,
        )
    except TemplateError as error:
        raise DataError(
            f"The chat template cannot write the conversation of row {row}: {error}. "
            f"Its roles are: {', '.join(message['role'] for message in messages)}. "
            "Correct the row, or choose another template, such as template='alpaca'."
        ) from error
    return text


def _start_token(tokenizer: Any) -> str:
    """The start token if the tokenizer puts it before text by itself, else nothing."""
    if tokenizer.bos_token_id is None:
        return ""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return str(tokenizer.bos_token) if ids[:1] == [tokenizer.bos_token_id] else ""


def instruction_messages(instruction: str, context: Any, answer: str | None) -> list[Message]:
    """Messages of one instruction.

    Args:
        instruction: What is asked.
        context: Further text, or ``None``, ``""`` or ``"<noinput>"`` for none.
        answer: The answer, or none to make a prompt.
    """
    if context is None or context in _NO_CONTEXT:
        user = {"role": "user", "content": instruction}
    else:
        user = {
            "role": "user",
            "content": f"{instruction}\n\n{context}",
            "instruction": instruction,
            "context": context,
        }
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def conversation_messages(value: Any, row: int, column: str) -> list[Message]:
    """Messages of a conversation as the data hold it.

    Understood are entries with ``role`` and ``content`` or with ``from`` and ``value``, and the role names
    that data in the wild use, such as ``human`` and ``gpt``.

    Raises:
        DataError: The value is no conversation; the message says what is wrong with which entry.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"Row {row} holds {value!r} in column {column!r}, where a list of messages such as "
            "[{'role': 'user', 'content': ...}, {'role': 'assistant', 'content': ...}] is expected."
        )
    messages = [_message(entry, row, place, column) for place, entry in enumerate(value, start=1)]
    for place, message in enumerate(messages, start=1):
        if message["role"] == "system" and place > 1:
            raise DataError(f"Row {row}: message {place} is a system message. Only the first message may be one.")
    if all(message["role"] != "user" for message in messages):
        raise DataError(f"Row {row} has no message of a user in column {column!r}. Add one or remove the row.")
    return messages


def _message(entry: Any, row: int, place: int, column: str) -> Message:
    if isinstance(entry, Mapping):
        for role_key, content_key in (("role", "content"), ("from", "value")):
            if entry.get(role_key) is not None and content_key in entry:
                role = str(entry[role_key])
                if role.lower() not in _ROLES:
                    raise DataError(
                        f"Row {row}: message {place} has the unknown role {role!r}. {suggestion(role, _ROLES)}"
                    )
                content = check_text(entry[content_key], row, f"{column}[{place - 1}].{content_key}")
                return {"role": _ROLES[role.lower()], "content": content}
    raise DataError(
        f"Row {row}: message {place} of column {column!r} is {entry!r}. "
        "Each message needs 'role' and 'content', or 'from' and 'value'."
    )
