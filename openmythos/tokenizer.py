"""Byte-level tokenizers: text to token ids and back, without losing a byte.

Every id stands for a fixed string of bytes, so `decode(encode(text)) == text` for any text. A loss
summed over tokens can be divided by their bytes (bits per byte), which makes models with different
vocabularies comparable. Encoding never gives a special token, even for text that spells one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from openmythos.folder import write_json, write_whole

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
FILE_NAME = "tokenizer.json"
NAMES_FILE = "tokenizer_config.json"  # the file in which transformers names the special tokens
MIN_BPE_VOCAB = 256 + len(SPECIAL_TOKENS)

# GPT-4's pattern (cl100k) with two changes that suit a small vocabulary and Python code. Digits are
# grouped in at most two. A line break is joined with the indentation after it, without the last
# space, which belongs to the next word: "\n        return" can be two tokens instead of three.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[\r\n]+(?:[ \t]+(?=[ \t]|\z))?"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Training takes quadratic time in the length of a piece (a run of letters without a boundary), so
# longer pieces are cut there. Encoding takes linear time and cuts nothing.
MAX_TRAINING_PIECE = 256


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte value (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, next_free = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_free))
            next_free += 1
    return characters


class Tokenizer:
    """A byte-level BPE tokenizer with begin, end and padding tokens.

    Wraps a `tokenizers.Tokenizer`; make one with `byte_tokenizer`, `train_bpe` or `Tokenizer.load`.

    Args:
        backend: The byte-level tokenizer of the `tokenizers` library.
        bos_token: Text of the token that begins a document.
        eos_token: Text of the token that ends a document.
        pad_token: Text of the token that fills short rows.

    Raises:
        ValueError: A special token is not in the vocabulary, or the tokenizer is not byte-level.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str = BOS_TOKEN,
        eos_token: str = EOS_TOKEN,
        pad_token: str = PAD_TOKEN,
    ) -> None:
        self._backend = backend
        # Text that spells a special token must be encoded as ordinary text, because decoding skips
        # special tokens. The library does not save this setting, so it is set here every time.
        self._backend.encode_special_tokens = True
        self._config: dict[str, Any] = json.loads(backend.to_str())
        self._token_bytes = self._read_token_bytes()
        self._names = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self.bos_id = self._special_id(bos_token)
        self.eos_id = self._special_id(eos_token)
        self.pad_id = self._special_id(pad_token)
        sizes = np.array([len(token) for token in self._token_bytes], dtype=np.int64)
        sizes.setflags(write=False)
        self._token_num_bytes = sizes

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes)

    @property
    def token_num_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes of text that each token id stands for; 0 for special tokens. Read-only."""
        return self._token_num_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the ids of a text.

        That is the vocabulary, the merges, the normalizer, the splitting and the special tokens.
        """
        model = self._config["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        added = [[t["id"], t["content"], t["special"]] for t in self._config["added_tokens"]]
        parts = {
            "vocab": model["vocab"],
            "merges": merges,
            "added_tokens": added,
            "normalizer": self._config["normalizer"],
            "pre_tokenizer": self._config["pre_tokenizer"],
            "specials": [self.bos_id, self.eos_id, self.pad_id],
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens.

        Raises:
            ValueError: `text` holds a lone surrogate, which has no UTF-8 form.
        """
        _check_encodable(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; faster than a loop over `encode`.

        Raises:
            ValueError: A text holds a lone surrogate, which has no UTF-8 form.
        """
        for text in texts:
            _check_encodable(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are skipped and bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of `ids`; special tokens are skipped. A prefix may end inside a character.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        pieces = []
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {int(token_id)} is outside the vocabulary: ids go from 0 to "
                    f"{self.vocab_size - 1}"
                )
            pieces.append(self._token_bytes[token_id])
        return b"".join(pieces)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json`, in the `tokenizers` library's format, into `folder`.

        Returns its path. If the special tokens do not have our default names, their names are
        written to `tokenizer_config.json`. Each file is written atomically.
        """
        target = Path(folder) / FILE_NAME
        write_whole(target, self._backend.to_str(pretty=True))
        if tuple(self._names.values()) != SPECIAL_TOKENS:
            write_json(target.parent / NAMES_FILE, self._names)
        return target

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Read a byte-level `tokenizer.json`, given the file or the folder that holds it.

        The folder may be a checkpoint, prepared data, or a run: its newest checkpoint or its data.

        The names of the special tokens are the arguments; those not given are taken from
        `tokenizer_config.json` beside the file or, without that file, are our defaults.

        Args:
            path: The file or its folder.
            bos_token: Text of the begin token.
            eos_token: Text of the end token.
            pad_token: Text of the padding token; may be the same as another special token.

        Raises:
            ValueError: No such file, not a tokenizer, not byte-level, or a special token is
                missing.
        """
        file = _find_file(Path(path))
        if not file.is_file():
            raise ValueError(
                f"no tokenizer at {file}: give a {FILE_NAME} file or a folder that holds one"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text at byte {error.start}: not a tokenizer.json"
            ) from None
        except (
            Exception
        ) as error:  # the library raises bare Exception for a file that it cannot parse
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} is not a tokenizer.json that can be read: {reason}") from None
        given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        names = _special_names(file.parent / NAMES_FILE)
        return cls(backend, **{**names, **{key: name for key, name in given.items() if name}})

    def _special_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None or self._token_bytes[token_id]:
            names = [t["content"] for t in self._config["added_tokens"] if t["special"]]
            raise ValueError(
                f"the tokenizer has no special token {token!r}; it has {names}: "
                f"name them with bos_token=, eos_token=, pad_token="
            )
        return int(token_id)

    def _read_token_bytes(self) -> list[bytes]:
        decoder = self._config["decoder"] or {}
        kinds = [decoder.get("type")] + [part["type"] for part in decoder.get("decoders", [])]
        model = self._config["model"].get("type")
        if "ByteLevel" not in kinds or model != "BPE":
            raise ValueError(
                f"the tokenizer is not a byte-level BPE (model {model}, decoder "
                f"{decoder.get('type')}): give one that is, only it gives back every byte"
            )
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        added = {t["id"]: t for t in self._config["added_tokens"]}
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values()) + 1)
        for token, token_id in vocab.items():
            if token_id in added:
                table[token_id] = b"" if added[token_id]["special"] else token.encode()
            else:
                table[token_id] = bytes(byte_of[character] for character in token)
        return table


def _find_file(path: Path) -> Path:
    """The tokenizer.json of a folder, which may be missing; any other path as it is."""
    file = path / FILE_NAME
    if not path.is_dir() or file.is_file():
        return file if path.is_dir() else path
    for checkpoint in sorted(path.glob("checkpoints/step-????????"), reverse=True):
        if (checkpoint / FILE_NAME).is_file():
            return checkpoint / FILE_NAME
    for index in (path / "index.json", path / "data" / "index.json"):  # prepared data
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return index.parent / json.loads(index.read_text(encoding="utf-8"))["tokenizer_file"]
    return file


def _special_names(file: Path) -> dict[str, str]:
    """The special tokens named in transformers' file; its end token replaces those not named."""
    ours = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    if not file.is_file():
        return ours
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    found = {}
    for key in ours:
        token = data.get(key) if isinstance(data, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[key] = text
    return ours if "eos_token" not in found else dict.fromkeys(ours, found["eos_token"]) | found


def byte_tokenizer() -> Tokenizer:
    """A tokenizer without merges: special tokens have ids 0, 1, 2, and byte b has id 3 + b."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte, character in enumerate(_byte_characters()):
        vocab[character] = len(SPECIAL_TOKENS) + byte
    return Tokenizer(_backend(models.BPE(vocab=vocab, merges=[])))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: Training text; read once.
        vocab_size: Number of ids wanted, the 3 special tokens and the 256 bytes included. Short
            text gives fewer ids, because pairs seen only once are not merged; read the actual
            number from `Tokenizer.vocab_size`.

    Raises:
        ValueError: `vocab_size` is below 259, or there is no text.

    Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units"
    (1508.07909), section 3.2; on bytes as in Radford et al. 2019 (GPT-2), section 2.2.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need "
            f"at least {MIN_BPE_VOCAB}"
        )
    backend = _backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=_byte_characters(),
    )
    num_characters = 0

    def counted() -> Iterable[str]:
        nonlocal num_characters
        for text in texts:
            _check_encodable(text)
            num_characters += len(text)
            yield text

    ordinary = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            _split(SPLIT_PATTERN),
            _split(rf"[\s\S]{{1,{MAX_TRAINING_PIECE}}}"),
            _byte_level(),
        ]
    )
    backend.train_from_iterator(counted(), trainer)
    backend.pre_tokenizer = ordinary
    if num_characters == 0:
        raise ValueError(
            "no text to train a tokenizer on: give at least one text that is not empty"
        )
    return Tokenizer(backend)


def _backend(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_split(SPLIT_PATTERN), _byte_level()])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate ({text[error.start]!r} at character {error.start}), "
            f"which has no "
            f"UTF-8 form: read the text with errors='replace'"
        ) from None
