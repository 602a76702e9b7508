"""The words that stand for classes: how they are written down, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltune.errors import DataError, suggestion
from deltune.tasks._template_rows import TemplateFiller

__all__ = ["check_words", "read_words", "word_ids", "written"]

#: Joins a class and its words, and the words among each other.
_EQUALS, _OR = "=", "|"


def written(words: Any) -> tuple[str, ...]:
    """Words as they are kept, ``name=word|word``, from that or from a mapping."""
    if not isinstance(words, Mapping):
        return tuple(words) if isinstance(words, tuple | list) else (words,)
    found = []
    for name, value in words.items():
        several = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
        if not all(isinstance(word, str) and not {_EQUALS, _OR, ","} & set(word) for word in several):
            raise DataError(f"The words of {name!r} must be text without {_EQUALS!r}, {_OR!r} and ',', not {value!r}.")
        found.append(f"{name}{_EQUALS}{_OR.join(several)}")
    return tuple(found)


def read_words(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The words by class.

    Raises:
        DataError: An entry is not ``name=word|word``.
    """
    found: dict[str, tuple[str, ...]] = {}
    for entry in words:
        name, equals, listed = entry.rpartition(_EQUALS) if isinstance(entry, str) else ("", "", "")
        values = tuple(word.strip() for word in listed.split(_OR))
        if not equals or not name.strip() or not all(values):
            raise DataError(
                f"{entry!r} does not say the word of a class. Write name{_EQUALS}word for each class, or "
                f"name{_EQUALS}word{_OR}word: words='negative=bad,positive=good{_OR}great'."
            )
        if name.strip() in found:
            raise DataError(f"words says the word of {name.strip()!r} twice. Join several with {_OR!r}.")
        found[name.strip()] = values
    return found


def check_words(given: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Refuses words that do not tell the classes ``names`` apart; without any, the names are the words.

    Raises:
        DataError: An entry is of no class, a class has none, or a word stands for two.
    """
    for name in given:
        if name not in names:
            raise DataError(f"words has an entry for {name!r}, which is no class. {suggestion(name, names)}")
    missing = [name for name in names if given and name not in given]
    if missing:
        raise DataError(f"words says no word for {', '.join(map(repr, missing))}. Give each class one.")
    every = [word for words in given.values() for word in words]
    double = next((word for word in every if every.count(word) > 1), None)
    if double is not None:
        raise DataError(f"The word {double!r} stands twice among the words of the classes. Each may stand once.")


def word_ids(words: Mapping[str, Sequence[str]], filler: TemplateFiller) -> tuple[int, ...]:
    """The one id of each word at the place of the answer, one class after the other.

    Raises:
        DataError: A word is several tokens or unknown, or two words are the same token.
    """
    owners = [(name, word) for name, several in words.items() for word in several]
    tokenizer = filler.tokenizer
    seen: dict[int, str] = {}
    advice = "Choose another with words, such as words='negative=bad,positive=good'."
    for (name, word), ids in zip(owners, filler.word_ids([word for _, word in owners]), strict=True):
        if len(ids) != 1:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "none"
            raise DataError(
                f"The word {word!r} of the class {name!r} must be one token of this model, but is {len(ids)}: "
                f"{pieces}. {advice}"
            )
        if ids[0] == tokenizer.unk_token_id:
            raise DataError(f"The word {word!r} of the class {name!r} is not in the model's vocabulary. {advice}")
        if ids[0] in seen:
            raise DataError(
                f"The words {seen[ids[0]]!r} and {word!r} are the same token of this model, so their classes could not "
                f"be told apart. {advice}"
            )
        seen[ids[0]] = word
    return tuple(seen)
