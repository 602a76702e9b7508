"""Multitask prompt tuning: one shared prompt, and a mask of low rank for each task.

Letters: B batch, T positions of the text, P number of rows, d width of an embedding, r rank, k a task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.errors import MethodError, StateError, suggestion
from deltune.methods.additive.prompt_start import PromptMethod
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Form, Insertion, ReadingTokenForm

__all__ = ["MultitaskPrompt", "MultitaskPromptTuning"]


class MultitaskPrompt(ReadingTokenForm):
    """P_k = P* o (u_k v_k^T), with P* (P, d) shared, u_k (P, r) and v_k (r, d) of a task.

    At the start every mask u_k v_k^T is one: the first column of u_k and the first row of v_k are ones; of further
    ranks u_k is uniform on (-0.5, 0.5) and v_k zero, so that their products start at zero and can grow.

    Args:
        rows: the initial P*, (P, d).
        tasks: their names.
        task: the one that is live.
        rank: r.
    """

    formula: ClassVar[str] = "P o (u_k v_k)"

    def __init__(self, rows: Tensor, tasks: Sequence[str], task: str, rank: int) -> None:
        super().__init__()
        self.length = rows.shape[0]
        self.task = task
        #: The task of each row of a batch, which comes before ``task``; a batch a multiple as long repeats each entry.
        self.tasks_of_rows: tuple[str, ...] = ()
        self.shared = nn.Parameter(rows.detach().clone())
        self.u = nn.ParameterDict()
        self.v = nn.ParameterDict()
        for name in tasks:
            u = torch.cat([rows.new_ones(self.length, 1), rows.new_empty(self.length, rank - 1).uniform_(-0.5, 0.5)], 1)
            v = torch.cat([rows.new_ones(1, rows.shape[1]), rows.new_zeros(rank - 1, rows.shape[1])])
            self.u[name], self.v[name] = nn.Parameter(u), nn.Parameter(v)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.u)

    def prompt(self, task: str) -> Tensor:
        """P_k of a task, (P, d)."""
        mask: Tensor = self.u[task] @ self.v[task]
        return self.shared * mask

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuse tasks that there are not.

        Raises:
            MethodError: naming the nearest.
        """
        for name in names:
            if name not in self.u:
                raise MethodError(f"There is no task {name!r}. {suggestion(str(name), self.tasks)}")

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """The rows of the live task, (P, d), or of each row's own task, (B, P, d).

        Raises:
            StateError: if the batch does not fit the tasks of its rows.
        """
        if not self.tasks_of_rows:
            return self.prompt(self.task)
        batch, count = embedded.shape[0], len(self.tasks_of_rows)
        if batch % count:
            raise StateError(
                f"The rows of a batch have {count} tasks, but the prompt is wanted for {batch} rows. Give batches of "
                f"{count} rows, or of a multiple of it."
            )
        present = list(dict.fromkeys(self.tasks_of_rows))
        prompts = torch.stack([self.prompt(task) for task in present])
        index = [present.index(task) for task in self.tasks_of_rows for _ in range(batch // count)]
        return prompts.index_select(0, torch.tensor(index, device=prompts.device))


@register
@dataclass(frozen=True)
class MultitaskPromptTuning(PromptMethod):
    r"""One prompt for several tasks: P_k = P* o (u_k v_k^T), in front of the embedded text as in prompt tuning.

    P* (P, d) is shared, u_k (P, r) and v_k (r, d) belong to the task k, o multiplies entry by entry. All tasks are in
    one delta. Masks start at one, so that each task begins with P*.

    When to use:
        Several related tasks on one frozen model: they train P* together, and a task more costs r (P + d) values. Or
        one new task that starts from the prompts of others: give their folders in start_from; P* is their average.
        For unrelated tasks train a prompt each.

    Cost:
        Parameters: P d + k r (P + d) for k tasks. BERT-base, P = 100, r = 1: 76,800 and 868 for each task.
        Memory: as prompt tuning of that length.
        Time: as prompt tuning of that length.
        Inference: as prompt tuning. ``deltune.prompting.separate_task`` makes the prompt of one task a plain one.

    Terms:
        Site: the embedded input of a stack; by default of the first.
        Form: shared rows times a mask of rank r for each task.
        Combination: joined with the embedded text.
        Control: one task is live for the whole batch (``deltune.prompting.set_task``), or each row of the batch has
            its own (``deltune.prompting.tasks_of_rows``).

    Example:
        >>> import deltune
        >>> from deltune.prompting import set_task, tasks_of_rows
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        >>> method = deltune.MultitaskPromptTuning(length=10, tasks=("rte", "mnli"))
        >>> tuned = deltune.attach(T5ForConditionalGeneration(config), method)
        >>> tuned.summary().parameters  # 10 rows of 32, and 10 + 32 for each task
        404
        >>> set_task(tuned, "mnli")  # from now on
        >>> with tasks_of_rows(tuned, ["rte", "mnli", "rte"]):  # of a batch of three texts
        ...     pass

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/target --method multitask-prompt-tuning --length 20

    Differs from the paper:
        Left out is the distillation of the source stage: there the paper trains a teacher prompt for each task and
        adds the distances of logits and hidden states to the teacher's; here source tasks are trained together on
        their own losses, in batches whose rows have different tasks. Left out too are the separate learning rates of
        P* and of the factors.

        The target stage is the paper's: P* is the average of source prompts, the factors are ones. 20 rows by
        default, the paper has 100. Ranks above one start with the first rank's mask, the others' products are zero. A
        task that is in no row of a batch has no gradient, so that optimizers leave it alone. All tasks share one task
        head, where the model has one that trains.

    Source:
        Wang et al. 2023, arXiv 2303.02861, section 3; authors' code: zhenwang9102/mpt.
    """

    tasks: tuple[str, ...] | int = option(1, "names of the tasks, or their number", minimum=1)
    current_task: str | None = option(None, "the task that is live; the first if none")
    rank: int = option(1, "rank r of the masks", minimum=1)

    name: ClassVar[str] = "multitask-prompt-tuning"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.TOKENS
    paper: ClassVar[Paper] = Paper(
        "Wang et al.", "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", 2023, "2303.02861"
    )
    learning_rate: ClassVar[float] = 5e-2
    unchanged_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.task_names
        if not names or len(set(names)) < len(names):
            raise MethodError(f"{self.name}: tasks must have different names, and there must be one at least.")
        for item in names:
            if not re.fullmatch(r"\w[\w-]*", item) or hasattr(nn.ParameterDict, item):
                raise MethodError(f"{self.name}: a task cannot be named {item!r}: use letters, digits, '-' and '_'.")
        if self.current_task and self.current_task not in names:
            raise MethodError(
                f"{self.name}: there is no task {self.current_task!r}. {suggestion(self.current_task, names)}"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks; numbers from 0 where only their number was given."""
        return tuple(map(str, range(self.tasks))) if isinstance(self.tasks, int) else self.tasks

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Shared rows, and factors for every task, for the input of every selected stack."""
        names = self.task_names
        for site, rows in self.prompt_sites(model, anatomy):
            yield Placement(site, MultitaskPrompt(rows, names, self.current_task or names[0], self.rank))

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """As :meth:`PromptMethod.stored`, with the task that is live at present."""
        live = next(form.task for form in forms.values() if isinstance(form, MultitaskPrompt))
        method = super().stored(forms)
        if live == (self.current_task or self.task_names[0]):
            return method
        return replace(method, current_task=live)  # type: ignore[call-arg]
