"""``deltune sites``: what a model is made of, and what targets select in it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltune.errors import DeltuneError

__all__ = ["sites"]


def sites(
    model: Annotated[str, typer.Argument(help="Folder of a pretrained model; its configuration is enough.")],
    targets: Annotated[
        str | None, typer.Option(help="Mark what this selects, such as 'attention.*' or 'ffn.up, layers=-4:'.")
    ] = None,
) -> None:
    """Show the roles of a model as a tree with the shapes of its matrices. No weights are loaded."""
    from rich.console import Console

    from deltune.backbone import Targets, anatomy_of, render_tree

    skeleton = _skeleton(model)
    anatomy = anatomy_of(skeleton)
    modules = tuple(name for name, _ in skeleton.named_modules())
    selected = list(Targets.parse(targets).select(anatomy, modules)) if targets is not None else []
    Console().print(render_tree(anatomy, skeleton, selected))


def _skeleton(path: str) -> Any:
    """The model that a configuration describes, without memory for its weights.

    Raises:
        DeltuneError: if there is no configuration, or transformers has no such model.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DeltuneError(
            f"No model configuration can be loaded from {path!r}: {str(error).strip().splitlines()[0]} Give a folder "
            "that holds a config.json, or a name on the model hub."
        ) from error
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    with torch.device("meta"):
        if named and named[0] is not None:
            return named[0](config)
        return transformers.AutoModel.from_config(config)
