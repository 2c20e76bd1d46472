"""Byte-level tokenizers: text to token ids and back, without losing a byte.

Every id stands for a fixed string of bytes, so `decode(encode(text)) == text` for any text. A loss
summed over tokens can be divided by their bytes (bits per byte), which makes models with different
vocabularies comparable. A file of another project can promise less: see `Tokenizer.change`.
Encoding gives special tokens, even for text that spells one, only where they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from openmythos.byte_level import PROBES, byte_characters, check_byte_level, mark_begin
from openmythos.chat_template import Message, render_answers, render_chat
from openmythos.folder import write_json, write_whole
from openmythos.tokenizer_folder import (
    GENERATION_FILE,
    SETTINGS_FILE,
    SPECIAL_NAMES,
    TOKENIZER_FILE,
    Facts,
    add_missing,
    default_template,
    end_ids,
    find_file,
    read_backend,
    read_facts,
    read_file,
    special_names,
)

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
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


class Tokenizer:
    """A byte-level BPE tokenizer with begin, end and padding tokens.

    Wraps a `tokenizers.Tokenizer`; make one with `byte_tokenizer`, `train_bpe` or `Tokenizer.load`.

    Args:
        backend: The byte-level tokenizer of the `tokenizers` library.
        bos_token: Text of the token that begins a document.
        eos_token: Text of the token that ends a document.
        pad_token: Text of the token that fills short rows.
        facts: What else its folder says, which `save` writes again.

    Attributes:
        bos_id: Id of the token that begins a document in training.
        eos_id: Id of the token that ends a document in training.
        pad_id: Id of the token that fills short rows.
        names: Text of these three tokens by transformers' names, such as `eos_token`.
        begin_ids: Ids that the tokenizer puts before a text that is to be continued; may be empty.
        end_ids: Every id that ends a generated text, `eos_id` among them.
        chat_template: The Jinja2 template of conversations, if there is one.

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
        facts: Facts | None = None,
    ) -> None:
        self._backend = backend
        self.names = dict(zip(SPECIAL_NAMES, (bos_token, eos_token, pad_token), strict=True))
        ours = tuple(self.names.values()) == SPECIAL_TOKENS
        self._facts = Facts(settings={} if ours else self.names) if facts is None else facts
        self._prepare_backend()
        self._config = check_byte_level(backend)
        self._token_bytes = self._read_token_bytes()
        self.bos_id = self._special_id(bos_token)
        self.eos_id = self._special_id(eos_token)
        self.pad_id = self._special_id(pad_token)
        self.begin_ids = self._read_begin_ids()
        # An id without a token has no text and is never generated.
        known = {i for i in end_ids(self._facts) if 0 <= i < self.vocab_size}
        self.end_ids = frozenset({self.eos_id, *known})
        self.chat_template = default_template(self._facts.settings.get("chat_template"))
        sizes = np.array([len(token) for token in self._token_bytes], dtype=np.int64)
        sizes.setflags(write=False)
        self._token_num_bytes = sizes

    def _prepare_backend(self) -> None:
        """Undo what is no property of a tokenizer, and apply what stands beside its file."""
        backend = self._backend
        # Text that spells a special token must be encoded as ordinary text, because decoding skips
        # special tokens. The library does not save this setting, so it is set here every time.
        backend.encode_special_tokens = True
        backend.no_truncation()  # what the program that saved the file last asked for
        backend.no_padding()
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        for name in {*self.names.values()} - special:
            if backend.token_to_id(name) is not None:
                backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        ours = tuple(self.names.values()) == SPECIAL_TOKENS
        if ours and backend.post_processor is None:  # a file of our first versions
            mark_begin(backend, BOS_TOKEN)

    def marking_begin(self) -> Tokenizer:
        """This tokenizer with the begin token before every text, as training documents have it."""
        if self.begin_ids:
            return self
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        mark_begin(backend, self.names["bos_token"])
        return Tokenizer(backend, **self.names, facts=self._facts)

    def _read_begin_ids(self) -> tuple[int, ...]:
        bare = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        return tuple(whole[: whole.index(bare[0])]) if bare else ()

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

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; those of special tokens only with `special`, where it spells them.

        Raises:
            ValueError: `text` holds a lone surrogate, which has no UTF-8 form.
        """
        _check_encodable(text)
        if special:
            return self._encode_marked(text, {})
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text to continue: as `encode`, after the ids that begin a text.

        They are not put before a text that begins with them. There is at least one id.
        """
        ids, begin = self.encode(text, special=special), [*self.begin_ids]
        return (ids if special and ids[: len(begin)] == begin else begin + ids) or [self.bos_id]

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        special: bool = False,
        answer_follows: bool = True,
    ) -> list[int]:
        """Token ids of a conversation in the chat template, up to where an answer begins.

        It is complete if no `answer_follows`. Text in a message that spells a special token stays
        text unless `special` is set.

        Raises:
            ValueError: There is no chat template, or it refuses the messages.
        """
        messages, stands_for = (messages, {}) if special else self._without_marks(messages)
        text = self.chat_text(messages, add_generation_prompt=answer_follows)
        _check_encodable(text)
        return self._encode_marked(text, stands_for)

    def encode_answers(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation in the chat template, and which of them answer.

        Text in a message that spells a special token stays text. Answers are what the template
        marks with ``{% generation %}``; a token that is partly one counts.

        Raises:
            ValueError: There is no chat template, it marks no answers, or it refuses the messages.
        """
        messages, stands_for = self._without_marks(messages)
        text, spans = render_answers(self._template(), messages, **self._template_names())
        _check_encodable(text)
        pieces = list(self._encode_pieces(text, stands_for))
        answers = [any(a < stop and start < b for a, b in spans) for _, start, stop in pieces]
        return [token_id for token_id, _, _ in pieces], answers

    def _without_marks(
        self, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], dict[str, str]]:
        """The messages with a character of private use for each special token that they spell.

        Also what each character stands for; the template's own marks are cut out before.
        """
        everything = "".join(message["content"] for message in messages)
        free = (chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in everything)
        spelt = [mark for mark in self._marks if mark in everything]
        stands_for = {character: mark for mark, character in zip(spelt, free, strict=False)}
        for character, mark in stands_for.items():
            messages = [{**m, "content": m["content"].replace(mark, character)} for m in messages]
        return messages, stands_for

    def chat_text(
        self, messages: Sequence[Message], template: str | None = None, **names: Any
    ) -> str:
        """A conversation as text in `template`; default: the chat template.

        Raises:
            ValueError: There is no chat template, or it refuses the messages.
        """
        template = self._template() if template is None else template
        return render_chat(template, messages, **{**self._template_names(), **names})

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self.chat_template

    def _template_names(self) -> dict[str, str]:
        settings = self.settings or self.names
        return {name: text for name, text in settings.items() if name.endswith("_token")}

    @cached_property
    def _marks(self) -> dict[str, tuple[int, AddedToken]]:
        """Id and settings of the special tokens by their text, longest first."""
        added = [(i, t) for i, t in self._backend.get_added_tokens_decoder().items() if t.special]
        return {t.content: (i, t) for i, t in sorted(added, key=lambda one: -len(one[1].content))}

    def _encode_marked(self, text: str, stands_for: Mapping[str, str]) -> list[int]:
        """Ids of a text whose special tokens are meant; then characters become what they stand for.

        The library cuts a text at special tokens in the same way before it does anything else.
        """
        return [token_id for token_id, _, _ in self._encode_pieces(text, stands_for)]

    def _encode_pieces(
        self, text: str, stands_for: Mapping[str, str]
    ) -> Iterator[tuple[int, int, int]]:
        """As ``_encode_marked``, each id with its first character in the text and the one after."""
        white = {True: r"\s*", False: ""}
        pattern = "|".join(
            f"{white[t.lstrip]}{re.escape(mark)}{white[t.rstrip]}"
            for mark, (_, t) in self._marks.items()
        )
        start = 0
        for found in [*re.finditer(pattern, text), None]:
            piece = text[start : found.start() if found else len(text)]
            written = [stands_for.get(character, character) for character in piece]
            places = [start + i for i, string in enumerate(written) for _ in string]
            encoded = self._backend.encode("".join(written), add_special_tokens=False)
            for token_id, (first, after) in zip(encoded.ids, encoded.offsets, strict=True):
                yield token_id, places[first], places[max(first, after - 1)] + 1
            if found is not None:
                mark = found[0] if found[0] in self._marks else found[0].strip()
                yield self._marks[mark][0], *found.span()
                start = found.end()

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
        """Text of `ids`, as `decode_bytes`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is negative.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of `ids`; special tokens are skipped. A prefix may end inside a character.

        Ids past the vocabulary are skipped too: a model's is often padded to a round number.

        Raises:
            ValueError: An id is negative.
        """
        pieces = []
        for token_id in ids:
            if token_id < 0:
                raise ValueError(f"token id {int(token_id)} is negative: ids start at 0")
            pieces.append(self._token_bytes[token_id] if token_id < self.vocab_size else b"")
        return b"".join(pieces)

    def special_text(self, token_id: int) -> str:
        """The text of a special token; empty if this is none."""
        return next((text for text, (i, _) in self._marks.items() if i == token_id), "")

    @property
    def sampling(self) -> dict[str, Any]:
        """`temperature`, `top_k` and `top_p` that the checkpoint asks for; empty if it asks none.

        The defaults of `generation_config.json` are transformers'.
        """
        given = self._facts.generation
        if not given.get("do_sample"):
            return {}
        return {
            "temperature": given.get("temperature") or 1.0,
            "top_k": given.get("top_k", 50) or None,
            "top_p": given.get("top_p"),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `tokenizer_config.json`; empty for a tokenizer that was made here.

        Only tokens that have a name of their own are named, because templates ask for that.
        """
        if not self._facts.settings and tuple(self.names.values()) == SPECIAL_TOKENS:
            return {}
        return {**self._facts.settings, "eos_token": self.names["eos_token"]}

    @property
    def generation(self) -> dict[str, Any]:
        """The fields of `generation_config.json`: sampling, and the ids that no name says."""
        given = dict(self._facts.generation)
        for name, token_id in (("bos_token", self.bos_id), ("pad_token", self.pad_id)):
            if self.settings and token_id != self.eos_id and not self.settings.get(name):
                given[f"{name}_id"] = token_id
        if len(self.end_ids) > 1:
            given["eos_token_id"] = [self.eos_id, *sorted(self.end_ids - {self.eos_id})]
        return given

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json`, in the `tokenizers` library's format, into `folder`.

        Returns its path. `settings` and `generation` are written beside it unless they are empty.
        Each file is written atomically.
        """
        target = Path(folder) / TOKENIZER_FILE
        write_whole(target, self._backend.to_str(pretty=True))
        for name, fields in ((SETTINGS_FILE, self.settings), (GENERATION_FILE, self.generation)):
            if fields:
                write_json(target.parent / name, fields)
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

        The files beside it are read as well; a folder of GPT-2's `vocab.json` and `merges.txt` will
        do. The names of the special tokens are the arguments; those not given are as these files
        say, else our defaults if it has them, else its end token: the only special token, or
        `<|endoftext|>`.

        Args:
            path: The file or its folder.
            bos_token: Text of the begin token.
            eos_token: Text of the end token.
            pad_token: Text of the padding token; may be the same as another special token.

        Raises:
            ValueError: No such file, not a tokenizer, not byte-level, or a special token is
                missing.
        """
        file = find_file(Path(path))
        facts = read_facts(file.parent)
        given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        named = {key: name for key, name in given.items() if name}
        facts = replace(facts, settings={**facts.settings, **named})
        backend = None if file.is_file() else read_backend(file.parent, facts)
        backend = read_file(file) if backend is None else backend
        check_byte_level(backend)
        add_missing(backend, facts)
        names = {name: facts.settings[name] for name in SPECIAL_NAMES if facts.settings.get(name)}
        ours = all(backend.token_to_id(token) is not None for token in SPECIAL_TOKENS)
        if not ours or "eos_token" in names:
            names = special_names(backend, facts)
        else:
            names = dict(zip(SPECIAL_NAMES, SPECIAL_TOKENS, strict=True)) | names
        if "eos_token" not in names:
            special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
            raise ValueError(
                f"{file.parent} does not say which token ends a text; its special tokens are "
                f"{special}: write the name as eos_token into {SETTINGS_FILE} there"
            )
        return cls(backend, **names, facts=facts)

    def _special_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None or self._token_bytes[token_id]:
            names = [t["content"] for t in self._config["added_tokens"] if t["special"]]
            raise ValueError(
                f"the tokenizer has no special token {token!r}; it has {names}: write the right "
                f"names as {', '.join(SPECIAL_NAMES)} into its {SETTINGS_FILE}"
            )
        return int(token_id)

    def _read_token_bytes(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        added = {t["id"]: t for t in self._config["added_tokens"]}
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values()) + 1)
        for token, token_id in vocab.items():
            if token_id in added:
                table[token_id] = b"" if added[token_id]["special"] else token.encode()
            elif all(character in byte_of for character in token):
                table[token_id] = bytes(byte_of[character] for character in token)
            else:
                table[token_id] = token.encode()  # as the library decodes it
        return table

    @cached_property
    def lacks(self) -> frozenset[int]:
        """Bytes without a token, as in vocabularies that were made from text: they are lost."""
        vocab = self._config["model"]["vocab"]
        return frozenset(byte for byte, token in enumerate(byte_characters()) if token not in vocab)

    @cached_property
    def change(self) -> str | None:
        """How a text changes when it is encoded and decoded; None if it comes back unchanged.

        Found on texts that hold every byte but those that it ``lacks``, and what normalizers and
        careless splitting change.
        """
        added = [t.content for t in self._backend.get_added_tokens_decoder().values()]
        known = ("".join(c for c in text if not self.lacks & {*c.encode()}) for text in PROBES)
        for text in (*known, *(f" a  {content}  B " for content in added)):
            back = self.decode(self.encode(text))
            if back != text:
                at = next(
                    (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
                    min(len(text), len(back)),
                )
                return f"{text[at : at + 8]!r} becomes {back[at : at + 8]!r}"
        return None

    def require_lossless(self, purpose: str, *texts: str) -> None:
        """Check that a text, and these in particular, comes back unchanged from its ids.

        Raises:
            ValueError: It does not; says what this is needed for.
        """
        if self.lacks and (lost := self.lacks & set().union(*(t.encode() for t in texts))):
            raise ValueError(
                f"the text holds the byte 0x{min(lost):02x}, for which the tokenizer has no token, "
                f"so {purpose} would be wrong; remove the character"
            )
        if self.change is not None:
            raise ValueError(
                f"the tokenizer changes text ({self.change}), so {purpose} would be wrong; use one "
                f"without a normalizer or prefix space in its {TOKENIZER_FILE}"
            )


def byte_tokenizer() -> Tokenizer:
    """A tokenizer without merges: special tokens have ids 0, 1, 2, and byte b has id 3 + b."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte, character in enumerate(byte_characters()):
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
            f"vocab_size is {vocab_size}; it must be at least {MIN_BPE_VOCAB}, for the 256 bytes "
            f"and {len(SPECIAL_TOKENS)} special tokens"
        )
    backend = _backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=byte_characters(),
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
            f"the text is not UTF-8: {text[error.start]!r} at character {error.start} stands for "
            "no character; convert the text, for example with iconv -t UTF-8"
        ) from None
