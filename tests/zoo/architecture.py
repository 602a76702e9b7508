"""What an architecture is: how its models are built and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn

__all__ = ["Architecture", "Head", "Kind", "Padding", "randomize"]

Kind = Literal["encoder", "decoder", "encoder-decoder", "vision", "text-vision"]
Head = Literal["base", "classification", "tokens", "language"]
Padding = Literal["none", "left", "right"]

VOCABULARY = 100
FIRST_WORD = 10  # ids below are special
LABELS = 3
IMAGE, PATCH = 8, 4  # 2 x 2 patches
MELS, SOUND = 8, 16  # Whisper's mel bins, and its frames after the convolutions


def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a random value of a size that matters: matrices, biases and norms alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (1.5 / min(parameter.shape[0], parameter[0].numel()) ** 0.5))


@dataclass(frozen=True)
class Architecture:
    """One kind of model, its classes and what is true of it.

    Attributes:
        name: its name in ``tests.zoo.ARCHITECTURES``.
        family: name of the family row that describes it.
        config: name of its configuration class.
        options: arguments of the configuration; sub-configurations are mappings.
        classes: names of the model classes by head.
        kind: what it reads.
        dropouts: names of the options that are dropout probabilities.
        generates: whether the class with the language head has a working ``generate``.
        left_padding: whether the bare model's output at real positions does not change with padding on the
            left, given the batch of :meth:`batch`.
        right_padding: the same for padding on the right.
        has_biases: whether any linear map or norm of the bare model has a bias.
        takes_positions: whether batches with padding on the left need ``position_ids``.
        dispatches: whether all of its attention goes through transformers' attention interface.
        pad_token: id of the padding token.
        end_token: id of the end token.
        inputs: what it reads, among ``text``, ``image`` and ``sound``.
    """

    name: str
    family: str
    config: str
    options: Mapping[str, Any]
    classes: Mapping[Head, str]
    kind: Kind
    dropouts: tuple[str, ...] = ()
    generates: bool = False
    left_padding: bool = True
    right_padding: bool = True
    has_biases: bool = True
    takes_positions: bool = False
    dispatches: bool = True
    pad_token: int = 0
    end_token: int = 2
    inputs: tuple[str, ...] = ("text",)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that it can be built with."""
        return tuple(self.classes)

    @property
    def pads(self) -> bool:
        """Whether its batches can be padded."""
        return "text" in self.inputs

    def configuration(self, *, dropout: float = 0.0, **changes: Any) -> Any:
        """Its configuration; ``changes`` override options."""
        options = {**self.options, **dict.fromkeys(self.dropouts, dropout), **changes}
        for part in ("text_config", "vision_config"):
            if part in options:
                options[part] = {**options[part], "attention_dropout": dropout}
        return getattr(transformers, self.config)(**options, num_labels=LABELS)

    def build(
        self,
        head: Head = "base",
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **changes: Any,
    ) -> Any:
        """A random model in evaluation mode; the same seed gives the same weights.

        Args:
            head: which class to build.
            dropout: probability of every dropout.
            dtype: type of its weights.
            seed: seed of its weights.
            **changes: options of the configuration to override.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.classes[head])(self.configuration(dropout=dropout, **changes))
        randomize(model, seed)
        return model.to(dtype).eval()

    def batch(
        self,
        batch_size: int = 3,
        length: int = 7,
        seed: int = 0,
        padding: Padding = "none",
        head: Head = "base",
    ) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model.

        With padding, row ``i`` is ``i`` tokens shorter than ``length``, but has 2 at least. For
        encoder-decoder models padding is in the encoder's input; for a classification head they have no
        decoder input, which the model then makes itself.
        """
        generator = torch.Generator().manual_seed(seed)
        batch: dict[str, torch.Tensor] = {}
        if "image" in self.inputs:
            batch["pixel_values"] = torch.randn(batch_size, 3, IMAGE, IMAGE, generator=generator)
        if "sound" in self.inputs:
            batch["input_features"] = torch.randn(batch_size, MELS, 2 * SOUND, generator=generator)
        if "text" in self.inputs:
            batch.update(self._text(batch_size, length, generator, padding))
        if self.kind == "encoder-decoder" and head != "classification":
            words = torch.randint(FIRST_WORD, VOCABULARY, (batch_size, 5), generator=generator)
            batch["decoder_input_ids"] = words
        return batch

    def alone(self, batch: Mapping[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """One row of a batch without its padding: what the model must make of it among others, too."""
        single = {name: values[row : row + 1] for name, values in batch.items() if name != "position_ids"}
        if "attention_mask" in single:
            real = single["attention_mask"][0].bool()
            for name in ("input_ids", "attention_mask"):
                single[name] = single[name][:, real]
        return single

    def prompt(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a batch that goes into ``generate``."""
        return {name: values for name, values in batch.items() if name not in ("decoder_input_ids", "position_ids")}

    def labels(self, head: Head, batch: Mapping[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
        """Labels with which ``model(**batch, labels=labels)`` has a loss; -100 at padding."""
        generator = torch.Generator().manual_seed(seed)
        if head == "classification":
            rows = len(next(iter(batch.values())))
            return torch.randint(0, LABELS, (rows,), generator=generator)
        real = self.real(batch)
        high = LABELS if head == "tokens" else VOCABULARY
        low = 0 if head == "tokens" else FIRST_WORD
        return torch.randint(low, high, real.shape, generator=generator).masked_fill(~real, -100)

    def output(self, outputs: Any) -> torch.Tensor:
        """The main output: logits, or the last hidden state.

        Bare models of text and images have two last hidden states: those of the text, then of the patches.
        """
        for name in ("logits", "last_hidden_state"):
            if isinstance(getattr(outputs, name, None), torch.Tensor):
                value: torch.Tensor = getattr(outputs, name)
                return value
        both = (outputs.text_model_output, outputs.vision_model_output)
        return torch.cat([part.last_hidden_state for part in both], dim=1)

    def real(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Which positions of the output are real: (rows, positions). Not for classification heads."""
        rows = len(next(iter(batch.values())))
        if "decoder_input_ids" in batch:
            return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
        patches = torch.ones(rows, (IMAGE // PATCH) ** 2 + 1, dtype=torch.bool)
        if "attention_mask" not in batch:
            return patches
        text = batch["attention_mask"].bool()
        return torch.cat([text, patches], dim=1) if self.kind == "text-vision" and "base" in self.classes else text

    def _text(self, rows: int, length: int, generator: torch.Generator, padding: Padding) -> dict[str, torch.Tensor]:
        ids = torch.full((rows, length), self.pad_token)
        mask = torch.zeros_like(ids)
        words = torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator)
        for row in range(rows):
            real = length if padding == "none" else max(2, length - row)
            places = slice(length - real, length) if padding == "left" else slice(0, real)
            ids[row, places] = words[row, :real]
            mask[row, places] = 1
            if self.kind == "encoder-decoder":
                ids[row, places.stop - 1] = self.end_token
        batch = {"input_ids": ids, "attention_mask": mask}
        if padding == "left" and self.takes_positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch
