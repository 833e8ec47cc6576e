"""The tokenizer: round trips, special tokens, exact bytes, the saved file, and what cannot be trained or loaded."""

import hashlib
import itertools
import json

import pytest
import tokenizers
import torch
from conftest import make_texts

from nanotrain.errors import DataError, UserError
from nanotrain.tokenizer import BPETokenizer

ODD_TEXTS = [
    "",
    "   leading, \r\n\t\n\n and trailing   ",
    "a\x00b\x7f\x1b[0m \ufeff\u200b\u2028\u00a0\u3000 \ufffd \U0010ffff",
    "don't I'LL we've 'tis; price: 12345.67 or 2024-01-31, ½ ² ٣٤ १२",
    "日本語のテキスト、漢字。🙂👩‍👩‍👧‍👦🇩🇪 über naïve e\u0301 n\u0303 שלום مرحبا \u202e reversed",
    "<|bos|><|bos|> <|bos|>x",
    "a" * 5000 + " " * 3000 + "é" * 999,
    "".join(chr(code) for code in range(0x20, 0x3000)),
]


def alphabet():
    """{character of the byte-level alphabet: byte}, as GPT-2 defined it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def bytes_of(tokenizer, token):
    """The bytes a token stands for, by the definition of the alphabet."""
    return bytes(map(alphabet().get, tokenizer.inner.id_to_token(token)))


@pytest.mark.parametrize("text", [*ODD_TEXTS, *make_texts(5, seed=3)])
def test_text_survives_the_round_trip_and_token_bytes_sum_to_its_length(tokenizer, tmp_path, text):
    tokenizer.save(tmp_path)
    loaded, ids = BPETokenizer.load(tmp_path), tokenizer.encode(text)
    assert loaded.encode(text) == ids
    assert tokenizer.encode_batch(["x", text]) == [tokenizer.encode("x"), ids]
    assert tokenizer.bos not in ids, "its literal name is text"
    for tried in (tokenizer, loaded):
        assert tried.decode(ids) == text
        assert tried.token_bytes()[ids].sum().item() == len(text.encode())
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (plain.encode(text).ids == ids) == ("<|bos|>" not in text), "the plain library reads the name as the token"
    assert plain.decode(ids) == text


def test_token_bytes_are_those_of_the_alphabet_and_bos_has_none(tokenizer):
    expected = [b"", b"", *(bytes_of(tokenizer, token) for token in range(2, 320))]
    assert (tokenizer.bos, tokenizer.pad, tokenizer.vocab_size) == (0, 1, 320)
    assert tokenizer.byte_strings() == expected
    assert torch.equal(tokenizer.token_bytes(), torch.tensor([len(of_token) for of_token in expected]))
    assert set(expected) >= {bytes([byte]) for byte in range(256)}


def test_what_is_not_unicode_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode(tokenizer.encode("🦑")[:1]) == "\ufffd"


def test_ids_are_the_merges_applied_by_rank(tokenizer):
    saved = json.loads(tokenizer.to_json())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(saved["merges"])}
    to_character = {byte: character for character, byte in alphabet().items()}

    def merged(word):
        parts = [to_character[byte] for byte in word.encode()]
        while pairs := [(ranks[pair], n) for n, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            _, n = min(pairs)
            parts[n : n + 2] = ["".join(parts[n : n + 2])]
        return [saved["vocab"][part] for part in parts]

    # split by hand: words with the space before them, one or two digits, signs with line ends, spaces but the last
    words = ["river", " stone", " ", "12", "3", " walks", ",", " under", "!\n", "never", "  ", " über"]
    assert tokenizer.encode("".join(words)) == [token for word in words for token in merged(word)]


def test_training_twice_gives_the_same_file(tokenizer):
    in_lists = BPETokenizer.train(iter([make_texts(50)[:20], make_texts(50)[20:]]), 320)
    assert in_lists.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("size", [0, 256, 2**70])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(UserError, match=f"--vocab-size={size}: must be from 258"):
        BPETokenizer.train(["text"], size)


def test_too_little_text_gives_fewer_tokens_but_always_the_bytes():
    tokenizer = BPETokenizer.train(["abab abab"], 1000)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes()) == 261
    assert tokenizer.decode(tokenizer.encode("日 text")) == "日 text"


@pytest.mark.parametrize(
    ("says", "harm"),
    [
        ("no tokenizer at", lambda path: path.unlink()),
        ("cannot be read", lambda path: path.write_bytes(path.read_bytes()[:1000])),
        (r"has no <\|bos\|> token", lambda path: tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_a_data_error_with_the_command(tokenizer, tmp_path, says, harm):
    tokenizer.save(tmp_path)
    harm(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=f"{says}.*python -m scripts.tok_train"):
        BPETokenizer.load(tmp_path)


def test_save_replaces_the_file_and_leaves_nothing_else(tokenizer, tmp_path):
    BPETokenizer.train(["other"], 300).save(tmp_path / "a" / "b")
    tokenizer.save(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["tokenizer.json"]
    loaded, text = BPETokenizer.load(tmp_path / "a" / "b"), (tmp_path / "a" / "b" / "tokenizer.json").read_bytes()
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.sha256() == tokenizer.sha256() == hashlib.sha256(text).hexdigest()
