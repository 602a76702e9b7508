from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks import InstructionTuning, task_from_description
from tests.tasks.tiny import CHAT_TEMPLATE, byte_tokenizer, decoder, word_tokenizer

ALPACA = Dataset.from_list(
    [
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Part.", "input": None, "output": "Bye"},
        {"instruction": "Go.", "input": "<noinput>", "output": "Ok"},
    ]
)

CHAT = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "2 or two"},
            ]
        }
    ]
)


def learned_text(tokenizer, row, gap="_"):
    """What is learned, with a mark for each run of tokens that is not."""
    pieces, run = [], []
    for label in row["labels"]:
        if label == -100:
            if run or not pieces:
                pieces += [tokenizer.decode(run)] if run else []
                pieces.append(gap)
                run = []
        else:
            run.append(label)
    return "".join([*pieces, tokenizer.decode(run)])


def test_alpaca_template_is_the_published_one():
    task = InstructionTuning.from_data(ALPACA)
    tokenizer = byte_tokenizer()
    assert task.prompt_for(ALPACA[0], tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{}\n\n### Response:"
    )
    for row in (1, 2, 3):
        assert task.prompt_for(ALPACA[row], tokenizer) == without.format(ALPACA[row]["instruction"])


@pytest.mark.parametrize("options", [{}, {"start": True}])
@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_answer_and_end_token_are_learned_and_nothing_else(options, chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template, pad_token="<end>", **options)
    task = InstructionTuning.from_data(ALPACA)
    for row, encoded in zip(ALPACA, task.encode(ALPACA, tokenizer), strict=True):
        assert learned_text(tokenizer, encoded) == f"_{row['output']}<end>"
        prompt = tokenizer(task.prompt_for(row, tokenizer), add_special_tokens=False)["input_ids"]
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert encoded["input_ids"][len(prompt) :] == [x for x in encoded["labels"] if x != -100]
        started = bool(options) and chat_template is None
        assert (encoded["input_ids"][0] == tokenizer.bos_token_id) == started


def test_loss_on_all():
    tokenizer = byte_tokenizer()
    task = InstructionTuning.from_data(ALPACA, loss_on="all", template="raw")
    encoded = task.encode(ALPACA, tokenizer)
    assert encoded[1]["labels"] == [-100, *encoded[1]["input_ids"][1:]]
    assert tokenizer.decode(encoded[1]["input_ids"]) == "Greet.Hi<end>"
    assert "prompts included" in task.describe()["loss"]


@pytest.mark.parametrize(
    ("template", "learned"),
    [(CHAT_TEMPLATE, "_1<end>_2 or two<end>"), ("alpaca", "_1<end>_2 or two<end>"), ("raw", "_1<end>_2 or two<end>")],
)
def test_every_answer_of_a_conversation_is_learned(template, learned):
    tokenizer = byte_tokenizer()
    (row,) = InstructionTuning.from_data(CHAT, template=template).encode(CHAT, tokenizer)
    assert learned_text(tokenizer, row) == learned


def test_answers_are_found_where_the_template_writes_only_the_last_in_full():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '[thought]' }}{% endif %}"
        "{{ m.content | trim + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = byte_tokenizer()
    (row,) = InstructionTuning.from_data(CHAT, template=template).encode(CHAT, tokenizer)
    assert learned_text(tokenizer, row) == "_1<end>_[thought]2 or two<end>"


