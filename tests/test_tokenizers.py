"""Tokens of a subject, whatever the tokenizer does to characters: several tokens of one, blanks, accents, BOS."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atom_lens import Prompt
from atom_lens.activations.positions import Positions, tokens_to_read
from atom_lens.interventions.facts import tokenised

CORPUS = ["Paris is a city", "東京 is in 日本", "👩‍👩‍👧 New York", "cafe\u0301 café  São", "def f():\n    return"]


def byte_level(
    trim: bool = True, blank: bool = False, bos: str | None = None, normalizer: Any = None
) -> PreTrainedTokenizerFast:
    """As GPT-2 (which trims no blanks off the offsets), or Llama 3 (which does)."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>"]  # its id is 0
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: lower case, no accents, no control characters."""
    pieces = ["[UNK]", "a", "cafe", "is", "sao", "paulo", "in"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def unigram() -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a blank before the text and with each word, compatibility characters composed."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁a", -2.0), ("▁caf", -2.0), ("é", -3.0), ("▁is", -2.0), ("fi", -3.0)]
    made = Tokenizer(models.Unigram([*pieces, ("n", -3.0), ("キ", -3.0), ("ロ", -3.0)], unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: blanks by the normaliser, and bytes for characters that are in no vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "i", "s", "▁is", "▁i"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "i"), ("▁i", "s")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def characters() -> PreTrainedTokenizerFast:
    """One token for each character, blanks included."""
    vocabulary = {c: i for i, c in enumerate(["?", *sorted(set("".join(CORPUS)))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def read(tokenizer: Any, prompt: Prompt, positions: Positions = "subject_last", max_tokens: int = 100) -> list[int]:
    (found,) = tokens_to_read(tokenizer, [prompt], positions, max_tokens=max_tokens)
    return found.tokens


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("blank", [True, False])
def test_byte_level_tokens_are_those_of_the_bytes(trim: bool, blank: bool) -> None:
    """Bytes counted one by one say which token stands for which characters: blanks too, which the offsets may lack."""
    tokenizer = byte_level(trim, blank)
    draw = random.Random(0)
    for _ in range(400):
        text = "".join(draw.choices("ab é東👩\u200d\u0301\n ", k=draw.randrange(1, 12)))
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        added = blank and not text.startswith(" ")
        # A blank put before the text belongs to its first character where offsets are not trimmed.
        of_byte = [i for i, token in enumerate(tokens) for _ in token][added and trim :]
        ends = [len(text[: i + 1].encode()) + (added and not trim) for i in range(len(text))]
        assert ends[-1] == len(of_byte)
        covers = [set(of_byte[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        everything = sorted(set().union(*covers))
        assert read(tokenizer, Prompt(text), "all") == everything
        assert read(tokenizer, Prompt(text), "last") == everything[-1:]
        start = draw.randrange(len(text))
        end = draw.randrange(start, len(text)) + 1
        if text[start:end].strip(" ") == text[start:end]:  # a blank beside a subject belongs to the next word's token
            expected = sorted(set().union(*covers[start:end]))
            prompt = Prompt(text, span=(start, end))
            assert read(tokenizer, prompt, "span") == expected
            assert read(tokenizer, prompt) == expected[-1:]


@pytest.mark.parametrize(
    ("make", "text", "subject", "expected"),
    [
        (word_piece, "a cafe\u0301 is", "cafe\u0301", 1),  # the accent is gone, and no token reaches the subject's end
        (word_piece, "a cafe\u0301", "cafe\u0301", 1),
        (word_piece, "São Paulo is", "São Paulo", 1),
        (unigram, "a cafe\u0301 is", "cafe\u0301", 2),
        (unigram, "is ﬁ", "ﬁ", 2),  # one character, two letters
        (unigram, "is ㌔ is", "㌔", 3),  # one character, two tokens
        (byte_fallback, "is 東 is", "東", 4),  # three tokens, of which the last is read
        (byte_fallback, "東京 is", "東", 3),
        (characters, "is 東京", "東京", 4),
        (characters, "東京 is", "東", 0),
        (lambda: byte_level(normalizer=normalizers.NFC()), "cafe\u0301", "cafe\u0301", -1),
        (lambda: byte_level(normalizer=normalizers.NFD()), "café", "café", -1),
    ],
)
def test_normalised_subjects(
    make: Callable[[], PreTrainedTokenizerFast], text: str, subject: str, expected: int
) -> None:
    tokenizer = make()
    n = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert read(tokenizer, Prompt(text, subject)) == [expected % n]


def test_a_subject_without_a_token() -> None:
    with pytest.raises(ValueError, match="no token covers the subject of 'a \\? is'"):
        read(word_piece(), Prompt("a \x7f is", "\x7f"))


def test_beginning_of_sequence_tokens() -> None:
    """Its id may be 0, there may be none, and a tokenizer may add it by itself: it is there once, or not."""
    prompt = Prompt("Paris is", "Paris")
    bare = byte_level()
    plain = bare("Paris is", add_special_tokens=False)["input_ids"]
    adding = byte_level(bos="<s>")
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert adding("Paris is")["input_ids"] == [0, *plain]
    for tokenizer, ids in ((bare, plain), (byte_level(bos="<s>"), [0, *plain]), (adding, [0, *plain])):
        (found,) = tokens_to_read(tokenizer, [prompt], "last", max_tokens=100)
        assert found.ids == ids and found.tokens == [len(ids) - 1]
        asked, wanted, chosen = tokenised(tokenizer, prompt, "a", "last", prepend_bos=True)
        assert (asked, chosen) == (ids, [len(ids) - 1])
        assert wanted == tokenizer("Paris is a", add_special_tokens=False)["input_ids"][len(plain) :]
    with pytest.raises(ValueError, match="the text of 'Paris is' lies beyond its first 1 tokens"):
        read(byte_level(bos="<s>"), prompt, "all", max_tokens=1)


def test_cuts_are_made_at_the_end() -> None:
    """Some tokenizers cut the beginning, if they are let."""
    tokenizer = characters()
    tokenizer.truncation_side = "left"
    (found,) = tokens_to_read(tokenizer, [Prompt("Paris is a city")], "all", max_tokens=5)
    assert tokenizer.convert_ids_to_tokens(found.ids) == list("Paris")
    with pytest.raises(ValueError, match="the last token of 'Paris is a city' lies beyond its first 5 tokens"):
        read(tokenizer, Prompt("Paris is a city"), "last", max_tokens=5)


@pytest.mark.parametrize("trim", [True, False])
def test_prompts_that_end_in_a_blank_keep_it(trim: bool) -> None:
    """It is the prompt's, not the answer's, whether or not the offsets have it."""
    tokenizer = byte_level(trim)
    ids, wanted, chosen = tokenised(tokenizer, Prompt("Paris is "), "Paris", "last", prepend_bos=True)
    assert tokenizer.decode(ids) == "Paris is " and tokenizer.decode(wanted) == " Paris" and chosen == [len(ids) - 1]
    alone, nothing, _ = tokenised(tokenizer, Prompt("Paris is "), "", "last", prepend_bos=True)
    assert alone == ids and nothing == []


def test_answers_that_are_one_with_their_prompt() -> None:
    """Their beginning would be given away."""
    tokenizer = characters()
    tokenizer.add_tokens(AddedToken("s a", normalized=False))
    with pytest.raises(ValueError, match="the answer 'a' has no tokens of its own after 'Paris is'"):
        tokenised(tokenizer, Prompt("Paris is"), "a", "last", prepend_bos=True)
