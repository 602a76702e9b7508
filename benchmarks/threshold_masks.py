"""Ten masks on one MiniLM: bytes on disk, and the time of a switch: ``python -m benchmarks.threshold_masks``.

Each mask drops a random twentieth of the weights; for sizes and times it does not matter what it was trained for. Every
switch is followed by the floor, one plain copy of the same matrices, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

import deltune
from benchmarks.sentiment import table
from deltune.sites import MaskForm
from deltune.tuned import Tuned
from examples import assets


def milliseconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def saved_masks(folder: Path, model: str, method: str, count: int) -> list[Path]:
    """Folders with random masks of the model."""
    paths = []
    for seed in range(count):
        torch.manual_seed(seed)
        tuned = deltune.attach(AutoModel.from_pretrained(model), method, name=f"mask{seed}")
        paths.append(tuned.save(folder / f"mask{seed}"))
    return paths


def matrices(tuned: Tuned) -> list[Tensor]:
    """The matrices that the first mask is laid over, as they are in the model."""
    attachment = next(iter(tuned.attachments.values()))
    return [tuned.model.get_submodule(site.part.module).get_parameter("weight") for _, site, _ in attachment.sites]


def bytes_in_memory(tuned: Tuned, name: str) -> int:
    """Of one mask."""
    forms = [form for form in tuned.attachments[name].forms.values() if isinstance(form, MaskForm)]
    return sum(buffer.nbytes for form in forms for buffer in form.buffers())


def row(times: list[float]) -> list[str]:
    """Median and spread."""
    return [f"{median(times):.1f}", f"{min(times):.1f} to {max(times):.1f}"]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="folder of an encoder; MiniLM if empty")
    parser.add_argument("--method", default="threshold-mask")
    parser.add_argument("--masks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="switches to each mask")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.model or str(assets.get("minilm"))
    with tempfile.TemporaryDirectory() as temporary:
        paths = saved_masks(Path(temporary), folder, given.method, given.masks)
        on_disk = [(path / "delta.safetensors").stat().st_size for path in paths]
        base: Any = AutoModel.from_pretrained(folder).eval()
        whole = sum(value.nbytes for value in base.parameters())
        tuned: Any = base
        for path in paths:
            tuned = deltune.load(tuned, path)
    names = list(tuned.attachments)
    in_memory = [bytes_in_memory(tuned, name) for name in names]
    sizes = {
        "the model": [f"{whole:,}", f"{whole:,}", "1"],
        "a mask": [f"{median(on_disk):,.0f}", f"{median(in_memory):,.0f}", f"{whole / median(on_disk):.0f}"],
        f"{len(names)} masks": [f"{sum(on_disk):,}", f"{sum(in_memory):,}", f"{whole / sum(on_disk):.1f}"],
    }
    print(table(["", "bytes on disk", "bytes in memory", "model / this"], sizes), end="\n\n")

    ids = torch.arange(1000, 1016)[None]
    expected = {}
    with torch.no_grad(), tuned.disabled():
        frozen = [value.detach() for value in matrices(tuned)]
        bits = [value.clone() for value in frozen]
    copies = [torch.empty_like(value) for value in frozen]
    times: dict[str, list[float]] = {
        "switch to another mask": [],
        "take the mask off": [],
        "copy the matrices once": [],
    }
    for name in names * (given.rounds + 1):
        switch = milliseconds(lambda name=name: tuned.activate(name))
        copied = milliseconds(lambda: [copy.copy_(value) for copy, value in zip(copies, frozen, strict=True)])
        with torch.no_grad():
            states = base(input_ids=ids).last_hidden_state
        if name not in expected:  # the first round warms up
            expected[name] = states
            continue
        assert torch.equal(states, expected[name])
        times["switch to another mask"].append(switch)
        times["copy the matrices once"].append(copied)
    for name in names:
        tuned.activate(name)
        times["take the mask off"].append(milliseconds(tuned.activate))
    assert all(torch.equal(value, one) for value, one in zip(matrices(tuned), bits, strict=True))
    floor = median(times["copy the matrices once"])
    rows = {action: [*row(found), f"{median(found) / floor:.1f}"] for action, found in times.items()}
    print(table([f"{sum(value.numel() for value in frozen):,} weights", "ms, median", "spread", "/ copy"], rows))


if __name__ == "__main__":
    main()
