"""What LoRA can also be: weight-decomposed (DoRA), from the principal part (PiSSA), of several ranks, in embeddings
and convolutions. Numbers are those of the sheet's invariants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.reparameterized.low_rank import DecomposedLowRank, LowRank, PrincipalLowRank, RankPattern
from tests.methods.common import attached, bits, build, matrix_site, output, relative_error, train
from tests.zoo import ARCHITECTURES

DORA = "lora(rank=2, alpha=4, weight_decomposed=true, targets='attention.* ffn.*')"
PISSA = "lora(rank=4, alpha=8, initialization=pissa, targets='attention.* ffn.*')"
LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]


def forms_of(tuned: deltune.Tuned, kind: type[LowRank] = LowRank) -> dict[str, LowRank]:
    return {key: form for key, _, form in tuned.attachments["default"].sites if isinstance(form, kind)}


# -- weight-decomposed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_11_rows_of_the_effective_matrix_have_the_trained_lengths(name: str) -> None:
    tuned, batch = attached(name, DORA)
    before = {key: value.clone() for key, value in tuned.model.state_dict().items()}
    train(tuned, batch)
    unmerged = output(tuned.model, batch)
    sites = {key: site for key, site, _ in tuned.attachments["default"].sites}
    forms = forms_of(tuned, DecomposedLowRank)
    assert forms
    tuned.merge()
    for key, form in forms.items():
        matrix = sites[key].matrix(tuned.model.get_submodule(sites[key].module))  # type: ignore[attr-defined]
        assert torch.allclose(matrix.norm(dim=1), form.magnitude, rtol=1e-5), key  # type: ignore[arg-type]
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.detach()
    assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


def test_11_the_norm_is_a_constant_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    matrix, bias, x = torch.randn(5, 6).double(), torch.randn(5).double(), torch.randn(7, 6).double()
    form = DecomposedLowRank(matrix_site(6, 5), matrix, 2, 1.5).double()
    torch.nn.init.normal_(form.B)
    with torch.no_grad():
        form.magnitude.mul_(torch.rand(5).double() + 0.5)
    frozen = F.linear(x, matrix, bias)
    found = frozen + form.change(frozen, x, matrix, bias)

    A, B, m = (value.detach().clone().requires_grad_() for value in (form.A, form.B, form.magnitude))
    direction = matrix + 1.5 * B @ A
    expected = F.linear(x, (m / direction.detach().norm(dim=1))[:, None] * direction, bias)
    assert torch.allclose(found, expected, atol=1e-10)
    weights = torch.randn(7, 5).double()
    gradients = torch.autograd.grad((found * weights).sum(), [form.A, form.B, form.magnitude])
    for one, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), [A, B, m]), strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    through = matrix + 1.5 * B @ A
    total = F.linear(x, (m / through.norm(dim=1))[:, None] * through, bias)
    assert not torch.allclose(torch.autograd.grad((total * weights).sum(), A)[0], gradients[0], atol=1e-3)


def test_a_row_of_zeros_stays_as_it_is() -> None:
    matrix = torch.randn(4, 6)
    matrix[1] = 0
    form = DecomposedLowRank(matrix_site(6, 4), matrix, 2, 1.0)
    x = torch.randn(3, 6)
    frozen = F.linear(x, matrix)
    change = form.change(frozen, x, matrix, None)
    assert not change.any()
    change.sum().backward()
    assert torch.isfinite(form.magnitude.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_weight_decomposed_beside_a_plain_one_reads_the_frozen_output(name: str) -> None:
    """The two changes are added, in whichever order they were made live."""
    tuned, batch = attached(name, DORA)
    train(tuned, batch)
    tuned.attach("lora(rank=2)", "plain", train_head=False)
    train(tuned, batch)
    found = []
    for names in (("default", "plain"), ("plain", "default")):
        tuned.activate(*names)
        found.append(output(tuned.model, batch))
    assert relative_error(*found) < 1e-5


def test_weight_decomposed_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    tuned, batch = attached("llama-gqa", "lora(rank=2, alpha=4, weight_decomposed=true)")
    train(tuned, batch, weight_decay=0.0)
    config = peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "v_proj"])
    other = peft.get_peft_model(build("llama-gqa"), config)
    forms = {site.module: form for _, site, form in tuned.attachments["default"].sites}  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, module in other.named_modules():
            form = forms.get(name.removeprefix("base_model.model."))
            if form is not None:
                module.lora_A["default"].weight.copy_(form.A)
                module.lora_B["default"].weight.copy_(form.B)
                module.lora_magnitude_vector["default"].weight.copy_(form.magnitude)
    assert relative_error(output(other, batch), output(tuned.model, batch)) < 1e-5


# -- from the principal part -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_12_the_branch_carries_the_largest_singular_values(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    before, bare = bits(model), output(model, batch)
    torch.manual_seed(1)
    tuned = deltune.attach(model, PISSA)
    assert relative_error(output(model, batch), bare) < 1e-5
    for key, site, form in tuned.attachments["default"].sites:
        assert isinstance(form, PrincipalLowRank)
        matrix = site.matrix(model.get_submodule(site.module))  # type: ignore[attr-defined]
        principal = form.scale * form.B @ form.A
        values = torch.linalg.svdvals(matrix)
        assert torch.allclose(torch.linalg.svdvals(principal)[:4], values[:4], rtol=1e-4), key
        # what is left of the matrix has the other ones
        assert torch.allclose(torch.linalg.matrix_norm(matrix - principal, 2), values[4], rtol=1e-4), key
        assert torch.allclose(matrix - form.scale * form.B0 @ form.A0 + principal, matrix, atol=1e-5), key
    train(tuned, batch)
    assert relative_error(output(model, batch), bare) > 1e-3
    tuned.detach()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", ["", ", rank_stabilized=true", ", rank_pattern='ffn.* -> 3; attention.key -> 0'"])
def test_what_started_from_the_principal_part_is_saved_as_a_change_of_twice_the_rank(
    options: str, tmp_path: Path
) -> None:
    tuned, batch = attached("bert", f"{PISSA[:-1]}{options})")
    train(tuned, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    method = loaded.attachments["default"].method
    assert isinstance(method, deltune.LoRA)
    assert (method.rank, method.initialization) == (8, "uniform")
    assert not forms_of(loaded, PrincipalLowRank)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5


def test_too_large_a_principal_part_and_both_at_once_are_refused() -> None:
    with pytest.raises(MethodError, match="more than half"):
        attached("bert", "lora(rank=17, initialization=pissa)")
    with pytest.raises(MethodError, match="exclude each other"):
        deltune.LoRA(initialization="pissa", weight_decomposed=True)


def test_gaussian_start() -> None:
    torch.manual_seed(0)
    tuned, _ = attached("bert", "lora(rank=4, initialization=gaussian, targets='attention.* ffn.*')")
    values = torch.cat([form.A.detach().flatten() for form in forms_of(tuned).values()])
    assert abs(float(values.std()) - 0.25) < 0.01
    assert float(values.abs().max()) > 0.5  # no uniform law of this deviation reaches so far
    assert not any(form.B.any() for form in forms_of(tuned).values())


# -- ranks that differ -----------------------------------------------------------------------------------------


def test_ranks_by_role_and_layer(tmp_path: Path) -> None:
    pattern = "attention.* -> 3; attention.query layers=-1: -> 5; ffn.up -> 0"
    tuned, batch = attached("bert", f"lora(rank=2, targets='attention.* ffn.*', rank_pattern='{pattern}')")
    ranks = {key: form.rank for key, form in forms_of(tuned).items()}
    last = max(int(key.split(".")[1]) for key in ranks)
    assert ranks["encoder.0.attention.query"] == 3
    assert ranks[f"encoder.{last}.attention.query"] == 5
    assert ranks[f"encoder.{last}.attention.key"] == 3
    assert ranks["encoder.0.ffn.down"] == 2
    assert not any(key.endswith("ffn.up") for key in ranks)
    # alpha / r with the rank of the site
    assert {key: form.scale for key, form in forms_of(tuned).items()} == {key: 16 / rank for key, rank in ranks.items()}
    train(tuned, batch)
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build("bert"), tmp_path).model, batch), output(tuned.model, batch))


def test_ranks_are_written_as_they_are_read() -> None:
    tuned, _ = attached("t5", "lora(rank=2, targets='attention.* ffn.* embeddings')")
    ranks = {key: 1 + number % 4 for number, key in enumerate(forms_of(tuned))}
    text = RankPattern.text(ranks, 2)
    again, _ = attached("t5", f"lora(rank=2, targets='attention.* ffn.* embeddings', rank_pattern='{text}')")
    assert {key: form.rank for key, form in forms_of(again).items()} == ranks


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("ffn.up 16", MethodError, "gives no rank"),
        ("ffn.up -> many", MethodError, "gives no rank"),
        ("attention.query -> 99", MethodError, "at most 32"),
        ("ffn.up -> 4", MethodError, "none of that is among the targets"),
        ("attention.qery -> 4", TargetError, r"attention\.query"),
        ("attention.* -> 0", MethodError, "would train nothing"),
    ],
)
def test_malformed_ranks(pattern: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        deltune.attach(build("bert"), f"lora(rank_pattern='{pattern}')", train_head=False)


# -- embeddings and convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "t5"])
def test_an_embedding_is_a_matrix_too(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name == "bert" else "language")
    bare = output(model, batch)
    torch.manual_seed(1)
    tuned = deltune.attach(model, "lora(rank=2, targets=embeddings)", train_head=False)
    assert torch.equal(output(model, batch), bare)
    for form in forms_of(tuned).values():
        assert not form.A.any()
        assert form.A.shape[1] > form.B.shape[0]  # the vocabulary is the input
    train(tuned, batch)
    trained = output(model, batch)
    assert relative_error(trained, bare) > 1e-4
    site = next(site for _, site, _ in tuned.attachments["default"].sites)
    table = model.get_submodule(site.module).weight  # type: ignore[attr-defined]
    tied = sum(value is table for value in dict(model.named_parameters(remove_duplicate=False)).values()) > 1
    if tied:
        with pytest.raises(StateError, match="tied"):
            tuned.merge()
        return
    tuned.merge()
    assert relative_error(output(model, batch), trained) < 1e-5


@pytest.mark.parametrize(
    ("name", "targets"), [("vit", "*.projection"), ("whisper", "conv1,conv2"), ("clip", "patch_embedding")]
)
@pytest.mark.parametrize("method", ["lora(rank=2, targets='{}')"])
def test_a_convolution_is_a_matrix_too(name: str, targets: str, method: str) -> None:
    architecture = ARCHITECTURES[name]
    head = "language" if architecture.generates else architecture.heads[0]
    model, batch = architecture.build(head), architecture.batch(head=head)  # type: ignore[arg-type]
    bare = architecture.output(model(**batch)).detach()
    torch.manual_seed(1)
    tuned = deltune.attach(model, method.format(targets), train_head=False)
    forms = forms_of(tuned)
    for _, site, form in tuned.attachments["default"].sites:
        kernel = model.get_submodule(site.module).weight  # type: ignore[attr-defined]
        assert form.A.shape == (2, kernel[0].numel())
        assert form.B.shape == (kernel.shape[0], 2)
    with torch.no_grad():
        for form in forms.values():
            form.B.normal_(std=0.1)
        changed = architecture.output(model(**batch))
    assert relative_error(changed, bare) > 1e-4
    tuned.merge()
    assert relative_error(architecture.output(model(**batch)).detach(), changed) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_of_every_kind(dimensions: int, groups: int, mode: str) -> None:
    torch.manual_seed(0)
    kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 1]

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = kind(4, 6, 3, stride=2, padding=1, dilation=1, groups=groups, padding_mode=mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(x)  # type: ignore[no-any-return]

    model, x = Wrapped(), torch.randn(2, 4, *[7] * dimensions)
    tuned = deltune.attach(model, "lora(rank=2, targets=convolution)")
    (form,) = forms_of(tuned).values()
    torch.nn.init.normal_(form.B)
    changed = model(x).detach()
    tuned.merge()
    assert torch.allclose(model(x), changed, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(model(x), changed)


def test_what_acts_on_linear_maps_alone_says_so() -> None:
    with pytest.raises(MethodError, match="is a embedding"):
        attached("bert", "lora(rank=2, weight_decomposed=true, targets=embeddings)")
