"""The two tasks that are learned: function calling (BFCL) and reranking (Cranfield)."""

from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loki_kernels.demo.evaluation import labelled_logits, token_log_probabilities
from loki_kernels.demo.training import Encoded, encode_answer

from ..records import read_lines
from . import metrics
from .precision import autocast

# Part of every piece's spec: to be raised with whatever changes a task's examples or figures.
VERSIONS = {"function_calling": 1, "reranking": 1}
# What chooses a learning rate on the validation fold. A call's loss, since exact matches come in
# hundredths; not a ranking's, which is lowest for a model that answers with the answers' shares.
JUDGED_BY = {"function_calling": "loss", "reranking": "ndcg@10"}
# One fold chooses the learning rates, each of the others tests one seed.
FOLDS = 4
_LONGEST = 256  # tokens; longer examples are left out
_CANDIDATES = 20


@dataclass(frozen=True)
class Task:
    """One split of a task; ``train`` is in the order in which it is learned."""

    train: list[Encoded]
    validation: list[Any]
    test: list[Any]
    metrics: Callable[[nn.Module, list[Any]], dict[str, float]]

    def score(self, model: nn.Module, fold: list[Any]) -> dict[str, float]:
        with autocast():
            return self.metrics(model, fold)


def load_task(name: str, data: Path, tokenizer: Any, seed: int, records: int) -> Task:
    """The split of ``seed`` (0 to 2), which decides the test fold and the order of training.

    At most ``records`` of the validation and of the test fold, calls or queries.
    """
    load = {"function_calling": _function_calling, "reranking": _reranking}[name]
    task = load(data, tokenizer, seed)
    return replace(task, validation=task.validation[:records], test=task.test[:records])


def _encode(tokenizer: Any, system: str, user: str, answer: str) -> Encoded:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return encode_answer(messages, answer, tokenizer)


