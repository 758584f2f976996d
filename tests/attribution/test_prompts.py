"""What a tokenizer, a chat template and a collator do to prompts before they are attributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loki_kernels.attribution import prompts
from loki_kernels.attribution.prompts import tokenize_prompts
from loki_kernels.questions import Question, load_questions
from tests.tiny_tokenizers import BOS, CHAT, EOS, A, B, tokenizer


def tokens(prompt, *arguments, **options):
    (sequence,) = tokenize_prompts([prompt], *arguments, 97, **options)
    return sequence.ids.tolist()


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["a a", "<s> a a", "<s> </s>", "</s>", "a </s>"])
def test_a_tokenizer_neither_doubles_the_first_token_nor_ends_the_prompt(adds, text):
    named = [{"a": A, "<s>": BOS, "</s>": EOS}[word] for word in text.split()]
    first = [BOS] if adds.startswith("<s>") and named[0] != BOS else []
    assert tokens(text, tokenizer(adds)) == first + named


# SmolVLM's and LLaVA's go through a content's parts, through a string letter by letter.
PARTS = (
    "<s>{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    " {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def test_a_table_is_no_list_of_prompts():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", "b"]})
    with pytest.raises(TypeError, match=r"prompts\['text'\].tolist"):
        list(tokenize_prompts(table, tokenizer(), 97))
    assert len(list(tokenize_prompts(table["text"], tokenizer(), 97))) == 2


def test_a_tokenizer_may_write_chats_without_a_template():
    """mistral-common's, which AutoTokenizer gives of Mistral's models where it is installed."""
    tokenizer_of_mistral = tokenizer()

    class Backend(type(tokenizer_of_mistral)):
        def apply_chat_template(self, chat, tokenize=True, return_dict=True, **_):
            text = " ".join(message["content"] for message in chat)
            return {"input_ids": [BOS, *self(text, add_special_tokens=False)["input_ids"], B]}

    tokenizer_of_mistral.__class__ = Backend
    assert tokens(CHAT_OF_A, tokenizer_of_mistral) == [BOS, A, B]
    question = load_questions(1)[0]
    assert question.prompt(tokenizer_of_mistral) == [{"role": "user", "content": question.text()}]
    assert question.prompt(tokenizer()) == question.text()


def test_a_template_of_parts_is_given_parts():
    chat = [{"role": "user", "content": "a b"}]
    typed = [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]
    assert tokens(chat, tokenizer(chat_template=PARTS)) == [BOS, A, B]
    assert tokens(chat, tokenizer(chat_template=CHAT)) == [BOS, A, B, B]  # an answer begins with b
    assert tokens(typed, tokenizer(chat_template=PARTS)) == [BOS, A, B]
    assert tokens(chat, tokenizer(), chat_template_kwargs={"chat_template": PARTS}) == [BOS, A, B]


def test_options_for_chats_where_none_comes(monkeypatch, caplog):
    """Of a stream it shows at the end, when all has been computed."""
    options = {"enable_thinking": False}
    with pytest.raises(ValueError, match="no prompt is a chat"):
        list(tokenize_prompts(["a"] * 3, tokenizer(), 97, options))
    monkeypatch.setattr(prompts, "WINDOW", 2)
    assert len(list(tokenize_prompts(["a"] * 3, tokenizer(), 97, options))) == 3
    assert "no prompt is a chat" in caplog.text


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_chat_is_what_its_template_says(adds):
    chat = [{"role": "user", "content": "a"}]
    assert tokens(chat, tokenizer(adds, CHAT)) == [BOS, A, B]


CHAT_OF_A = [{"role": "user", "content": "a"}]


def test_options_reach_the_chat_template():
    chat = tokenizer(chat_template=CHAT)
    assert tokens(CHAT_OF_A, chat, chat_template_kwargs={"enable_thinking": False}) == [
        BOS,
        A,
        B,
        B,
    ]
    options = {"add_generation_prompt": False}
    assert tokens(CHAT_OF_A, chat, chat_template_kwargs=options) == [BOS, A]
    assert tokens(CHAT_OF_A, tokenizer(), chat_template_kwargs={"chat_template": CHAT})[-1] == B


ANSWER = {"role": "assistant", "content": "a a"}


def test_an_answer_that_a_chat_ends_with_is_left_out(caplog):
    """After it the model would be asked what it says in a turn of its own."""
    words = tokenizer(chat_template=CHAT)
    talk = [*CHAT_OF_A, ANSWER, *CHAT_OF_A]
    for chat in (
        [*CHAT_OF_A, ANSWER],
        [*CHAT_OF_A, ANSWER, ANSWER],
        {"messages": [*CHAT_OF_A, ANSWER]},
    ):
        caplog.clear()
        assert tokens(chat, words) == tokens(CHAT_OF_A, words)
        assert "1 of 1 prompts are chats that end with an answer (number 0 first)" in caplog.text
    caplog.clear()
    assert tokens(talk, words) == [BOS, A, A, A, A, B]
    assert tokens([*talk, ANSWER], words, whole=True) == [BOS, A, A, A, A, A, A]
    assert tokens(talk, words, whole=True) == [BOS, A, A, A, A, B]
    for option in ("add_generation_prompt", "continue_final_message"):  # who names it has said so
        told = tokens([*CHAT_OF_A, ANSWER], words, chat_template_kwargs={option: True})
        assert told == [BOS, A, A, A, *[B] * (option == "add_generation_prompt")]
    assert not caplog.text
    with pytest.raises(ValueError, match="prompt 0 is a chat of an answer alone"):
        tokens([ANSWER], words)


def test_a_processor_stands_for_its_tokenizer():
    assert tokens("a", SimpleNamespace(tokenizer=tokenizer())) == [BOS, A]
    for template in (CHAT, {"default": CHAT, "tool_use": PARTS}):
        processor = SimpleNamespace(tokenizer=tokenizer(), chat_template=template)
        assert tokens(CHAT_OF_A, processor) == [BOS, A, B]
    processor.tokenizer = tokenizer(chat_template=CHAT)
    processor.chat_template = None
    assert tokens(CHAT_OF_A, processor) == [BOS, A, B]


@pytest.mark.parametrize("name", ["messages", "prompt", "text"])
def test_the_columns_that_datasets_have(name):
    record = {"id": 3, name: CHAT_OF_A if name == "messages" else "a"}
    want = tokens(record[name], tokenizer(chat_template=CHAT))
    assert tokens(record, tokenizer(chat_template=CHAT)) == want


def test_a_question_is_a_chat_or_a_text():
    question = Question("b a", ("a", "a", "b", "b"), 1)
    assert tokens(question, tokenizer()) == tokens(question.text(), tokenizer())
    words = tokenizer(chat_template=CHAT)
    assert tokens(question, words) == tokens(question.prompt(words), words)
    processor = SimpleNamespace(tokenizer=words, chat_template=None)
    assert tokens(question, processor) == tokens(question, words)


def test_token_ids_are_taken_as_they_are():
    ids = [BOS, BOS, A, EOS]
    assert tokens({"input_ids": ids}, None) == ids
    assert tokens({"input_ids": ids}, tokenizer("<s> $A </s>")) == ids


IDS = [[A, B, A, B], [A, B, A, B]]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": torch.tensor(IDS[0]), "answer": torch.tensor(2)},  # MMLU's
        {"input_ids": torch.tensor(IDS[0]), "scores": torch.tensor([0.5, 1.0])},
        {"input_ids": torch.tensor(IDS), "score": torch.tensor([0.5, 1.0])},  # of a DataLoader
        {"input_ids": torch.tensor(IDS[:1]), "token_type_ids": torch.zeros(1, 4, dtype=torch.long)},
    ],
)
def test_a_data_sets_other_columns_are_no_images(row):
    """They are tensors ``with_format("torch")``, and are passed over as without it."""
    for sequence in tokenize_prompts([row], None, 97):
        assert sequence.ids.tolist() == IDS[0]
        assert sequence.plain


@pytest.mark.parametrize("name", ["pixel_values", "input_features", "input_values"])
def test_a_processors_other_tensors_come_with_its_images(name):
    """MiniCPM's ``tgt_sizes`` says nothing of images by its name."""
    beside = {name: torch.ones(1, 3), "tgt_sizes": torch.tensor([[2, 2]])}
    (sequence,) = tokenize_prompts([{"input_ids": torch.tensor(IDS[:1]), **beside}], None, 97)
    assert sequence.media.keys() == beside.keys()


