"""Byte-level BPE built on the `tokenizers` library, with the exact bytes of each token.

The saved `tokenizer.json` loads in any program that uses that library. Token 0 is BOS, token 1 is PAD (for exported
models only), followed by the 256 bytes and the merges. Text never encodes to BOS or PAD.
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

# Words with the space or symbol before them, one or two digits, runs of symbols, line ends, spaces: GPT-4's split, but
# with shorter numbers, which suit small vocabularies.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# GPT-2's byte-level alphabet: printable bytes map to themselves, the others to U+0100 and up.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTING}
_BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTING}))}


class BPETokenizer:
    """Convert text to token ids and back. Special tokens in text are plain text: `<|bos|>` is seven characters."""

    def __init__(self, inner: Tokenizer, text: str | None = None):
        """inner: a byte-level tokenizer with a BOS token (else DataError). text: contents of the file it came from."""
        self.inner, self.text = inner, text
        self.inner.encode_special_tokens = True  # not saved in the file
        self.bos = inner.token_to_id(BOS)
        if self.bos is None:
            raise DataError(f"the tokenizer has no {BOS} token")
        self.pad = inner.token_to_id(PAD)  # None in older tokenizers and those of other programs
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def train(cls, texts: Iterable[str] | Iterable[list[str]], vocab_size: int) -> "BPETokenizer":
        """Train on texts or lists of texts; too little text gives fewer tokens. Raises UserError for a bad size."""
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
        """Load the tokenizer in `folder`. Raises DataError if it is missing or unreadable."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}: train one with python -m scripts.tok_train")
        try:
            text = path.read_text(encoding="utf-8")
            return cls(Tokenizer.from_str(text), text)
        except Exception as error:  # the library raises bare Exceptions
            fix = "move it away and train one with python -m scripts.tok_train"
            raise DataError(f"{path} cannot be read ({error}): {fix}") from None

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder` atomically."""
        with atomic_file(Path(folder) / FILE_NAME) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Contents of `tokenizer.json`; for a loaded tokenizer, exactly as read, whatever the library version."""
        return self.text or self.inner.to_str(pretty=True)

    def sha256(self) -> str:
        """Hex SHA-256 of `tokenizer.json`. Tokenizers with equal hashes give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS. A lone surrogate becomes a question mark."""
        return self.inner.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS. Uses all cores unless TOKENIZERS_PARALLELISM is false."""
        encodings = self.inner.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Invalid UTF-8 becomes U+FFFD; special tokens become their names."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def byte_strings(self) -> list[bytes]:
        """Exact bytes of each of the V tokens, which may be part of a UTF-8 character; b"" for special tokens."""
        special = self.inner.get_added_tokens_decoder()
        strings = ["" if token in special else self.inner.id_to_token(token) for token in range(self.vocab_size)]
        return [bytes(map(_BYTE_OF.__getitem__, string)) for string in strings]

    def token_bytes(self) -> "Tensor":
        """(V,) int64: number of bytes of each token, 0 for special tokens."""
        import torch  # slow, and not needed to train a tokenizer

        return torch.tensor([len(string) for string in self.byte_strings()], dtype=torch.int64)


def _clean(text):
    return text.encode("utf-8", "replace").decode()
