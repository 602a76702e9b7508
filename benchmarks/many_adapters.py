"""Very many LoRA on one model, beside Hugging Face PEFT and the bare model: ``python -m benchmarks.many_adapters``.

Rank 8 at queries and values, with random values. The first table tells what attaching and switching take, each library
and each number of attachments in a process of its own, and how much memory they take. The second is about batches whose
rows take different attachments: MiniLM reads ``--tokens`` tokens, SmolLM2 also writes one token with filled caches. The
bare model, deltune and PEFT (``adapter_names``) take turns in one process, in an order that is drawn for each round;
ratios are those within a round. With a new route, each batch has other attachments, drawn from all. Before anything is
timed, each row must equal the row alone, and both libraries must give the same.

Attaching many with PEFT takes minutes: it is given ``--peft-most`` at most, and where a table has more, PEFT's routed
batch is one over so many.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import deltune
from benchmarks.sentiment import Record, table
from deltune.measure import provenance, release_memory, resident_bytes
from examples import assets

RANK, ALPHA = 8, 16
METHOD = f"lora(rank={RANK}, alpha={ALPHA})"


# -- models and attachments ------------------------------------------------------------------------------------


def folder_of(model: str) -> str:
    """A folder as it is, or that of a packaged model."""
    return model if Path(model).is_dir() else str(assets.get(model))


def decodes(model: str) -> bool:
    """Whether it is a decoder."""
    return str((AutoConfig.from_pretrained(folder_of(model)).architectures or [""])[0]).endswith("ForCausalLM")


def load(model: str, dtype: str) -> Any:
    """The bare model, in evaluation mode."""
    kind = AutoModelForCausalLM if decodes(model) else AutoModel
    return kind.from_pretrained(folder_of(model), dtype=getattr(torch, dtype)).eval()


class Ours:
    """Attachments with deltune."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tuned: deltune.Tuned | None = None

    def attach(self, name: str) -> None:
        """A further one."""
        if self.tuned is None:
            self.tuned = deltune.attach(self.model, METHOD, name, train_head=False)
        else:
            self.tuned.attach(METHOD, name, train_head=False)

    def switch(self, name: str) -> None:
        """To that one, for all rows."""
        assert self.tuned is not None
        self.tuned.activate(name)

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of one attachment by the name of the matrix's module."""
        assert self.tuned is not None
        forms: Any = self.tuned.attachments[name].sites
        return {site.part.module: (form.A, form.B) for _, site, form in forms}


class Peft:
    """Attachments with Hugging Face PEFT."""

    def __init__(self, model: Any) -> None:
        from peft import LoraConfig

        self.bare, self.model = model, None
        names = {"bert": ["query", "value"]}.get(model.config.model_type, ["q_proj", "v_proj"])
        self.config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)

    def attach(self, name: str) -> None:
        """A further one."""
        if self.model is None:
            from peft import get_peft_model

            self.model = get_peft_model(self.bare, self.config, adapter_name=name).eval()
        else:
            self.model.add_adapter(name, self.config)

    def switch(self, name: str) -> None:
        """To that one, for all rows."""
        assert self.model is not None
        self.model.set_adapter(name)

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of one attachment by the name of the matrix's module."""
        assert self.model is not None
        return {
            place.removeprefix("base_model.model."): (module.lora_A[name].weight, module.lora_B[name].weight)
            for place, module in self.model.named_modules()
            if name in getattr(module, "lora_A", {})
        }


LIBRARIES: dict[str, type[Ours] | type[Peft]] = {"deltune": Ours, "peft": Peft}


def fill(library: Ours | Peft, name: str) -> int:
    """Give one attachment the random values that follow from its name; how many bytes they are."""
    count = 0
    generator = torch.Generator().manual_seed(int(name.removeprefix("a")))
    with torch.no_grad():
        for _, pair in sorted(library.factors(name).items()):
            for value in pair:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
                count += value.nbytes
    return count


def milliseconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


# -- attaching and switching -----------------------------------------------------------------------------------