@pytest.mark.parametrize(
    "beside",
    [
        {"position_ids": [[0, 1, 2, 3]]},
        {"position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]]},
        {"attention_mask": [[1, 1, 1, 1]] * 2, "position_ids": None},
        {"attention_mask": torch.ones(2, 4, dtype=torch.bool)},
    ],
)
def test_ordinary_masks_and_positions(beside):
    got = tokenize_prompts([{"input_ids": IDS, **beside}], None, 97)
    assert [sequence.ids.tolist() for sequence in got] == IDS


def test_positions_of_padded_prompts():
    batch = {
        "input_ids": [[0, 0, A, B], [A, B, A, 0]],
        "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 0]],
        "position_ids": [[1, 1, 0, 1], [0, 1, 2, 1]],
    }
    got = tokenize_prompts([batch], None, 97)
    assert [sequence.ids.tolist() for sequence in got] == [[A, B], [A, B, A]]


WHOLE = torch.ones(2, 4)
REFUSED = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ({"input_ids": IDS, "position_ids": [[0, 1, 2, 3], [0, 1, 0, 1]]}, {}, ValueError,
         "prompt 2 do not count from 0 to 3: token 2 has position 0"),
        ({"input_ids": IDS[0], "position_ids": [5, 6, 7, 8]}, {}, ValueError,
         "prompt 1 do not count from 0 to 3: token 0 has position 5"),
        ({"input_ids": IDS, "position_ids": torch.zeros(3, 2, 4)}, {}, ValueError,
         r"position_ids \(3, 2, 4\) and input_ids \(2, 4\) of prompt 1"),
        ({"input_ids": IDS, "attention_mask": WHOLE[:, None]}, {}, ValueError,
         r"attention_mask \(2, 1, 4\) .* of prompt 1"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}, {}, ValueError,
         r"attention_mask \(2, 1, 4, 4\) .* of prompt 1"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [1, 1, 2, 2]]}, {}, ValueError,
         "mask of prompt 2 holds 2; 1 is a token"),
        ({"input_ids": IDS, "attention_mask": WHOLE - 1e9}, {}, ValueError, "of prompt 1 holds -"),
        ({"input_ids": [[A, B], [A]]}, {}, ValueError, "input_ids of prompt 1 is no tensor"),
        ({"input_ids": "a a"}, {}, ValueError, "input_ids of prompt 1 is no tensor"),
        (CHAT_OF_A, {"tokenizer": tokenizer()}, ValueError,
         "prompt 1 is a chat, but the tokenizer"),
        (CHAT_OF_A, {"tokenizer": tokenizer(chat_template=REFUSED)}, ValueError,
         "prompt 1 is refused by the chat template .*roles must alternate"),
        ("a", {}, TypeError, "prompt 1 is text, so a tokenizer is needed"),
        ("a", {"tokenizer": tokenizer().backend_tokenizer}, TypeError,
         "prompt 1 is text, and tokenizer= is a Tokenizer"),
        ("", {"tokenizer": tokenizer()}, ValueError, "prompt 1 is empty"),
        ("a", {"tokenizer": tokenizer(), "chat_template_kwargs": {"enable_thinking": False}},
         ValueError, "no prompt is a chat"),
        (CHAT_OF_A, {"chat_template_kwargs": {"return_tensors": "pt"}}, ValueError,
         "names return_tensors"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named(prompt, options, error, message):
    options = {"tokenizer": None} | options
    with pytest.raises(error, match=message):
        list(tokenize_prompts([{"input_ids": [A]}, prompt], vocab_size=97, **options))
