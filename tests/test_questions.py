from __future__ import annotations

import csv
import json
import sys
import types
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loki_kernels import load_questions, read_questions
from loki_kernels.questions import PromptStream, Question, text_of

few = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
questions = st.lists(
    st.builds(
        Question,
        question=text.filter(str.strip),
        choices=st.tuples(text, text, text, text),
        answer=st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)
GOOD = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}


def words(question: str) -> str:
    return " ".join(question.split()).casefold()


# the bundled set


def test_five_of_each_subject():
    counts = Counter(q.subject for q in load_questions())
    assert len(counts) == 57
    assert set(counts.values()) == {5}


def test_subjects_are_mmlu_s_in_order(shared_data):
    files = sorted((shared_data / "mmlu" / "test").glob("*.csv"))
    names = [file.stem.removesuffix("_test") for file in files]
    assert list(dict.fromkeys(q.subject for q in load_questions())) == names


def test_questions_are_distinct():
    found = Counter(words(q.question) for q in load_questions())
    assert found.most_common(1)[0][1] == 1


def test_choices_are_four_distinct_texts():
    for q in load_questions():
        assert len({words(choice) for choice in q.choices}) == 4, q
        assert all(choice.strip() for choice in q.choices), q


def test_answer_positions_are_balanced():
    answers = Counter(q.answer for q in load_questions())
    assert sorted(answers) == [0, 1, 2, 3]
    assert all(0.2 <= n / 285 <= 0.3 for n in answers.values()), answers


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_slices_are_disjoint_and_complete(first):
    a, b = load_questions(first), load_questions(5 - first, skip=first)
    assert Counter(q.subject for q in a) == Counter({q.subject: first for q in a})
    assert len(a) == 57 * first
    assert set(a).isdisjoint(b)
    assert set(a) | set(b) == set(load_questions())
    assert load_questions(skip=first) == b


def test_slices_keep_the_order():
    everything = load_questions()
    assert load_questions(1, skip=2) == everything[2::5]
    assert load_questions(5) == everything


@pytest.mark.parametrize(
    ("per_subject", "skip"), [(6, 0), (0, 0), (-1, 0), (1, 5), (3, 3), (None, 5), (1, -1)]
)
def test_more_than_there_are_raises(per_subject, skip):
    with pytest.raises(ValueError, match="each subject has 5 questions"):
        load_questions(per_subject, skip=skip)


# one question


def test_text_is_mmlu_s_format():
    question = Question("2 + 2?", ("3", "4", "5", "6"), 1)
    assert question.text() == "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"


@pytest.mark.parametrize("tokenizer", [object(), SimpleNamespace(chat_template=None)])
def test_prompt_without_chat_template_is_text(tokenizer):
    question = Question("2 + 2?", ("3", "4", "5", "6"), 1)
    assert question.prompt(tokenizer) == question.text()


def test_prompt_with_chat_template_is_a_chat():
    question = Question("2 + 2?", ("3", "4", "5", "6"), 1)
    chat = question.prompt(SimpleNamespace(chat_template="{{ messages }}"))
    assert chat == [{"role": "user", "content": question.text()}]


# files


@few
@given(questions)
def test_csv_round_trip(tmp_path, questions):
    path = tmp_path / "q.csv"
    # with a mark, as Excel writes it: else a first question that begins with one would lose it
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([q.question, *q.choices, "ABCD"[q.answer]] for q in questions)
    assert read_questions(path) == questions


@few
@given(questions, st.booleans(), st.booleans())
def test_jsonl_round_trip(tmp_path, questions, letters, ascii_only):
    path = tmp_path / "q.jsonl"
    with open(path, "w", encoding="utf-8", newline="") as file:
        for q in questions:
            row = {
                "question": q.question,
                "choices": q.choices,
                "answer": "ABCD"[q.answer] if letters else q.answer,
            }
            file.write(json.dumps(row, ensure_ascii=ascii_only) + "\n\n")
    assert read_questions(str(path)) == questions


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("q.csv", '"Which, then?",a,b,c,d,B\n'),
        ("q.jsonl", '{"question": "Which, then?", "choices": ["a", "b", "c", "d"], "answer": 1}\n'),
    ],
)
def test_a_byte_order_mark_is_not_read(tmp_path, name, row):
    path = tmp_path / name
    path.write_text(row, encoding="utf-8-sig")
    assert read_questions(path) == [Question("Which, then?", ("a", "b", "c", "d"), 1)]


def test_jsonl_keeps_the_subject(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD | {"subject": "law"}))
    assert [q.subject for q in read_questions(path)] == ["law"]


@pytest.mark.parametrize(
    "row",
    [
        "a,b,c,d,A",
        "q,a,b,c,d,A,B",
        "",
        "q",
        ",a,b,c,d,A",
        "  ,a,b,c,d,A",
        "q,a,b,c,d,E",
        "q,a,b,c,d,a",
        "q,a,b,c,d,AB",
        "q,a,b,c,d,",
        "q,a,b,c,d,0",
        pytest.param('"' + "a" * 200_000 + '",a,b,c,d,A', id="field_over_the_csv_limit"),
    ],
)
def test_malformed_csv_row_names_its_line(tmp_path, row):
    path = tmp_path / "q.csv"
    path.write_text(f"q,a,b,c,d,A\nq,a,b,c,d, B \n{row}\nq,a,b,c,d,C\n")
    with pytest.raises(ValueError, match=r"q\.csv, line 3\b"):
        read_questions(path)


