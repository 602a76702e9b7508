"""Instruction tuning: a decoder learns to answer.

The text that training sees is always ``prompt_for(row)`` followed by the answer, so a model is trained and
used on the same bytes. Token labels are made by position, so the end token is learned even where it pads too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, suggestion
from deltune.tasks._columns import check_text, no_tokens, require_columns, require_rows
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._tokens import CHUNK, IGNORED, common_prefix, end_token_id, plain_ids
from deltune.tasks.base import check_column_names
from deltune.tasks.conversation import (
    Message,
    check_template,
    conversation_messages,
    instruction_messages,
    render,
    resolve_template,
)
from deltune.tasks.generative import GenerativeTask

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

_LOSS_ON = {
    "answer": "cross entropy of the tokens of the answers and of their end tokens, averaged over tokens",
    "all": "cross entropy of all tokens, prompts included, averaged over tokens",
}

_LEAST_PROMPT_SHARE = 4


@dataclass(frozen=True, kw_only=True)
class InstructionTuning(GenerativeTask):
    """Learns answers to instructions, or the assistant's part of conversations.

    A row that is too long loses tokens from the middle of its prompt; the beginning of the prompt, its end
    (the mark where the answer starts) and the whole answer with its end token stay. If less than a quarter of
    ``max_length`` would be left to the prompt, the row is dropped. Both are counted in the report.

    Attributes:
        prompt: Column of the instruction; ``"instruction"`` by default.
        context: Column of further text for the instruction, which may be empty; none by default.
        answer: Column of the answer; ``"output"`` by default.
        messages: Column of whole conversations; where given, the three columns above are not read.
        loss_on: ``"answer"`` (default): every answer of the assistant and its end token; ``"all"``: every
            token.
        template: ``"auto"`` (default): the tokenizer's chat template, else ``"alpaca"``; ``"alpaca"``;
            ``"raw"``: prompt and answer joined as they are; or Jinja text over ``messages``. ``resolve``
            replaces it by the Jinja text.
        max_length: Longest row in tokens; see ``Task``.
    """

    name: ClassVar[str] = "instruction-tuning"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    prompt: str = "instruction"
    context: str | None = None
    answer: str = "output"
    messages: str | None = None
    loss_on: str = "answer"
    template: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("prompt", "context", "answer", "messages"))
        check_template(self.template)
        if self.loss_on not in _LOSS_ON:
            raise DataError(
                f"loss_on must be 'answer' or 'all', not {self.loss_on!r}. {suggestion(str(self.loss_on), _LOSS_ON)}"
            )

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task with the columns that the data have.

        Without options that name columns, these are found: ``messages`` or ``conversations``; or
        ``instruction`` and ``output``, with ``input`` if present; or ``prompt`` and ``completion``.

        Raises:
            DataError: An option is unknown, or the data have none of these columns.
        """
        require_rows(dataset)
        present = set(dataset.column_names)
        found: dict[str, Any] = {}
        if not options.keys() & {"prompt", "context", "answer", "messages"}:
            if conversations := present & {"messages", "conversations"}:
                found = {"messages": max(conversations)}
            elif {"instruction", "output"} <= present:
                found = {"context": "input" if "input" in present else None}
            elif {"prompt", "completion"} <= present:
                found = {"prompt": "prompt", "answer": "completion"}
            else:
                raise DataError(
                    f"The data have the columns {', '.join(dataset.column_names)}. Instruction tuning reads "
                    "'instruction' and 'output' (and 'input'), or 'prompt' and 'completion', or 'messages'. "
                    "Rename the columns, or name them with the options prompt, context, answer or messages."
                )
        return super().from_data(dataset, **{**found, **options})

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The column of conversations; or those of prompt and context and, where ``labelled``, the answer."""
        if self.messages is not None:
            return (self.messages,)
        prompts = (self.prompt,) if self.context is None else (self.prompt, self.context)
        return (*prompts, self.answer) if labelled else prompts

    def required_texts(self, *, labelled: bool = True) -> tuple[str, ...]:
        """Prompt and, where ``labelled``, answer; none for conversations, which are lists."""
        if self.messages is not None:
            return ()
        return (self.prompt, self.answer) if labelled else (self.prompt,)

    @property
    def loss_convention(self) -> str:
        """Which tokens are learned."""
        return _LOSS_ON[self.loss_on]

    def resolve(self, tokenizer: Any) -> Self:
        """A copy with ``max_length`` as a number and ``template`` as Jinja text."""
        resolved = super().resolve(tokenizer)
        return replace(resolved, template=resolve_template(self.template, tokenizer))

    def prompt_for(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """The text that the model answers: what training puts before the answer, byte for byte.

        Tokenize it with ``add_special_tokens=False``; it holds the special tokens it needs.

        Args:
            row: A row of the data; an answer in it is not read, and of a conversation that ends with an
                answer, that answer is left out.
            tokenizer: Renders the template.
        """
        template = resolve_template(self.template, tokenizer)
        return render(tokenizer, template, self._prompt_messages(row, 1), 1, answering=True)

    def answers(self, dataset: Dataset) -> list[str]:
        """The answer of each row; of a conversation the last one."""
        require_columns(dataset, self.columns(), self.name)
        return [self._messages(row, place)[-1]["content"] for place, row in enumerate(dataset, start=1)]

    # -- rows to messages -----------------------------------------------------------------------------

    def _prompt_messages(self, row: Mapping[str, Any], number: int) -> list[Message]:
        if self.messages is not None:
            messages = conversation_messages(row[self.messages], number, self.messages)
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        instruction = check_text(row[self.prompt], number, self.prompt)
        return instruction_messages(instruction, self._context(row, number), None)

    def _messages(self, row: Mapping[str, Any], number: int) -> list[Message]:
        """The whole conversation of a row, which ends with an answer."""
        if self.messages is None:
            answer = check_text(row[self.answer], number, self.answer)
            return [*self._prompt_messages(row, number), {"role": "assistant", "content": answer}]
        messages = conversation_messages(row[self.messages], number, self.messages)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(
                f"The conversation in row {number} ends with a message of the {messages[-1]['role']}, so it "
                f"has no "
                "answer to learn. End it with an answer of the assistant to a user, or remove the row."
            )
        return messages

    def _context(self, row: Mapping[str, Any], number: int) -> str | None:
        value = None if self.context is None else row[self.context]
        return check_text(value, number, str(self.context)) if value is not None and value != "" else None

    # -- messages to tokens ---------------------------------------------------------------------------

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        assert self.max_length is not None
        rows = EncodedRows(len(dataset))
        if not labelled:
            for start in range(0, len(dataset), CHUNK):
                self._encode_prompts(_rows(dataset, start), start, tokenizer, rows)
            return rows.finish()
        end = end_token_id(tokenizer)
        for start in range(0, len(dataset), CHUNK):
            conversations = [
                self._messages(row, start + place) for place, row in enumerate(_rows(dataset, start), start=1)
            ]
            texts = [
                self._prompt_and_answer(tokenizer, messages, start + place)
                for place, messages in enumerate(conversations, start=1)
            ]
            prompts = plain_ids(tokenizer, [prompt for prompt, _ in texts])
            wholes = plain_ids(tokenizer, [prompt + answer for prompt, answer in texts])
            for place, (prompt, answer) in enumerate(texts):
                ids, boundary = _join(tokenizer, prompts[place], wholes[place], answer, start + place + 1)
                ids = _ended(tokenizer, ids, boundary, end)
                if ids[boundary:] == [end]:
                    raise no_tokens(start + place + 1, self.messages or self.answer)
                if self.loss_on == "all":
                    labels = [IGNORED, *ids[1:]]
                else:
                    labels = [IGNORED] * boundary + ids[boundary:]
                    spans = self._earlier_answers(tokenizer, conversations[place], prompt, ids, start + place + 1)
                    for first, last in spans:
                        labels[first:last] = ids[first:last]
                self._add(rows, start + place, ids, labels, boundary)
        return rows.finish()

    def _encode_prompts(self, data: Sequence[Mapping[str, Any]], start: int, tokenizer: Any, rows: EncodedRows) -> None:
        assert self.max_length is not None
        texts = [
            render(tokenizer, self.template, self._prompt_messages(row, place), place, answering=True)
            for place, row in enumerate(data, start=start + 1)
        ]
        for ids in plain_ids(tokenizer, texts):
            if len(ids) > self.max_length:
                rows.truncated()
            rows.add({"input_ids": _without_middle(ids, self.max_length)})

    def _prompt_and_answer(self, tokenizer: Any, messages: list[Message], row: int) -> tuple[str, str]:
        """The prompt, and all text that follows it: the answer and what the template puts behind it."""
        content = messages[-1]["content"]
        if tokenizer.eos_token is not None:
            content = content.removesuffix(tokenizer.eos_token)
        check_text(content, row, self.messages or self.answer)
        messages = [*messages[:-1], {**messages[-1], "content": content}]
        prompt = render(tokenizer, self.template, messages[:-1], row, answering=True)
        whole = render(tokenizer, self.template, messages, row, answering=False)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        place = whole.rfind(content.strip())
        if place < 0:
            raise DataError(
                f"The chat template does not show the answer of row {row}, so it cannot be learned. "
                "Choose another template, such as template='alpaca'."
            )
        return prompt, whole[place:]

    def _earlier_answers(
        self, tokenizer: Any, messages: list[Message], prompt: str, ids: list[int], row: int
    ) -> list[tuple[int, int]]:
        """Token ranges of the answers before the last, each with the end token that follows it."""
        spans = []
        for turn, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            before = render(tokenizer, self.template, messages[:turn], row, answering=True)
            through = render(tokenizer, self.template, messages[: turn + 1], row, answering=False)
            first = common_prefix(before, prompt)
            content = message["content"].strip()
            last = prompt.find(content, first) + len(content)
            if last < len(content):
                raise DataError(
                    f"The chat template does not show message {turn + 1} of row {row}, so it cannot be "
                    f"learned. "
                    "Choose another template, such as template='alpaca'."
                )
            if prompt.startswith(through) and len(through) >= last:
                last = len(through.rstrip())
            elif tokenizer.eos_token is not None and prompt.startswith(tokenizer.eos_token, last):
                last += len(tokenizer.eos_token)
            head, tail = plain_ids(tokenizer, [prompt[:first], prompt[:last]])
            spans.append((common_prefix(head, ids), common_prefix(tail, ids)))
        return spans

    def _add(self, rows: EncodedRows, row: int, ids: list[int], labels: list[int], boundary: int) -> None:
        """Adds a row, cut in the middle of its prompt if it is too long, or counts it as dropped."""
        assert self.max_length is not None
        if len(ids) > self.max_length:
            room = self.max_length - (len(ids) - boundary)
            if room < min(boundary, max(1, self.max_length // _LEAST_PROMPT_SHARE)):
                rows.drop(row)
                return
            ids = _without_middle(ids[:boundary], room) + ids[boundary:]
            labels = _without_middle(labels[:boundary], room) + labels[boundary:]
            rows.truncated()
        rows.add({"input_ids": ids}, labels)


def _rows(dataset: Dataset, start: int) -> list[Mapping[str, Any]]:
    """Up to ``CHUNK`` rows from ``start``."""
    return list(dataset.select(range(start, min(start + CHUNK, len(dataset)))))


def _without_middle(values: list[int], length: int) -> list[int]:
    """The first and last values, together ``length`` of them; the end gets the odd one."""
    if len(values) <= length:
        return values
    head = length // 2
    return values[:head] + values[len(values) - (length - head) :]


def _join(tokenizer: Any, prompt: list[int], whole: list[int], answer: str, row: int) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many belong to the prompt.

    Usually the prompt's tokens are the first of the whole. Where a tokenizer merges across the boundary, the
    answer is tokenized by itself, if that gives the same text: then the prompt is, token for token, what the
    model will see when used. Else the first token that differs begins the answer.
    """
    if whole[: len(prompt)] == prompt:
        return whole, len(prompt)
    (alone,) = plain_ids(tokenizer, [answer])
    apart = prompt + alone
    if tokenizer.decode(apart) == tokenizer.decode(whole):
        return apart, len(prompt)
    boundary = common_prefix(prompt, whole)
    if boundary == 0:
        raise DataError(
            f"In row {row} the tokens of the prompt and those of prompt and answer differ from the first "
            f"on, so it "
            "cannot be told where the answer begins. Use another tokenizer or template."
        )
    return whole, boundary


def _ended(tokenizer: Any, ids: list[int], boundary: int, end: int) -> list[int]:
    """``ids`` ended by exactly the end token: white space behind it is cut off, a missing one is added."""
    for place in range(len(ids) - 1, boundary - 1, -1):
        if ids[place] == end:
            if not tokenizer.decode(ids[place + 1 :]).strip():
                return ids[: place + 1]
            break
    return [*ids, end]
