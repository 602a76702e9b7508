"""Law 10: number types, gradient checkpointing, compilation, copies, pickles, threads, shared configurations.

Forms take the type of the weights that they act on; what is tested here is that this always works, not that it
trains best.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import StateError
from deltune.tuned import HANDLE
from tests.laws.cases import METHODS, Case, Only, cases, excluded, named, take_steps
from tests.zoo import ARCHITECTURES

#: One architecture for every mechanism: matrices, fused and interleaved and transposed ones, windows, rotation,
#: shared layers, relative positions, several stacks, images, sound.
REPRESENTATIVE = (
    "albert",
    "bart",
    "bert",
    "blip-caption",
    "clip",
    "deberta-v2",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "llama-gqa",
    "modernbert",
    "phi3",
    "t5",
    "vit",
    "whisper",
)

#: Fewer, for what touches modules and not arithmetic.
FEW = ("bert", "clip", "gpt2", "gpt_neox", "llama-gqa", "modernbert", "t5", "whisper")


representative = named(*REPRESENTATIVE, because="another architecture stands for its mechanism")
few = named(*FEW, because="the law does not depend on arithmetic; others stand for its modules")
compiled = named("bert", "gpt2", "llama-gqa", "t5", because="compilation takes seconds")
pickled = named("bert", "llama-gqa", "t5", because="others stand for it; all are pickled in one process, too")


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def trained(case: Case) -> tuple[deltune.Tuned, dict[str, Tensor], Tensor]:
    """The case after a few steps, a batch, and its output."""
    batch = case.batch()
    tuned = case.attach(case.build())
    take_steps(tuned, case, batch)
    return tuned, batch, case.output(tuned.model, batch)


def is_unchanged_at_start(case: Case) -> bool:
    return deltune.methods.parse(METHODS[case.method]).unchanged_at_start


# -- number types --------------------------------------------------------------------------------------------


#: Methods that keep their own values in float32 at least, because half precision is too coarse for them.
WIDE = ("threshold-mask",)


@pytest.mark.parametrize("case", cases())
def test_bfloat16(case: Case) -> None:
    model = case.build(dtype=torch.bfloat16)
    batch = cast(case.batch(), torch.bfloat16)
    bare = case.output(model, batch)
    tuned = case.attach(model)
    output = case.output(model, batch)
    assert output.dtype == bare.dtype
    if is_unchanged_at_start(case):
        assert torch.equal(output, bare)
    for name, value in tuned.named_trainable_parameters():
        wide = case.method in WIDE and not in_selection(tuned, name)
        assert value.dtype == (torch.float32 if wide else torch.bfloat16), name

    forms = {name: value for name, value in tuned.named_trainable_parameters() if not in_selection(tuned, name)}
    start = {name: value.detach().clone() for name, value in forms.items()}
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model, batch).backward()
        for name, value in tuned.named_trainable_parameters():
            assert value.grad is not None or name not in forms, name
            assert value.grad is None or torch.isfinite(value.grad).all(), name
        optimizer.step()
    for name, value in forms.items():
        assert not torch.equal(value, start[name]), name
    assert not torch.equal(case.output(model, batch), output)


def in_selection(tuned: deltune.Tuned, name: str) -> bool:
    """Selected parameters may be unused, such as the last norm before a head that reads elsewhere; see law 3."""
    return name in tuned.attachments["default"].selection.values


@pytest.mark.parametrize("case", cases(architectures=representative))
def test_autocast(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    with torch.autocast("cpu", torch.bfloat16):
        bare = case.output(model, batch)
    tuned = case.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.output(model, batch)
        loss = case.loss(model, batch)
    assert output.dtype == bare.dtype
    if is_unchanged_at_start(case):
        assert torch.equal(output, bare)
    loss.backward()
    gradients = {name: value.grad for name, value in tuned.named_trainable_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None or in_selection(tuned, name), name
        assert gradient is None or (gradient.dtype == torch.float32 and torch.isfinite(gradient).all()), name


@pytest.mark.parametrize("case", cases(architectures=few))
def test_the_model_can_be_moved_while_attached(case: Case) -> None:
    tuned, batch, _ = trained(case)
    model, parameters = tuned.model, tuned.trainable_parameters()
    model.to(torch.float64)
    batch = cast(batch, torch.float64)
    assert [id(value) for value in tuned.trainable_parameters()] == [id(value) for value in parameters]
    assert {value.dtype for value in parameters} == {torch.float64}
    assert case.output(model, batch).dtype == torch.float64
    case.loss(model, batch).backward()
    bare = case.build().to(torch.float64)
    with tuned.disabled():
        assert torch.equal(case.output(model, batch), case.output(bare, batch))
        model.to(torch.float32)  # also while off
    assert case.output(model, cast(batch, torch.float32)).dtype == torch.float32
    tuned.detach()
    assert torch.equal(case.output(model, cast(batch, torch.float32)), case.output(case.build(), case.batch()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("method", METHODS)
def test_everything_moves_to_another_device(method: str) -> None:
    case = Case(method, ARCHITECTURES["bert"])
    tuned, batch, output = trained(case)
    tuned.model.to("cuda")
    assert {value.device.type for value in tuned.trainable_parameters()} == {"cuda"}
    moved = case.output(tuned.model, {name: value.cuda() for name, value in batch.items()})
    assert torch.allclose(moved.cpu(), output, atol=1e-4)
    tuned.model.to("cpu")
    assert torch.equal(case.output(tuned.model, batch), output)


@pytest.mark.parametrize("method", ["lora", "prefix-tuning", "prompt-tuning"])
def test_forms_that_are_off_follow_a_model_that_moves(method: str) -> None:
    """The meta device stands for another one, which few machines have; not for methods that select as well."""
    case = Case(method, ARCHITECTURES["bert"])
    tuned = case.attach(case.build(), train_head=False)
    with tuned.disabled():
        tuned.model.to("meta")
    assert {value.device.type for value in tuned.trainable_parameters()} == {"meta"}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_values_is_planned(method: str) -> None:
    """On the meta device a model of any size is counted without its memory."""
    case = Case(method, ARCHITECTURES["llama-gqa"])
    tuned = case.attach(case.build().to("meta"))
    assert tuned.summary().parameters == case.attach(case.build()).summary().parameters


# -- gradient checkpointing ----------------------------------------------------------------------------------


def gradients_of(tuned: deltune.Tuned, case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    tuned.model.zero_grad()
    case.loss(tuned.model, batch).backward()
    return {name: value.grad for name, value in tuned.named_trainable_parameters()}


checkpoints = Only(
    "another stands for it; or Albert, which does not support it; or BLIP's text model, where transformers adds in "
    "place to embeddings of which it itself demands a gradient, so that frozen ones fail in the bare model too",
    lambda architecture: architecture.name in REPRESENTATIVE and architecture.name not in ("albert", "blip"),
)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("case", cases(architectures=checkpoints))
def test_gradient_checkpointing_changes_no_gradient(case: Case, reentrant: bool) -> None:
    case = with_head(case)
    # float64: recomputation may add in another order
    tuned = case.attach(case.build(dtype=torch.float64))
    batch = cast(case.batch(batch_size=2), torch.float64)
    take_steps(tuned, case, batch, steps=1)
    tuned.model.train()
    plain = gradients_of(tuned, case, batch)
    tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and case.architecture.name == "deberta-v2" and trains_below_the_layers(tuned):
        pytest.skip("the bare DeBERTa itself fails: all layers read one graph, of the relative positions' norm")
    recomputed = gradients_of(tuned, case, batch)
    for name, gradient in plain.items():
        again = recomputed[name]
        assert (gradient is None) == (again is None), name
        if gradient is not None and again is not None:
            assert (gradient - again).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-6), name


def with_head(case: Case) -> Case:
    """With a head that reads every position: a pooled one leaves some gradients at zero."""
    return replace(case, tested_head="base") if case.architecture.kind == "encoder" else case


def trains_below_the_layers(tuned: deltune.Tuned) -> bool:
    names = [name for attachment in tuned.attachments.values() for name in attachment.selected_names]
    return any("rel_embeddings" in name or "encoder.LayerNorm" in name for name in names)


@pytest.mark.parametrize("first", ["checkpointing", "attaching"])
@pytest.mark.parametrize("name", ["vit", "whisper", "bert", "llama-gqa"])
def test_reentrant_checkpointing_reaches_every_layer_of_a_frozen_model(name: str, first: str) -> None:
    """Without care, a frozen model of images yields no gradient there, and says nothing."""
    case = Case("lora", ARCHITECTURES[name])
    model = case.build()
    if first == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    tuned = deltune.attach(model, "lora(rank=2)", train_head=False)
    if first == "attaching":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    case.loss(model, case.batch()).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.abs().max() > 0 or key.endswith(".A"), key


def test_checkpointing_costs_no_graph_below_the_lowest_trained_layer() -> None:
    case = Case("lora", ARCHITECTURES["vit"])
    model = case.build()
    deltune.attach(model, "lora(rank=2, targets='attention.query layers=-1')", train_head=False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    seen: list[bool] = []
    handle = model.vit.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].requires_grad))
    case.loss(model, case.batch()).backward()
    handle.remove()
    assert seen == [False]


# -- copies, pickles, threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(architectures=few))
def test_copies_are_independent(case: Case) -> None:
    tuned, batch, output = trained(case)
    for twin in (copy.deepcopy(tuned), vars(copy.deepcopy(tuned.model))[HANDLE]):
        assert twin.model is not tuned.model
        assert torch.equal(case.output(twin.model, batch), output)
        mine = {id(value) for value in (*tuned.model.parameters(), *tuned.trainable_parameters())}
        assert not mine & {id(value) for value in (*twin.model.parameters(), *twin.trainable_parameters())}
    take_steps(twin, case, batch, steps=1)
    assert not torch.equal(case.output(twin.model, batch), output)
    assert torch.equal(case.output(tuned.model, batch), output)
    twin.attach("lora(rank=1)", name="another")
    assert twin.active == ("another",)
    twin.detach()
    assert torch.equal(case.output(twin.model, batch), case.output(case.build(), batch))
    assert torch.equal(case.output(tuned.model, batch), output)


@pytest.mark.parametrize("case", cases(architectures=few))
def test_pickled_and_back(case: Case) -> None:
    tuned, batch, output = trained(case)
    twin = pickle.loads(pickle.dumps(tuned))
    assert torch.equal(case.output(twin.model, batch), output)
    buffer = io.BytesIO()
    torch.save(tuned.model, buffer)
    buffer.seek(0)
    model = torch.load(buffer, weights_only=False)
    assert torch.equal(case.output(model, batch), output)
    vars(model)[HANDLE].detach()
    assert torch.equal(case.output(model, batch), case.output(case.build(), batch))


_FRESH_PROCESS = """
import sys, torch
torch.set_num_threads(1)
cases = torch.load(sys.argv[1], weights_only=False)
for model, batch, expected in cases:
    with torch.no_grad():
        output = model(**batch)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert torch.equal(output, expected), type(model)
    model._deltune_handle.detach()