@pytest.mark.parametrize(
    "row",
    [
        "not json",
        '{"question": "q"',
        "[]",
        "3",
        "null",
        "{}",
        *(
            json.dumps(GOOD | change)
            for change in (
                {"question": ""},
                {"question": " "},
                {"question": 3},
                {"question": None},
                {"choices": ["a", "b", "c"]},
                {"choices": ["a", "b", "c", "d", "e"]},
                {"choices": ["a", "b", "c", 4]},
                {"choices": "abcd"},
                {"choices": None},
                {"answer": 4},
                {"answer": -1},
                {"answer": 1.0},
                {"answer": True},
                {"answer": "E"},
                {"answer": "AB"},
                {"answer": ""},
                {"answer": "0"},
                {"answer": None},
                {"answer": [0]},
            )
        ),
        pytest.param("[" * 100_000, id="deeply_nested"),
        pytest.param('{"answer": ' + "1" * 5000 + "}", id="integer_over_python_s_limit"),
    ],
)
def test_malformed_jsonl_row_names_its_line(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{row}\n{json.dumps(GOOD)}\n")
    with pytest.raises(ValueError, match=r"q\.jsonl, line 3\b"):
        read_questions(path)


@few
@given(st.sampled_from(["q.csv", "q.jsonl"]), st.binary() | st.text().map(str.encode))
def test_any_content_is_questions_or_value_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        found = read_questions(path)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert found
        assert all(
            q.question.strip() and len(q.choices) == 4 and q.answer in range(4) for q in found
        )


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_empty_file_raises(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / name)


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_not_utf8_raises(tmp_path, name):
    (tmp_path / name).write_bytes(b"caf\xe9,a,b,c,d,A\n")
    with pytest.raises(ValueError, match=r"q\.\w+ is not UTF-8"):
        read_questions(tmp_path / name)


@pytest.mark.parametrize("name", ["q.json", "q.txt", "q"])
def test_other_suffix_raises(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        read_questions(tmp_path / name)


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_missing_file_raises(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / name)


# datasets


def fake_datasets(monkeypatch, rows):
    module = types.ModuleType("datasets")
    calls = []
    module.load_dataset = lambda *args, **options: (calls.append((args, options)), rows)[1]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_dataset_rows_are_questions(monkeypatch):
    calls = fake_datasets(monkeypatch, [GOOD | {"answer": 2, "subject": "law"}])
    want = [Question("q", ("a", "b", "c", "d"), 2, "law")]
    assert list(PromptStream.of_dataset("cais/mmlu:all", split="dev")) == want
    assert calls == [(("cais/mmlu", "all"), {"split": "dev"})]


def test_dataset_of_other_rows_raises(monkeypatch):
    fake_datasets(monkeypatch, [GOOD, {"words": "q"}])
    with pytest.raises(ValueError, match="some/set, record 1 has no question"):
        PromptStream.of_dataset("some/set")
    fake_datasets(monkeypatch, [])
    with pytest.raises(ValueError, match="some/set has no record in its split 'test'"):
        PromptStream.of_dataset("some/set")


def test_a_null_column_is_none(monkeypatch):
    """As `datasets` makes it of records that do not all have one."""
    rows = [{"messages": None, "prompt": "p"}, {"messages": None, "prompt": None, "text": "t"}]
    fake_datasets(monkeypatch, rows)
    assert [text_of(record) for record in PromptStream.of_dataset("some/set")] == ["p", "t"]


def test_a_folder_with_a_colon_is_a_folder(monkeypatch, tmp_path):
    (tmp_path / "c:data").mkdir()
    calls = fake_datasets(monkeypatch, [GOOD])
    PromptStream.of_dataset(str(tmp_path / "c:data"))
    assert calls == [((str(tmp_path / "c:data"), None), {"split": "test"})]


def test_dataset_without_the_extra_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"loki-kernels\[datasets\]"):
        PromptStream.of_dataset("cais/mmlu")


# MMLU itself


def test_every_mmlu_file_parses(shared_data):
    files = sorted((shared_data / "mmlu" / "test").glob("*.csv"))
    assert len(files) == 57
    for path in files:
        found = read_questions(path)
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert [[q.question, *q.choices, "ABCD"[q.answer]] for q in found] == rows


def test_no_bundled_question_is_in_mmlu(shared_data):
    paths = [p for split in ("test", "dev") for p in (shared_data / "mmlu" / split).glob("*.csv")]
    assert len(paths) >= 57
    mmlu = {words(q.question) for path in paths for q in read_questions(path)}
    assert not [q for q in load_questions() if words(q.question) in mmlu]


def test_a_dataset_of_a_folder(tmp_path):
    rows = [
        {"question": f"Is it {i}?", "choices": ["a", "b", "c", "d"], "answer": i, "subject": "x"}
        for i in range(4)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = list(PromptStream.of_dataset(str(tmp_path)))
    assert [q.answer for q in questions] == [0, 1, 2, 3]
    assert questions[2] == Question("Is it 2?", ("a", "b", "c", "d"), 2, "x")
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0] | {"choices": ["a"]}) + "\n")
    with pytest.raises(ValueError, match="record 0 must have four choices"):
        PromptStream.of_dataset(str(tmp_path))