def attaching(model: str, library: str, count: int, dtype: str, switches: int) -> dict[str, Any]:
    """Times of attaching so many and of switching between them, and the memory that they take."""
    torch.set_num_threads(1)
    # what is imported and described once is not to be counted
    warm: Any = LIBRARIES[library](load(model, dtype))
    warm.attach("a0")
    del warm
    attached: Any = LIBRARIES[library](load(model, dtype))
    release_memory()
    before = resident_bytes()
    names = [f"a{number}" for number in range(count)]
    times = [milliseconds(lambda name=name: attached.attach(name)) for name in names]
    values = sum(fill(attached, name) for name in names)
    release_memory()
    taken = resident_bytes() - before
    turns = random.Random(0).choices(names, k=switches)
    switched = [milliseconds(lambda name=name: attached.switch(name)) for name in turns]
    return {"attach": times, "values": values, "resident": taken, "switch": switched}


# -- routed batches --------------------------------------------------------------------------------------------


def variants(
    model: str, count: int, peft_count: int, rows: int, tokens: int, dtype: str
) -> dict[str, Callable[[], Tensor]]:
    """One pass of the bare model, of deltune and of PEFT over the same batch, after a check that they agree."""
    base, ours, peft = load(model, dtype), Ours(load(model, dtype)), Peft(load(model, dtype))
    for number in range(count):
        ours.attach(f"a{number}")
        fill(ours, f"a{number}")
    for number in range(peft_count):
        peft.attach(f"a{number}")
        fill(peft, f"a{number}")
    assert ours.tuned is not None
    different = min(count, rows)
    route = [f"a{row % different}" for row in range(rows)]
    shared = min(different, peft_count)
    peft_route = [f"a{row % shared}" for row in range(rows)]
    torch.manual_seed(0)
    vocabulary = base.config.vocab_size
    ids = torch.randint(vocabulary // 10, vocabulary, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    draw = random.Random(1)

    def of_ours() -> Tensor:
        return ours.model(**batch)[0]

    def of_ours_anew() -> Tensor:
        drawn = draw.sample(range(count), different)
        assert ours.tuned is not None
        ours.tuned.route([f"a{drawn[row % different]}" for row in range(rows)])
        return ours.model(**batch)[0]

    def of_peft() -> Tensor:
        assert peft.model is not None
        return peft.model(**batch, adapter_names=peft_route)[0]

    found = {"bare": lambda: base(**batch)[0], "deltune": of_ours, "new route": of_ours_anew}
    if peft_count:
        found["peft"] = of_peft
    with torch.no_grad():
        ours.tuned.route(route)
        together = of_ours()
        for row in sorted({0, 1 % rows, rows - 1}):
            ours.tuned.activate(route[row])
            alone = ours.model(**{key: value[row : row + 1] for key, value in batch.items()})[0][0]
            agree(together[row], alone, dtype)
        if peft_count:
            ours.tuned.route(peft_route)
            agree(of_peft(), of_ours(), dtype)
        ours.tuned.route(route)
        if decodes(model):
            found |= writing(base, ours, peft if peft_count else None, batch, peft_route)
    return found


def writing(
    base: Any, ours: Ours, peft: Peft | None, batch: dict[str, Tensor], peft_route: list[str]
) -> dict[str, Callable[[], Tensor]]:
    """The same for one further token, with filled caches."""
    length = batch["input_ids"].shape[1]
    token = batch["input_ids"][:, -1:]
    mask = torch.ones(len(token), length + 1, dtype=torch.long)

    def step(model: Any, **options: Any) -> Callable[[], Tensor]:
        cache = model(**batch, use_cache=True, **options).past_key_values

        def one() -> Tensor:
            logits: Tensor = model(
                input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, **options
            ).logits
            cache.crop(-1)
            return logits

        return one

    found = {"bare, one token": step(base), "deltune, one token": step(ours.model)}
    if peft is not None:
        found["peft, one token"] = step(peft.model, adapter_names=peft_route)
    return found


def agree(one: Tensor, other: Tensor, dtype: str) -> None:
    """Stop where two results differ by more than rounding."""
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    apart = float((one - other).abs().max() / other.abs().max())
    if apart > tolerance:
        raise SystemExit(f"Results differ by {apart:.1e} of the largest: nothing is timed.")


def routing(
    model: str, count: int, peft_count: int, rows: int, tokens: int, dtype: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, the order drawn anew."""
    torch.set_num_threads(1)
    found = variants(model, count, peft_count, rows, tokens, dtype)
    times: dict[str, list[float]] = {name: [] for name in found}
    order, draw = list(found), random.Random(0)
    with torch.no_grad():
        for number in range(rounds + 1):
            draw.shuffle(order)
            for name in order:
                taken = milliseconds(found[name])
                if number:  # the first round warms up
                    times[name].append(taken)
    return times


# -- the tables ------------------------------------------------------------------------------------------------


def apart(function: str, *arguments: Any) -> Any:
    """What a function of this module returns in a process of its own."""
    code = (
        f"import json\nfrom benchmarks.many_adapters import {function}\n"
        f"print('RESULT', json.dumps({function}(*json.loads({json.dumps(arguments)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT "))


def spread(values: list[float], digits: int) -> str:
    """Median, least and most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def attaching_row(found: dict[str, Any]) -> list[str]:
    """Times and bytes of one library."""
    times, count = found["attach"], len(found["attach"])
    return [
        f"{times[0]:.1f}",
        f"{median(times[-min(count, 5) :]):.1f}",
        f"{sum(times) / 1000:.2f}",
        spread(found["switch"], 2),
        f"{found['resident'] / count / 1000:.0f}",
        f"{found['values'] / count / 1000:.0f}",
    ]


def routing_row(times: dict[str, list[float]], suffix: str) -> list[str]:
    """Ratios to the bare model in the same round, and of PEFT to deltune."""
    bare, ours, peft = times[f"bare{suffix}"], times[f"deltune{suffix}"], times.get(f"peft{suffix}")

    def ratios(one: list[float] | None, other: list[float]) -> str:
        return "-" if one is None else spread([a / b for a, b in zip(one, other, strict=True)], 2)

    return [
        f"{median(bare):.0f}",
        ratios(ours, bare),
        ratios(None if suffix else times["new route"], bare),
        ratios(peft, bare),
        ratios(peft, ours),
    ]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="minilm,smollm2-135m", help="packaged models or folders, with commas")
    parser.add_argument("--counts", default="1,8,32,128,500", help="numbers of attachments")
    parser.add_argument("--rows", type=int, default=32, help="of a routed batch")
    parser.add_argument("--tokens", type=int, default=32, help="of each row")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each kind")
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--peft-most", type=int, default=128, help="attachments with PEFT, at most; 0 to leave it out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks/many_adapters.jsonl"))
    given = parser.parse_args()
    record = Record(given.output)
    record.get(f"provenance {time.time():.0f}", lambda: {**provenance(threads=1), "peft": version("peft")})
    counts = [int(count) for count in given.counts.split(",")]
    for model in given.models.split(","):
        rows = {}
        for count in counts:
            for library in LIBRARIES:
                if library == "peft" and count > given.peft_most:
                    continue
                what = (model, library, count, given.dtype, given.switches)
                found = record.get(f"attaching {what}", apart, "attaching", *what)
                rows[f"{count}, {library}"] = attaching_row(found)
        header = ["attached", "first, ms", "last, ms", "all, s", "switch, ms"]
        print(f"\n{model}, {given.dtype}\n")
        print(table([*header, "resident kB each", "of which numbers"], rows), end="\n\n")

        rows = {}
        kinds = {f"{given.tokens} tokens": "", **({"one token": ", one token"} if decodes(model) else {})}
        for count in counts:
            of_peft = min(count, given.peft_most)
            what_routed = (model, count, of_peft, given.rows, given.tokens, given.dtype, given.rounds)
            times = record.get(f"routing {what_routed}", apart, "routing", *what_routed)
            for kind, suffix in kinds.items():
                beside = "" if of_peft == count else f" (peft {of_peft})"
                rows[f"{count}{beside}, {given.rows} x {kind}"] = routing_row(times, suffix)
        header = ["attached, batch", "bare, ms", "deltune / bare", "with a new route / bare"]
        print(table([*header, "peft / bare", "peft / deltune"], rows), flush=True)


if __name__ == "__main__":
    main()
