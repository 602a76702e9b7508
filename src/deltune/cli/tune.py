"""``deltune tune``: fine-tune a model on data."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.reporting import plain_number, print_json, quiet_libraries
from deltune.cli.request import TuneRequest, extra_options, read_configuration
from deltune.training.settings import setting_rows

if TYPE_CHECKING:
    from deltune.training import FitResult
    from deltune.tuned import Tuned

__all__ = ["tune"]

_SETTINGS = "Training"


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every training setting; they arrive in its ``**settings``."""
    signature = inspect.signature(command, eval_str=True)
    fixed = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            row["name"],
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[bool | None if isinstance(row["default"], bool) else str | None, _option(row)],
        )
        for row in setting_rows()
    ]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fixed]
    command.__signature__ = signature.replace(parameters=[*parameters, *options])  # type: ignore[attr-defined]
    return command


def _option(row: dict[str, Any]) -> Any:
    """The option of one setting. Its text is read by the settings themselves, whose messages are better."""
    default = "" if row["default"] is None else f" [default: {str(row['default']).lower()}]"
    choices = f" ({', '.join(row['choices'])})" if row["choices"] else ""
    is_flag = isinstance(row["default"], bool)
    return typer.Option(
        help=f"{row['help'][0].upper()}{row['help'][1:]}{choices}.{default}".replace("[", "\\["),
        metavar=None if is_flag else row["type"].removeprefix("a ").split(" or ")[0].upper().replace("WHOLE ", ""),
        rich_help_panel=_SETTINGS,
        show_default=False,
    )


@_with_settings
def tune(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder of a pretrained model.")] = None,
    method: Annotated[
        str | None, typer.Option(help="As 'lora', 'lora(rank=16)', 'lora + bitfit'; lora if none.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: csv, tsv, json, jsonl, parquet, conll, or a name.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Evaluation data, or the share of the training data to set aside, as 0.1.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What to learn; text-classification if none.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Column of the text; twice for two texts.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a named dataset to train on.")] = None,
    evaluation_split: Annotated[str | None, typer.Option(help="Split of a named dataset to evaluate with.")] = None,
    limit: Annotated[str | None, typer.Option(help="Train on this many rows, from the beginning.")] = None,
    model_dropout: Annotated[
        str | None, typer.Option(help="Probability of every dropout of the model; its own if none.", metavar="NUMBER")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names; options win.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete the run in the output folder first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
    **settings: Any,
) -> None:
    """Fine-tune a model on data.

    Every option of the method (`deltune methods NAME`) and of the task is an option here too: --rank 16
    --max-length 128. A run that was stopped goes on when the same command is given again, and ends in the same
    bits; one that has ended shows its result.
    """
    named = {
        "model": model,
        "method": method,
        "data": data,
        "evaluation": evaluation,
        "task": task,
        "text": text or None,
        "output": output,
        "split": split,
        "evaluation_split": evaluation_split,
        "limit": limit,
        "model_dropout": model_dropout,
        "restart": restart or None,
        **settings,
    }
    values = read_configuration(config) if config is not None else {}
    values.update({name: value for name, value in named.items() if value is not None})
    values.update(extra_options(context.args))
    request = TuneRequest.of(values)
    tuned, result = _run(request)
    summary = tuned.summary()
    if json:
        parameters = {
            "trainable": summary.parameters,
            "head": summary.head_parameters,
            "model": summary.model_parameters,
            "share": summary.share,
        }
        if summary.quantized is not None:
            parameters["bits_per_quantized_parameter"] = summary.quantized.bits_per_parameter
        print_json({**result.to_dict(), "parameters": parameters, "output": str(request.output)})
        return
    _print_result(request, tuned, result)


def _run(request: TuneRequest) -> tuple[Tuned, FitResult]:
    quiet_libraries()
    import torch

    import deltune
    from deltune.cli.progress import LiveProgress
    from deltune.quantization import reader
    from deltune.tasks import read_dataset, split_dataset
    from deltune.training import fit
    from deltune.training.devices import usable_device

    request.settings.check_optimizer(usable_device(request.settings.device))
    train = read_dataset(request.data, request.split, request.limit)
    task = request.task.from_data(train, **request.task_options)
    evaluation = None
    if isinstance(request.evaluation, float):
        label = getattr(task, "label", None) if request.task.name in ("text-classification", "cloze") else None
        train, evaluation = split_dataset(train, request.evaluation, seed=request.settings.seed, stratify=label)
    elif request.evaluation is not None or request.evaluation_split is not None:
        evaluation = read_dataset(request.evaluation or request.data, request.evaluation_split)
    tokenizer = task.load_tokenizer(request.model)
    torch.manual_seed(request.settings.seed)
    model = task.load_model(
        request.model,
        tokenizer=tokenizer,
        dropout=request.model_dropout,
        read=reader(request.method.base_format),
    )
    tuned = deltune.attach(model, request.method, reversible=False)
    with LiveProgress(str(request.method), task.metric) as progress:
        result = fit(
            tuned,
            task,
            train,
            evaluation,
            tokenizer=tokenizer,
            settings=request.settings,
            output=request.output,
            resume=not request.restart,
            callbacks=[progress],
            provenance={"command": shlex.join(["deltune", *sys.argv[1:]])},
        )
    return tuned, result


def _print_result(request: TuneRequest, tuned: Tuned, result: FitResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    summary = tuned.summary()
    table = Table(show_header=False, box=None)
    table.add_row("method", Text(str(request.method)))
    table.add_row("trained", f"{summary.parameters:,} parameters, {summary.share:.2%} of the model's")
    if summary.quantized is not None:
        table.add_row("frozen", f"matrices in 4 bits: {summary.quantized}")
    steps = f"{result.steps:,} in {result.seconds:.1f} s of training"
    if result.best_step is not None:
        steps += f", best at {result.best_step:,}"
    table.add_row("steps", f"{steps}, stopped early" if result.stopped_early else steps)
    for name, value in result.metrics.items():
        table.add_row(name, plain_number(value))
    if not result.metrics and result.history:
        table.add_row("training loss", plain_number(result.history[-1]["loss"]))
    table.add_row("written to", Text(str(request.output)))
    console = Console()
    console.print(table)
