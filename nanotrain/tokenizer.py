"""Byte-level BPE on the `tokenizers` library: train, save, load, encode, decode, and the exact bytes of each token.

The saved `tokenizer.json` loads in any program that uses that library. Token 0 is BOS; 1 is PAD, which no
text gives and only an exported model uses; the 256 bytes follow, then the merges.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanotrain.errors import DataError, UserError
from nanotrain.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

BOS, PAD = "<|bos|>", "<|pad|>"
FILE_NAME = "tokenizer.json"
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 258, 2**24  # 258: BOS, PAD, all bytes

# Words with the sign or space before them, numbers in groups of one or two digits, runs of signs, line ends, spaces:
# the manner of GPT-4's split, with shorter numbers, which suit small vocabularies.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The byte-level alphabet of GPT-2: bytes that print are their own characters, the others those from U+0100 on.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTING}
_BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTING}))}


class BPETokenizer:
    """Text to token ids and back. Special tokens never come out of text: `<|bos|>` in one is seven characters."""

    def __init__(self, inner: Tokenizer, text: str | None = None):
        """inner: a byte-level one that knows BOS (else DataError). text: the file it was read from."""
        self.inner, self.text = inner, text
        self.inner.encode_special_tokens = True  # the file does not keep this
        self.bos = inner.token_to_id(BOS)
        if self.bos is None:
            raise DataError(f"the tokenizer has no {BOS} token")
        self.pad = inner.token_to_id(PAD)  # None in a tokenizer made elsewhere, or before it was reserved
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def train(cls, texts: Iterable[str] | Iterable[list[str]], vocab_size: int) -> "BPETokenizer":
        """Train on texts (or lists of texts). From too little text come fewer than `vocab_size` tokens."""
        if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(f"--vocab-size={vocab_size}: must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
        inner = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        inner.decoder = decoders.ByteLevel()
        settings = {"vocab_size": vocab_size, "special_tokens": [BOS, PAD], "show_progress": False}
        trainer = trainers.BpeTrainer(initial_alphabet=to_bytes.alphabet(), **settings)
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, folder: str | Path) -> "BPETokenizer":
        """The tokenizer saved in `folder`. Raises DataError if there is none or it cannot be read."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}: train one with python -m scripts.tok_train")
        try:
            text = path.read_text(encoding="utf-8")
            return cls(Tokenizer.from_str(text), text)
        except Exception as error:  # the library raises bare Exceptions
            fix = "move it away, and train one with python -m scripts.tok_train"
            raise DataError(f"{path} cannot be read ({error}): {fix}") from None

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder`, whole or not at all."""
        with atomic_file(Path(folder) / FILE_NAME) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of `tokenizer.json`: of a loaded one as it was read, whatever this version of the library writes."""
        return self.text or self.inner.to_str(pretty=True)

    def sha256(self) -> str:
        """The SHA-256 of `tokenizer.json`, in hex: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS. A lone surrogate becomes a question mark."""
        return self.inner.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS. On all cores, or in this thread if TOKENIZERS_PARALLELISM is false."""
        encodings = self.inner.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD, special tokens their own names."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def byte_strings(self) -> list[bytes]:
        """The UTF-8 bytes of each of the V tokens, exact for parts of characters too; b"" for special tokens."""
        special = self.inner.get_added_tokens_decoder()
        strings = ["" if token in special else self.inner.id_to_token(token) for token in range(self.vocab_size)]
        return [bytes(map(_BYTE_OF.__getitem__, string)) for string in strings]

    def token_bytes(self) -> "Tensor":
        """(V,) int64: the number of UTF-8 bytes each token stands for, 0 for special tokens."""
        import torch  # here, so that training a tokenizer does not wait for it

        return torch.tensor([len(string) for string in self.byte_strings()], dtype=torch.int64)


def _clean(text):
    return text.encode("utf-8", "replace").decode()
