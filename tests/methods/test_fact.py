"""FacT in models, against its fact sheet: numbers are those of the sheet's invariants."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError
from deltune.methods.reparameterized.decompositions import Decomposition, SharedSlice, TensorTrain
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, singular_values, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

FORMS = ["tensor-train", "tucker"]
#: Ordinary matrices, transposed fused ones, interleaved ones, grouped queries with gates, fused gates, T5, images.
LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "t5", "vit"]


def parts(tuned: deltune.Tuned, name: str = "default") -> tuple[Decomposition, dict[str, SharedSlice]]:
    """The shared factors, and the forms that refer to them."""
    forms = tuned.attachments[name].forms
    (shared,) = (form for form in forms.values() if isinstance(form, Decomposition))
    return shared, {key: form for key, form in forms.items() if isinstance(form, SharedSlice)}


def randomized(name: str, method: str) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, method)
    for value in parts(tuned)[0].parameters():
        nn.init.normal_(value, std=0.2)
    return tuned, batch


@pytest.mark.parametrize("decomposition", FORMS)
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_2_the_rank_of_every_blocks_change(name: str, decomposition: str) -> None:
    tuned, _ = randomized(name, f"fact(rank=3, decomposition={decomposition})")
    shared, forms = parts(tuned)
    for key, form in forms.items():
        for block in shared.dense(form.index):
            values = singular_values(block)
            assert values[3] < 1e-5 * values[0], key


def test_4_tucker_with_its_cores_put_in_is_the_tensor_train() -> None:
    tuned, batch = randomized("llama-gqa", "fact(rank=4, decomposition=tucker)")
    other, _ = attached("llama-gqa", "fact(rank=4)")
    tucker, tensor_train = parts(tuned)[0], parts(other)[0]
    assert isinstance(tensor_train, TensorTrain)
    with torch.no_grad():
        tensor_train.U.copy_(tucker.U)
        tensor_train.V.copy_(tucker.output_factor())
        tensor_train.S.copy_(tucker.cores(slice(None)))
    assert relative_error(output(other.model, batch), output(tuned.model, batch)) < 1e-5


@pytest.mark.parametrize(
    ("name", "height", "cuts"),
    [
        ("bert", 16, {"attention.query": (2, False), "ffn.up": (3, False), "ffn.down": (3, True)}),
        ("gpt2", 32, {"attention.query": (1, False), "ffn.up": (4, False), "ffn.down": (4, True)}),
        ("llama-gqa", 16, {"attention.key": (1, False), "attention.output": (2, False), "ffn.down": (3, True)}),
        ("t5", 24, {"attention.query": (1, False), "attention.output": (1, True), "ffn.down": (2, True)}),
    ],
)
def test_5_cutting_and_joining_is_the_identity(name: str, height: int, cuts: dict[str, tuple[int, bool]]) -> None:
    """Every block of every matrix is where the sheet says, made by hand from U, S and V."""
    tuned, _ = randomized(name, "fact(rank=4, scale=2)")
    shared, _ = parts(tuned)
    assert isinstance(shared, TensorTrain)
    assert shared.output_factor().shape == (height, 4)
    seen: list[int] = []
    for key, site, form in tuned.attachments["default"].sites:
        assert isinstance(form, SharedSlice)
        assert isinstance(form.index, slice)
        numbers = list(range(form.index.start, form.index.stop))
        seen += numbers
        role = key.split(".", 2)[2]
        if role in cuts:
            assert (len(numbers), form.along_input) == cuts[role], key
        blocks = [2 * shared.output_factor() @ shared.S[number] @ shared.U.T for number in numbers]
        if form.along_input and height != 32:
            blocks = [block.T for block in blocks]
        delta = form.weight_delta()
        assert delta.shape == (site.out_features, site.in_features)  # type: ignore[attr-defined]
        cut = delta.split(blocks[0].shape[1 if form.along_input else 0], dim=1 if form.along_input else 0)
        assert torch.equal(torch.cat(cut, dim=1 if form.along_input else 0), delta)
        for mine, block in zip(cut, blocks, strict=True):
            assert torch.allclose(mine, block, atol=1e-6), key
    assert sorted(seen) == list(range(shared.S.shape[0]))  # each block once


@pytest.mark.parametrize("decomposition", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_6_merged_equals_unmerged(name: str, decomposition: str) -> None:
    tuned, batch = attached(name, f"fact(rank=4, scale=2, decomposition={decomposition})")
    before = bits(tuned.model)
    train(tuned, batch)
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), unmerged)
    with tuned.disabled():
        for key, value in tuned.model.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("decomposition", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_7_step_0_is_the_frozen_model_and_only_v_has_a_gradient(name: str, decomposition: str) -> None:
    model = build(name)
    head = "language" if ARCHITECTURES[name].generates else "classification"
    batch = ARCHITECTURES[name].batch(head=head)  # type: ignore[arg-type]
    before = output(model, batch)
    tuned = deltune.attach(model, f"fact(decomposition={decomposition})")
    assert torch.equal(output(model, batch), before)
    loss_of(model, batch).backward()
    for key, value in parts(tuned)[0].named_parameters():
        assert value.grad is not None, key
        assert bool(value.grad.any()) == (key == "V"), key


def test_8_published_counts() -> None:
    assert BERT_BASE.count("fact") == 21_504
    assert BERT_BASE.count("fact(rank=16)") == 61_440
    assert BERT_BASE.count("fact(rank=16, decomposition=tucker)") == 30_976
    assert BERT_BASE.count("fact(rank=32, decomposition=tucker)") == 86_528
    assert LLAMA.count("fact(rank=16)") == 258_048
    assert LLAMA.count("lora(rank=1, targets='attention.* ffn.*')") == 305_280


@pytest.mark.parametrize("decomposition", FORMS)
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_9_the_gradient_of_a_shared_factor_is_the_sum_over_matrices(name: str, decomposition: str) -> None:
    """Against a copy of the factors for every matrix."""
    tuned, batch = randomized(name, f"fact(rank=4, decomposition={decomposition})")
    shared, forms = parts(tuned)
    loss_of(tuned.model, batch).backward()
    expected = {key: value.grad for key, value in shared.named_parameters()}
    for form in forms.values():
        form._shared = (copy.deepcopy(shared),)
        form.decomposition.zero_grad()
    loss_of(tuned.model, batch).backward()
    for key, gradient in expected.items():
        alone = [form.decomposition.get_parameter(key).grad for form in forms.values()]
        assert gradient is not None
        assert relative_error(sum(value for value in alone if value is not None), gradient) < 1e-5, key  # type: ignore[arg-type]


@pytest.mark.parametrize("decomposition", FORMS)
def test_11_shared_factors_are_stored_once_and_shared_again(decomposition: str, tmp_path: Path) -> None:
    tuned, batch = attached("llama-gqa", f"fact(rank=4, decomposition={decomposition})")
    train(tuned, batch)
    trained = output(tuned.model, batch)
    own = {"U", "V", "S"} if decomposition == "tensor-train" else {"U", "V", "P", "C"}
    tuned.save(tmp_path)
    assert load_file(tmp_path / "delta.safetensors").keys() == {f"factors.32.{name}" for name in own}
    assert sum("factors" in key for key in tuned.model.state_dict()) == len(own)
    loaded = deltune.load(build("llama-gqa"), tmp_path)
    for twin in (loaded, copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        shared, forms = parts(twin)
        assert len(forms) == 21
        assert all(form.decomposition is shared for form in forms.values())
        (address,) = {form.decomposition.U.data_ptr() for form in forms.values()}
        assert address == shared.U.data_ptr() != parts(tuned)[0].U.data_ptr()
        assert torch.equal(output(twin.model, batch), trained)
        with torch.no_grad():
            shared.U.zero_()
        with twin.disabled():
            bare = output(twin.model, batch)
        assert torch.equal(output(twin.model, batch), bare)


# -- options, types, several attachments -------------------------------------------------------------------------


def test_the_defaults_are_the_authors_but_for_the_rate() -> None:
    method = deltune.FacT()
    assert (method.decomposition, method.rank, method.scale, method.dropout) == ("tensor-train", 8, 1, 0.1)
    assert (method.learning_rate, method.weight_decay) == (3e-3, 1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rank=17", r"rank 17 exceeds the height 16 of the blocks"),
        ("rank=0", "at least 1"),
        ("scale=0", "greater than 0"),
        ("decomposition=cp", "cannot be"),
    ],
)
def test_what_does_not_fit_is_refused(options: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        attached("bert", f"fact({options})")


def test_only_sides_that_are_cut_make_the_height() -> None:
    """As in Gemma 2: the hidden size is a multiple of less than the sides that are cut."""
    model = nn.ModuleDict({"q": nn.Linear(36, 32), "k": nn.Linear(36, 16), "up": nn.Linear(36, 144)})
    forms = deltune.attach(model, "fact(rank=1, targets='q,k,up')").attachments["default"].forms
    assert forms["factors.36"].get_parameter("V").shape == (16, 1)
    assert forms["factors.36"].get_parameter("S").shape == (2 + 1 + 9, 1, 1)
    # where one matrix alone would make blocks higher than wide, they are no higher than the width
    model = nn.ModuleDict({"up": nn.Linear(12, 48)})
    forms = deltune.attach(model, "fact(rank=1, targets='up')").attachments["default"].forms
    assert forms["factors.12"].get_parameter("V").shape == (12, 1)


def test_other_widths_have_factors_of_their_own() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(6, 4), "c": nn.Linear(9, 3)})
    forms = deltune.attach(model, "fact(rank=1, targets='a,b,c')").attachments["default"].forms
    assert list(forms) == ["factors.6", "a", "b", "factors.9", "c"]
    assert forms["factors.6"].get_parameter("V").shape == (4, 1)
    assert forms["factors.6"].get_parameter("S").shape == (3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decomposition", FORMS)
def test_number_types(decomposition: str, dtype: torch.dtype) -> None:
    tuned, batch = attached("llama-gqa", f"fact(rank=4, decomposition={decomposition})", dtype=dtype)
    train(tuned, batch)
    assert {value.dtype for value in tuned.trainable_parameters()} == {dtype}
    found = output(tuned.model, batch)
    assert found.dtype == dtype
    tuned.merge()
    assert relative_error(output(tuned.model, batch), found) < (1e-12 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "vit"])
def test_gradient_checkpointing_reaches_factors_that_lie_in_no_layer(name: str, reentrant: bool) -> None:
    tuned, batch = randomized(name, "fact(rank=4, dropout=0)")
    tuned.model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned.model.zero_grad()
        loss_of(tuned.model, batch).backward()
        gradients.append([value.grad for value in parts(tuned)[0].parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        assert relative_error(again, plain) < 1e-4


def test_two_attachments_and_weights() -> None:
    model, batch = build("bert", "tokens"), ARCHITECTURES["bert"].batch(head="tokens")
    bare, found = output(model, batch), []
    tuned = deltune.attach(model, "fact(rank=1, targets=classifier)", "one", train_head=False)
    train(tuned, batch, lr=0.1)
    found.append(output(model, batch))
    tuned.attach("fact(rank=1, decomposition=tucker, targets=classifier)", "other", train_head=False)
    train(tuned, batch, lr=0.1)
    found.append(output(model, batch))
    assert min(relative_error(one, bare) for one in found) > 1e-4
    tuned.activate("one", "other", weights=(0.5, 2.0))
    expected = bare + 0.5 * (found[0] - bare) + 2 * (found[1] - bare)
    assert torch.allclose(output(model, batch), expected, atol=1e-5)
