"""(IA)^3, read as :class:`deltune.IA3`."""

from __future__ import annotations

from torch import Tensor

from deltune.backbone import Targets
from deltune.checkpoints.expressions import sites_at
from deltune.checkpoints.peft.contents import Contents
from deltune.checkpoints.peft.layout import PREFIX, Options
from deltune.errors import CheckpointError
from deltune.methods.additive.ia3 import IA3

__all__ = ["IA3_OPTIONS", "read_ia3"]

IA3_OPTIONS = Options(used="feedforward_modules fan_in_fan_out init_ia3_weights")


def read_ia3(contents: Contents) -> tuple[IA3, dict[str, Tensor]]:
    """The method and its tensors by key. A vector (1, in) scales the input, one of (out, 1) the output.

    Raises:
        CheckpointError: if the change cannot be represented.
    """
    vectors = {module: tensors["ia3_l"] for module, tensors in contents.adapters(("ia3_l",)).items()}
    deeper = [module for module, vector in vectors.items() if vector.dim() != 2]
    if deeper:
        raise CheckpointError(
            f"{contents.folder} scales the convolution {deeper[0]}, which deltune does not have. Nothing was loaded."
        )
    reading = [module for module, vector in vectors.items() if vector.shape[1] > 1]
    chosen: dict[str, Targets | None] = {"targets": None, "inputs": None}
    tensors = {}
    for option, modules in (("inputs", reading), ("targets", [module for module in vectors if module not in reading])):
        if not modules:
            continue
        chosen[option], sites = sites_at(modules, contents.model, contents.anatomy, ("linear",))
        for module, site in sites.items():
            shape = (1, site.in_features) if option == "inputs" else (site.out_features, 1)
            if contents.fits(f"{PREFIX}{module}.ia3_l", vectors[module], shape):
                tensors[f"{site.key}.scale"] = vectors[module].flatten()
    contents.finish_if_damaged()
    return IA3(**chosen), tensors
