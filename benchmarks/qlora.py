"""QLoRA against LoRA on the unquantised model, with real instructions: ``python -m benchmarks.qlora``.

Both train the same delta (QLoRA's defaults) on SmolLM2-135M with the same batches. Without a GPU the arithmetic is
float32 for both, since processors without bfloat16 units are slow in it; the memory of weights is told for bfloat16
too. ``--data`` is a file of instructions (json lines with instruction, input, output).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

import deltune
from benchmarks.sentiment import Record, table
from deltune.quantization import NF4, load_quantized, storage
from deltune.quantization.layers import is_quantized
from deltune.tasks import InstructionTuning, read_dataset
from deltune.training import TrainingSettings, evaluate
from examples import assets

LONGEST = 400  # letters of an example, so that a training takes minutes
HELD_OUT = 100
KINDS = ("float32", "bfloat16", "4 bit")


def load(kind: str) -> Any:
    """SmolLM2 with its weights stored as ``kind``."""
    folder = str(assets.get("smollm2-135m"))
    if kind == "4 bit":
        return load_quantized(folder, AutoModelForCausalLM, NF4(double_quantization=True, compute_dtype=torch.float32))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, scales of quantised matrices included; tied ones once."""
    packed = [module for module in model.modules() if is_quantized(module)]
    inside = {id(value) for module in packed for name, value in module.named_parameters() if name != "bias"}
    plain = [value for value in model.parameters() if id(value) not in inside]
    return sum(value.numel() * value.element_size() for value in plain) + (storage(model).bytes if packed else 0)


def loading(kind: str) -> dict[str, Any]:
    """What loading takes, in a process of its own: of the weights, and at the highest."""
    code = f"import json\nfrom benchmarks.qlora import load, loaded\nprint('RESULT', json.dumps(loaded({kind!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def loaded(kind: str) -> dict[str, Any]:
    """Load, and say what it took. Pages of mapped files, which the system may drop, are not counted."""
    with PeakAnonymous() as memory:
        model = load(kind)
        with torch.no_grad():
            model(torch.arange(8)[None])  # mapped weights are read when they are used
    found: dict[str, Any] = {"weights": weight_bytes(model), "peak": memory.bytes}
    if kind == "4 bit":
        found["bits per parameter"] = storage(model).bits_per_parameter
        found["quantised parameters"] = storage(model).parameters
    return found


class PeakAnonymous:
    """The most memory, in bytes, that the process got for itself in the block, seen every few milliseconds."""

    def __enter__(self) -> PeakAnonymous:
        self._first, self.bytes, self._ended = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, self._now() - self._first)

    def _now(self) -> int:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def instructions(data: str, train: int) -> tuple[Dataset, Dataset]:
    """Short instructions with their answers, to train on and to measure with."""
    rows = [
        row
        for row in read_dataset(data)
        if row["output"] and len(row["instruction"] + (row["input"] or "") + row["output"]) <= LONGEST
    ]
    shuffled = Dataset.from_list(rows).shuffle(seed=0)
    return shuffled.select(range(HELD_OUT, HELD_OUT + train)), shuffled.select(range(HELD_OUT))


def losses(kind: str, data: str, steps: int, seed: int, learning_rate: float | None) -> dict[str, float]:
    """Loss on held-out answers per token, before and after training."""
    model = load(kind)
    task = InstructionTuning(context="input")
    tokenizer = task.load_tokenizer(str(assets.get("smollm2-135m")))
    task = task.resolve(tokenizer)
    train, held_out = instructions(data, steps * 4)
    rows, held_out = task.encode(train, tokenizer), task.encode(held_out, tokenizer)
    transformers.set_seed(seed)
    tuned = deltune.attach(model, "qlora")
    before = evaluate(tuned, task, held_out, tokenizer, batch_size=8)["loss"]
    settings = TrainingSettings(
        steps=steps, batch_size=4, learning_rate=learning_rate, seed=seed, keep_best=False, threads=1
    )
    result = deltune.fit(tuned, task, rows, tokenizer=tokenizer, settings=settings)
    after = evaluate(tuned, task, held_out, tokenizer, batch_size=8)["loss"]
    return {"before": before, "after": after, "seconds": result.seconds}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=None, help="of both; by default QLoRA's")
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(given.output / f"qlora_{given.steps}.jsonl")
    rows = {}
    for kind in KINDS:
        found = record.get(f"loading {kind}", loading, kind)
        bits = f"{found['bits per parameter']:.3f}" if "bits per parameter" in found else "32" if "32" in kind else "16"
        rows[kind] = [bits, *(f"{found[name] / 1e6:.0f} MB" for name in ("weights", "peak"))]
    print(table(["weights", "bits per parameter of the layers", "all weights", "peak while loading"], rows))
    rows = {}
    for name, kind in (("LoRA on float32", "float32"), ("QLoRA", "4 bit")):
        runs = [
            record.get(
                f"{name} seed {seed} rate {given.learning_rate}",
                losses,
                kind,
                given.data,
                given.steps,
                seed,
                given.learning_rate,
            )
            for seed in range(given.seeds)
        ]
        rows[name] = [f"{sum(run[key] for run in runs) / len(runs):.4f}" for key in ("before", "after")]
    print(table(["", "loss before", "loss after"], rows))
    print(f"ratio of the losses after training: {float(rows['QLoRA'][1]) / float(rows['LoRA on float32'][1]):.4f}")


if __name__ == "__main__":
    main()
