"""Tokenizers of a few words, whose ids the tiny models of `tests.models` know."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

BOS, EOS, A, B = 1, 2, 3, 4
# A generation prompt that an option changes, as enable_thinking does.
CHAT = (
    "<s>{% for m in messages %} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %} b{% if enable_thinking is false %} b{% endif %}{% endif %}"
)


def word_tokenizer():
    vocabulary = {f"w{i}": i for i in range(97)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w5"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}"
    return tokenizer


def bos_tokenizer():
    """``<s>``, of id 1, before every text."""
    vocabulary = {"<s>": 1} | {f"w{i}": i for i in range(97) if i != 1}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w5"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def chat_tokenizer():
    vocabulary = {f"w{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w5")),
        eos_token="w2",
        bos_token="w1",
    )
    tokenizer.chat_template = "w7{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def tokenizer(adds="<s> $A", chat_template=None):
    """Words a and b; ``adds`` is what it puts around text by itself."""
    words = Tokenizer(WordLevel({"[UNK]": 0, "<s>": BOS, "</s>": EOS, "a": A, "b": B}, "[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        chat_template=chat_template,
    )