def test_training_uses_the_generation_prompt_even_where_the_template_would_not():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>[think]' }}{% endif %}"
    )
    tokenizer = byte_tokenizer()
    task = InstructionTuning.from_data(ALPACA, template=template)
    (row, *_) = task.encode(ALPACA, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == task.prompt_for(ALPACA[0], tokenizer) + "2<end>"
    assert learned_text(tokenizer, row) == "_2<end>"


def test_a_template_without_end_token_gets_one():
    template = CHAT_TEMPLATE.replace("<end>", "|stop|")
    tokenizer = byte_tokenizer()
    (row, *_) = InstructionTuning.from_data(ALPACA, template=template).encode(ALPACA, tokenizer)
    assert learned_text(tokenizer, row) == "_2|stop|\n<end>"


def test_earlier_answers_end_with_what_the_template_puts_there():
    template = CHAT_TEMPLATE.replace("<end>", "|stop|")
    tokenizer = byte_tokenizer()
    (row,) = InstructionTuning.from_data(CHAT, template=template).encode(CHAT, tokenizer)
    assert learned_text(tokenizer, row) == "_1|stop|_2 or two|stop|\n<end>"


def test_end_token_in_the_answer_is_not_doubled():
    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b<end>"]})
    tokenizer = byte_tokenizer()
    for template in ("alpaca", CHAT_TEMPLATE):
        (row,) = InstructionTuning.from_data(data, template=template).encode(data, tokenizer)
        assert learned_text(tokenizer, row) == "_b<end>"


@pytest.mark.parametrize("answer", ["\nyes", "yes"])
def test_tokens_that_merge_across_the_boundary_are_kept_apart(answer):
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ"), (":", "y")])
    assert len(tokenizer(":y")["input_ids"]) == len(tokenizer("\n\n")["input_ids"]) == 1
    data = Dataset.from_dict({"prompt": ["Say\n" if answer[0] == "\n" else "Say:"], "completion": [answer]})
    task = InstructionTuning.from_data(data, template="raw")
    (row,) = task.encode(data, tokenizer)
    prompt = tokenizer(task.prompt_for(data[0], tokenizer), add_special_tokens=False)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert learned_text(tokenizer, row) == f"_{answer}<end>"


def test_boundary_is_found_where_answers_cannot_be_tokenized_alone():
    """A tokenizer that marks the beginning of a text, as SentencePiece does."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(merges=[(":", "y")])
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("^")
    data = Dataset.from_dict({"prompt": ["Say:"], "completion": ["yes"]})
    (row,) = InstructionTuning.from_data(data, template="raw").encode(data, tokenizer)
    assert tokenizer.decode(row["input_ids"]).startswith("^Say:yes")
    assert learned_text(tokenizer, row) == "_:yes<end>".replace("<end>", tokenizer.decode(row["input_ids"])[8:])
    assert row["labels"][-1] == tokenizer.eos_token_id


texts = st.text("ab c\n:é中", min_size=1, max_size=30).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["alpaca", "raw", CHAT_TEMPLATE]),
    st.sampled_from(["left", "right"]),
)
def test_learned_text_is_the_answer_whatever_the_text_template_and_padding(pairs, merge, template, side):
    merges = [("Ċ", "Ċ"), (":", "a"), ("a", "a"), ("Ġ", "a")] if merge else []
    tokenizer = byte_tokenizer(merges=merges, pad_token="<end>")
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    task = InstructionTuning.from_data(data, template=template)
    encoded = task.encode(data, tokenizer)
    batch = task.collator(tokenizer, padding_side=side)(list(encoded))
    for row, (prompt, answer) in enumerate(pairs):
        labels = batch["labels"][row]
        kept = labels[labels != -100]
        assert tokenizer.decode(kept) == answer + "<end>"
        assert int((labels == tokenizer.eos_token_id).sum()) == 1
        real = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        text = task.prompt_for({"prompt": prompt}, tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert real.tolist() == ids + kept.tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(4, 50))
def test_long_rows_lose_the_middle_of_the_prompt_or_are_dropped(prompt, answer, limit):
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"prompt": ["p", "<" + "p" * prompt + ">"], "completion": ["a", "a" * answer]})
    task = InstructionTuning.from_data(data, template="raw", max_length=limit)
    encoded, report = task.encode_with_report(data, tokenizer)
    room = limit - answer - 1
    if prompt + 2 <= room:
        assert (report.truncated_rows, report.dropped_rows) == (0, ())
    elif room >= min(prompt + 2, limit // 4):
        assert (report.truncated_rows, report.dropped_rows) == (1, ())
        row = encoded[1]
        assert row["length"] == limit
        assert tokenizer.decode(row["input_ids"]).endswith(">" + "a" * answer + "<end>")
        assert learned_text(tokenizer, row) == "_" + "a" * answer + "<end>"
        if room > 1:
            assert tokenizer.decode(row["input_ids"]).startswith("<")
    else:
        assert (report.truncated_rows, report.dropped_rows, len(encoded)) == (0, (1,), 1)


def test_cut_and_dropped_rows_are_reported(caplog):
    data = Dataset.from_dict({"prompt": ["p" * 30, "p", "p"], "completion": ["a", "a" * 30, "a"]})
    task = InstructionTuning.from_data(data, template="raw", max_length=20)
    task.encode(data, byte_tokenizer())
    assert "1 of 3 rows cut to 20 tokens" in caplog.text
    assert "1 of 3 rows dropped, whose answers leave too little room" in caplog.text
    with pytest.raises(DataError, match=r"None of the 1 rows fits.*Raise max_length"):
        task.encode(data.select([1]), byte_tokenizer())


def test_prompts_for_generation_are_those_of_training():
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE, pad_token="<end>")
    for data in (ALPACA, CHAT):
        task = InstructionTuning.from_data(data)
        prompts = task.encode(data, tokenizer, labelled=False)
        for row, prompt, whole in zip(data, prompts, task.encode(data, tokenizer), strict=True):
            assert tokenizer.decode(prompt["input_ids"]) == task.prompt_for(row, tokenizer)
            assert whole["input_ids"][: prompt["length"]] == prompt["input_ids"]
    unanswered = Dataset.from_list([{"messages": CHAT[0]["messages"][:-1]}])
    task = InstructionTuning.from_data(CHAT)
    assert task.prompt_for(unanswered[0], tokenizer) == task.prompt_for(CHAT[0], tokenizer)
    short, report = InstructionTuning.from_data(CHAT, max_length=7).encode_with_report(CHAT, tokenizer, labelled=False)
    whole = task.encode(CHAT, tokenizer, labelled=False)[0]["input_ids"]
    assert short[0]["input_ids"] == whole[:3] + whole[-4:]
    assert report.truncated_rows == 1


def test_training_teaches_where_to_stop():
    """The whole chain: a decoder that learned one answer generates it and stops, although <end> pads too."""
    tokenizer = byte_tokenizer(pad_token="<end>")
    data = Dataset.from_dict({"prompt": ["Q", "QQQQ"], "completion": ["ab", "abab"]})
    task = InstructionTuning.from_data(data, template="raw")
    model = decoder(len(tokenizer)).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = task.collator(tokenizer)(list(task.encode(data, tokenizer)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = task.generation_options(tokenizer)
    prompts = task.collator(tokenizer, padding_side=task.prediction_padding_side)(
        list(task.encode(data, tokenizer, labelled=False))
    )
    ids = model.eval().generate(**prompts, max_new_tokens=12, do_sample=False, **options)
    written = task.predict(ids[:, prompts["input_ids"].shape[1] :], tokenizer)
    assert [row["text"] for row in written] == task.answers(data) == ["ab", "abab"]


def test_description_fixes_the_template():
    task = InstructionTuning.from_data(ALPACA).resolve(byte_tokenizer(chat_template=CHAT_TEMPLATE))
    rebuilt = task_from_description(json.loads(json.dumps(task.describe())))
    assert rebuilt == task
    assert rebuilt.template == CHAT_TEMPLATE
    assert rebuilt.max_length == 512
    other = byte_tokenizer(chat_template="{{ 'something else' }}")
    assert rebuilt.prompt_for(ALPACA[1], other) == "<|user|>Greet.<end>\n<|assistant|>"
    assert "answers" in rebuilt.describe()["loss"]


def test_dates_in_templates_are_fixed():
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%Y') }} " + CHAT_TEMPLATE)
    task = InstructionTuning.from_data(ALPACA).resolve(tokenizer)
    assert "strftime_now" not in task.template
    assert task.prompt_for(ALPACA[0], tokenizer)[:2] == "20"


def test_shares_of_data_in_the_wild():
    rows = [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]
    data = Dataset.from_list(rows)
    task = InstructionTuning.from_data(data)
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    assert task.messages == "conversations"
    assert learned_text(tokenizer, task.encode(data, tokenizer)[0]) == "_A<end>"
    assert task.required_texts() == ()
    assert InstructionTuning.from_data(ALPACA).required_texts() == ("instruction", "output")


def conversation(*turns):
    return Dataset.from_list([{"messages": [{"role": role, "content": content} for role, content in turns]}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (conversation(("usr", "a"), ("assistant", "b")), "Row 1: message 1 has the unknown role 'usr'.*'user'"),
        (conversation(("user", "a"), ("system", "x"), ("assistant", "b")), "message 2 is a system message"),
        (conversation(("system", "a"), ("assistant", "b")), "no message of a user"),
        (conversation(("user", "a")), "ends with a message of the user.*End it with an answer"),
        (conversation(("user", "a"), ("assistant", "")), r"messages\[1\].content', is empty"),
        (Dataset.from_list([{"messages": "text"}]), "a list of messages such as"),
        (Dataset.from_list([{"messages": [{"speaker": "x"}]}]), "Each message needs 'role' and 'content'"),
        (Dataset.from_dict({"prompt": ["a"], "completion": [" "]}), "row 1, column 'completion', is empty"),
        (Dataset.from_dict({"prompt": ["a"], "completion": ["<end>"]}), "row 1, column 'completion', is empty"),
        (Dataset.from_dict({"prompt": ["a", None], "completion": ["b", "b"]}), "Row 2 has no value in column 'prompt'"),
        (Dataset.from_dict({"prompt": ["a"], "completion": [3]}), r"Row 1 holds 3 \(int\)"),
    ],
)
def test_unusable_rows_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        InstructionTuning.from_data(data).encode(data, byte_tokenizer())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "cannot write the conversation of row 1: no system.*template='alpaca'"),
        ("{{ messages[0].content }}", "does not show the answer of row 1"),
    ],
)
def test_templates_that_do_not_fit_are_explained(template, message):
    data = conversation(("user", "ask"), ("assistant", "reply"))
    if "show" in message:
        template += "{% if add_generation_prompt %}!{% endif %}"
    with pytest.raises(DataError, match=message):
        InstructionTuning.from_data(data, template=template).encode(data, byte_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "answers"}, "loss_on must be 'answer' or 'all'.*Did you mean 'answer'"),
        ({"template": "alpaka"}, "no template 'alpaka'. Did you mean 'alpaca'.*Jinja"),
        ({"prompt": ""}, "prompt must be the name of a data column"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        InstructionTuning(**options)


def test_columns_that_are_not_there_are_explained():
    data = Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    with pytest.raises(
        DataError, match=r"The data have the columns question, answer.*Rename the columns, or name them"
    ):
        InstructionTuning.from_data(data)
    assert InstructionTuning.from_data(data, prompt="question", answer="answer").columns() == ("question", "answer")
    with pytest.raises(DataError, match=r"'answers', which the data do not have.*Did you mean 'answer'"):
        InstructionTuning.from_data(data, prompt="question", answer="answers")
    with pytest.raises(DataError, match="no end token"):
        InstructionTuning.from_data(ALPACA).encode(ALPACA, word_tokenizer())