print(len(cases), "deltune.sites.attention" in sys.modules)
"""


def test_pickled_into_a_fresh_process(tmp_path: Path) -> None:
    everything = []
    for parameter in cases(architectures=pickled):
        tuned, batch, output = trained(parameter.values[0])
        everything.append((tuned.model, batch, output))
    torch.save(everything, tmp_path / "models.pt")
    command = [sys.executable, "-c", _FRESH_PROCESS, str(tmp_path / "models.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(everything)), "True"]


@pytest.mark.parametrize("case", cases(architectures=few))
def test_threads_on_one_model_do_not_disturb_each_other(case: Case) -> None:
    tuned, _, _ = trained(case)
    # of different shapes, so that anything kept on a module would clash
    batches = [case.batch(seed=seed, batch_size=1 + seed, length=5 + seed) for seed in range(3)]
    expected = [case.output(tuned.model, batch) for batch in batches]
    results: list[list[Tensor]] = [[] for _ in batches]
    failures: list[BaseException] = []
    start = threading.Barrier(len(batches))

    def work(index: int) -> None:
        try:
            start.wait()
            results[index].extend(case.output(tuned.model, batches[index]) for _ in range(3))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    for outputs, wanted in zip(results, expected, strict=True):
        assert len(outputs) == 3
        assert all(torch.equal(output, wanted) for output in outputs)


@pytest.mark.parametrize("case", cases(architectures=few))
def test_models_of_one_configuration_do_not_disturb_each_other(case: Case) -> None:
    one = case.build()
    config = one.config
    twin = type(one)(config).eval()
    twin.load_state_dict(one.state_dict())
    assert twin.config is config
    batch = case.batch()
    bare, settings = case.output(twin, batch), config.to_json_string()
    first = case.attach(one)
    take_steps(first, case, batch)
    output = case.output(one, batch)
    assert torch.equal(case.output(twin, batch), bare)
    assert config.to_json_string() == settings
    second = case.attach(twin)
    take_steps(second, case, batch, steps=1)
    assert torch.equal(case.output(one, batch), output)
    second.detach()
    assert torch.equal(case.output(twin, batch), bare)
    assert torch.equal(case.output(one, batch), output)


# -- state dictionaries and files of the base model -----------------------------------------------------------


@pytest.mark.parametrize("case", cases(architectures=few))
def test_state_dictionaries_load_both_ways(case: Case) -> None:
    tuned, batch, output = trained(case)
    model, fresh = tuned.model, case.build()
    bare, own = copy.deepcopy(fresh.state_dict()), copy.deepcopy(model.state_dict())
    added = own.keys() - bare.keys()
    assert not bare.keys() - own.keys()

    # its own, into the same method on another model
    case.attach(fresh)
    fresh.load_state_dict(own)
    assert torch.equal(case.output(fresh, batch), output)

    # the bare model's, while attached: resets what the model has, says nothing about what was added
    model.load_state_dict(case.build().state_dict())
    state = model.state_dict()
    assert all(torch.equal(state[key], bare[key]) for key in bare)
    assert all(torch.equal(state[key], own[key]) for key in added)
    model.load_state_dict(own)
    assert torch.equal(case.output(model, batch), output)

    # half of what was added is an error, and so is something added for a bare model
    if len(added) > 1:
        own.pop(sorted(added)[0])
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(own)
    if added:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            case.build().load_state_dict(own)
    tuned.detach()
    assert torch.equal(case.output(model, batch), case.output(case.build(), batch))


@pytest.mark.parametrize("case", cases(architectures=few))
def test_save_pretrained_writes_the_bare_models_keys(case: Case, tmp_path: Path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path / "bare")
    keys = model.state_dict().keys()
    tuned = case.attach(model)
    take_steps(tuned, case, case.batch())
    model.save_pretrained(tmp_path / "attached")
    with tuned.disabled():
        model.save_pretrained(tmp_path / "disabled")
    bare, attached, disabled = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("bare", "attached", "disabled")
    )
    assert bare.keys() == attached.keys() == disabled.keys()
    assert all(torch.equal(bare[key], disabled[key]) for key in bare)
    # with the tuned values of parameters that the model itself has
    again = type(model).from_pretrained(tmp_path / "attached").state_dict()
    live = model.state_dict()
    assert again.keys() == keys
    assert all(torch.equal(again[key], live[key]) for key in keys)
    settings = [(tmp_path / folder / "config.json").read_text(encoding="utf-8") for folder in ("bare", "attached")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in ("bert", "llama-gqa", "t5")
        for method in METHODS
        if not excluded(method, ARCHITECTURES[name])
    ],
)
def test_token_embeddings_are_not_resized_while_attached(method: str, name: str) -> None:
    """It would replace modules and parameters that the attachment, and any optimizer, refer to."""
    case = Case(method, ARCHITECTURES[name])
    tuned, batch, output = trained(case)
    with pytest.raises(StateError, match="detach first"):
        tuned.model.resize_token_embeddings(120)
    with tuned.disabled(), pytest.raises(StateError, match="Resize them before attaching"):
        tuned.model.resize_token_embeddings(120)
    assert torch.equal(case.output(tuned.model, batch), output)
    tuned.detach().resize_token_embeddings(120)
    again = case.attach(tuned.model)
    take_steps(again, case, batch, steps=1)


# -- compilation ----------------------------------------------------------------------------------------------


def compiled_graphs(
    model: nn.Module, batch: dict[str, Tensor], output_of: Callable[[Any], Tensor]
) -> tuple[int, Tensor]:
    """Output of the compiled model, and of how many graphs it consists; a graph break is an error."""
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        output = output_of(torch.compile(model, backend=backend, fullgraph=True)(**batch))
    torch._dynamo.reset()
    return count, output


#: Methods that write changed values into the model's parameters before its call, which breaks the graph there.
BREAKING = ("fish-mask", "threshold-mask", "diff-pruning")
#: Methods whose scores are made in the backward pass while they train, outside of the graph.
WATCHING = ("increlora",)
ONE_GRAPH = Only(
    "changed values are written before the call, which breaks the graph", lambda method: method.name not in BREAKING
)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in BREAKING])
def test_compiles_into_one_graph(method: str) -> None:
    """As the bare model does: nothing of a method breaks the graph."""
    case = Case(method, ARCHITECTURES["llama-gqa"])
    tuned = case.attach(case.build(num_hidden_layers=1))
    batch = case.batch(padding="left")
    expected = case.output(tuned.model, batch)
    count, output = compiled_graphs(tuned.model, batch, case.architecture.output)
    assert count == 1
    assert torch.equal(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(methods=ONE_GRAPH, architectures=compiled))
def test_compiles_with_as_many_graphs_as_the_bare_model(case: Case) -> None:
    batch = case.batch(padding="right")
    bare = case.build()
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = torch._dynamo.explain(bare)(**batch)
    tuned, _, _ = trained(case)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(tuned.model)(**batch)
    assert (found.graph_break_count, found.graph_count) == (wanted.graph_break_count, wanted.graph_count) == (0, 1)
    expected = case.output(tuned.model, batch)
    assert torch.equal(compiled_graphs(tuned.model, batch, case.architecture.output)[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(architectures=compiled))
def test_compiled_training_has_the_same_gradients(case: Case) -> None:
    tuned, batch, _ = trained(case)
    plain = gradients_of(tuned, case, batch)
    torch._dynamo.reset()
    one_graph = case.method not in (*BREAKING, *WATCHING)
    compiled = torch.compile(tuned.model, backend="aot_eager", fullgraph=one_graph)
    tuned.model.zero_grad()
    output = case.architecture.output(compiled(**batch))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * direction).mean().backward()
    torch._dynamo.reset()
    for name, value in tuned.named_trainable_parameters():
        wanted = plain[name]
        assert (value.grad is None) == (wanted is None), name
        if wanted is not None and value.grad is not None:
            assert (value.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-3), name