def make_folds(groups: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """``count`` folds of nearly the same size; what is in one group stays together."""
    folds: list[list[int]] = [[] for _ in range(count)]
    for group in groups:
        min(folds, key=len).extend(group)
    return folds


def group_by_length(records: Sequence[Encoded], batch_size: int, seed: int) -> list[Encoded]:
    """The same records, so that the members of a batch need little padding.

    Of 8 batches at a time the records are sorted by length and the batches shuffled.
    """
    generator = random.Random(seed)
    ordered: list[Encoded] = []
    for start in range(0, len(records), 8 * batch_size):
        chunk = sorted(records[start : start + 8 * batch_size], key=lambda r: len(r["input_ids"]))
        batches = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        generator.shuffle(batches)
        ordered += [record for batch in batches for record in batch]
    return ordered


# Function calling


@dataclass(frozen=True)
class Call:
    """One request of BFCL with the functions on offer and the first accepted call."""

    functions: tuple[str, ...]
    system: str
    request: str
    call: str


def read_calls(data: Path, category: str) -> list[Call]:
    """A BFCL category; of each argument the first accepted value, optional ones left out."""
    folder = data / "toolcall" / "bfcl"
    calls = []
    for question, answer in zip(
        read_lines(folder / f"BFCL_v4_{category}.json"),
        read_lines(folder / "possible_answer" / f"BFCL_v4_{category}.json"),
        strict=True,
    ):
        assert question["id"] == answer["id"]
        ((name, arguments),) = answer["ground_truth"][0].items()
        call = {"name": name, "arguments": _first_values(arguments)}
        offered = [
            {key: function[key] for key in ("name", "description", "parameters")}
            for function in question["function"]
        ]
        calls.append(
            Call(
                functions=tuple(function["name"] for function in offered),
                system="Answer with one JSON call of one of these functions and nothing else.\n"
                + "\n".join(json.dumps(function) for function in offered),
                request="\n".join(turn["content"] for turn in question["question"][0]),
                call=json.dumps(call),
            )
        )
    return calls


def _first_values(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return _first_values(value) if isinstance(value, dict) else value

    return {
        key: plain(accepted[0])
        for key, accepted in arguments.items()
        if accepted and "" not in accepted
    }


def _plain_name(function: str) -> str:
    """``calculate_BMI`` and ``calculate.bmi`` are one function."""
    return re.sub(r"[^a-z0-9]", "", function.lower())


def _function_calling(data: Path, tokenizer: Any, seed: int) -> Task:
    simple = read_calls(data, "simple_python")
    by_function: dict[str, list[int]] = {}
    for i, call in enumerate(simple):
        by_function.setdefault(_plain_name(call.functions[0]), []).append(i)
    groups = list(by_function.values())
    random.Random(0).shuffle(groups)
    folds = make_folds(groups, FOLDS)
    held_out = {
        _plain_name(simple[i].functions[0]) for fold in (folds[0], folds[1 + seed]) for i in fold
    }
    pool = [
        call
        for call in simple + read_calls(data, "multiple") + read_calls(data, "live_simple")
        if not held_out & set(map(_plain_name, call.functions))
    ]
    random.Random(seed).shuffle(pool)

    def encode(calls: Sequence[Call]) -> list[Encoded]:
        return [
            _encode(tokenizer, call.system, call.request, call.call + tokenizer.eos_token)
            for call in calls
        ]

    train = [record for record in encode(pool) if len(record["input_ids"]) <= _LONGEST]
    validation, test = (encode([simple[i] for i in folds[n]]) for n in (0, 1 + seed))
    return Task(train, validation, test, _score_calls)


def _score_calls(model: nn.Module, records: list[Encoded]) -> dict[str, float]:
    tokens = token_log_probabilities(model, records, 8)
    return {
        "loss": metrics.token_loss([log_p for log_p, _ in tokens]),
        "exact": metrics.exact_match([best for _, best in tokens]),
    }


# Reranking


@dataclass(frozen=True)
class Ranking:
    """A query's candidates. Each record ends with its right answer, a digit from 1 to 7."""

    records: list[Encoded]
    relevance: list[int]
    digits: list[int]  # their token ids


def read_cranfield(data: Path) -> tuple[dict[int, str], list[str], list[dict[int, int]]]:
    """(document number -> title and start of the abstract, queries, their judgements).

    The judgements number the queries by their place in the file, not by their ``num``. Here they
    are binary but for one line: 1 is relevant, 0 judged and not relevant.
    """
    folder = data / "rerank" / "cranfield"
    text = (folder / "cran.all.1400.xml").read_text(encoding="utf-8")
    documents = {}
    for number, title, body in re.findall(
        r"<docno>(\d+)</docno>\s*<title>(.*?)</title>.*?<text>(.*?)</text>", text, re.DOTALL
    ):
        title, body = (" ".join(part.split()) for part in (title, body))
        words = body.removeprefix(title).split()[:30]
        documents[int(number)] = f"{title} {' '.join(words)}"
    root = ElementTree.parse(folder / "cran.qry.xml").getroot()
    queries = [" ".join((top.findtext("title") or "").split()) for top in root.iter("top")]
    judged: list[dict[int, int]] = [{} for _ in queries]
    for line in (folder / "cranqrel.trec.txt").read_text(encoding="utf-8").splitlines():
        query, _, document, grade = line.split()
        if int(document) in documents:
            judged[int(query) - 1][int(document)] = min(int(grade), 1)
    return documents, queries, judged


def choose_candidates(queries: Sequence[str], documents: dict[int, str]) -> list[list[int]]:
    """For each query the 20 documents with the rarest words in common, the most alike first.

    They are chosen without regard to relevance: were relevant ones added, having few words in
    common would give them away.
    """
    words = {number: set(text.split()) for number, text in documents.items()}
    frequency = Counter(word for text in words.values() for word in text)

    def candidates(query: set[str]) -> list[int]:
        def likeness(number: int) -> float:
            shared = sorted(query & words[number])
            return sum(math.log(len(words) / frequency[word]) for word in shared)

        return sorted(words, key=lambda number: (-likeness(number), number))[:_CANDIDATES]

    return [candidates(set(query.split())) for query in queries]


def _reranking(data: Path, tokenizer: Any, seed: int) -> Task:
    """Learned from as many candidates that are not relevant as are, told apart among all."""
    documents, queries, judged = read_cranfield(data)
    candidates = choose_candidates(queries, documents)
    order = [i for i in range(len(queries)) if any(judged[i].get(n) for n in candidates[i])]
    random.Random(0).shuffle(order)
    folds = make_folds([[i] for i in order], FOLDS)
    digits = [tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(1, 8)]
    system = (
        "How relevant is the document to the query? Answer with a number from 1 (not at all) to 7."
    )

    def ranking(i: int) -> Ranking:
        numbers = candidates[i]
        relevance = [judged[i].get(number, 0) for number in numbers]
        records = [
            _encode(
                tokenizer,
                system,
                f"Query: {queries[i]}\nDocument: {documents[number]}",
                "7" if grade else "1",
            )
            for number, grade in zip(numbers, relevance, strict=True)
        ]
        return Ranking(records, relevance, digits)

    held_out = {*folds[0], *folds[1 + seed]}
    generator, train = random.Random(seed), []
    for i in (i for i in order if i not in held_out):
        learned = ranking(i)
        by_grade: tuple[list[Encoded], list[Encoded]] = [], []
        for record, grade in zip(learned.records, learned.relevance, strict=True):
            by_grade[grade].append(record)
        others, relevant = by_grade
        train += relevant + generator.sample(others, min(len(others), len(relevant)))
    generator.shuffle(train)
    validation, test = ([ranking(i) for i in folds[n]] for n in (0, 1 + seed))
    return Task(train, validation, test, _score_rankings)


@torch.no_grad()
def _score_rankings(model: nn.Module, rankings: list[Ranking]) -> dict[str, float]:
    """A candidate's score is the mean of the digits under the model's probabilities of them."""
    losses, gains = [], []
    for ranking in rankings:
        logits, labels = labelled_logits(model, ranking.records)
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1)
        losses.append(-log_p.gather(1, labels[kept][:, None]).squeeze(1))
        means = log_p[:, ranking.digits].softmax(-1) @ torch.arange(1.0, 8.0, device=log_p.device)
        gains.append(metrics.ndcg(means.tolist(), ranking.relevance, 10))
    return {"loss": float(torch.cat(losses).mean()), "ndcg@10": sum(gains) / len(gains)}
