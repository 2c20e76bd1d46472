"""The files beside a tokenizer.json, as transformers writes them, and what they say.

Several programs and versions write the same facts into different files: the names of the special
tokens, added tokens, the chat template, the ids that end a text, and how to sample.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from openmythos.config.schema import in_words

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token")
# The classes whose vocab.json and merges.txt are cut as GPT-2's are; None: not said.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", None)

# Fields by which a generation config can ask for other tokens than are generated here, and the
# values at which they ask for nothing; so does None. The first ones matter in sampling only.
SAMPLING_ONLY = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
NOT_OBEYED: Mapping[str, Any] = {
    **SAMPLING_ONLY,
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty"), 0),
    **dict.fromkeys(("min_length", "min_new_tokens", "min_tokens", "penalty_alpha"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "suppress_tokens", "stop_strings")),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty")),
    "token_healing": False,
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is kept of a tokenizer besides its tokenizer.json.

    Attributes:
        settings: The fields of tokenizer_config.json, with what older files add; the chat template
            is one of them.
        generation: The fields of generation_config.json.
        ids: Special ids by the names of config.json, such as ``eos_token_id``.
        added: Added tokens that a tokenizer.json may lack, by id.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)


def read_facts(folder: Path) -> Facts:
    """The facts in the files of ``folder``, all of which may be missing.

    Raises:
        ValueError: A file is damaged.
    """
    settings = _read(folder / SETTINGS_FILE)
    settings.pop("auto_map", None)  # names code, which is never carried
    decoder = settings.pop("added_tokens_decoder", {})
    settings = {**_read(folder / "special_tokens_map.json"), **settings}
    settings |= {name: _content(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    template = folder / TEMPLATE_FILE
    if template.is_file():
        settings["chat_template"] = _text(template)
    generation, config = _read(folder / GENERATION_FILE), _read(folder / "config.json")
    generation.pop("transformers_version", None)
    ids = {f"{name}_id": config.get(f"{name}_id") for name in SPECIAL_NAMES}
    ids |= {name: value for name, value in generation.items() if name in ids}
    try:
        added = {int(i): AddedToken(**_fields(t)) for i, t in decoder.items()}
        for content, token_id in _read(folder / "added_tokens.json").items():
            added.setdefault(int(token_id), AddedToken(content, normalized=False))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the added tokens in {folder} cannot be read: {error}") from None
    return Facts(settings=settings, generation=generation, ids=ids, added=added)


def default_template(given: Any) -> str | None:
    """The template of plain conversations; there can be several by name."""
    return named_templates(given).get("default")


def named_templates(given: Any) -> dict[str, str]:
    """The chat templates by name; a single one is the default."""
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given}
    named = given if isinstance(given, dict) else {"default": given}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a tokenizer, of whichever files."""
    return find_file(folder).is_file() or (folder / VOCAB_FILE).is_file()


def find_file(path: Path) -> Path:
    """The tokenizer.json of a folder, which may be missing; any other path as it is.

    It may stand in a folder ``tokenizer``, as in IFM's checkpoints.
    """
    file = path / TOKENIZER_FILE
    if not path.is_dir() or file.is_file():
        return file if path.is_dir() else path
    if (path / "tokenizer" / TOKENIZER_FILE).is_file():
        return path / "tokenizer" / TOKENIZER_FILE
    for checkpoint in sorted(path.glob("checkpoints/step-????????"), reverse=True):
        if (checkpoint / TOKENIZER_FILE).is_file():
            return checkpoint / TOKENIZER_FILE
    for index in (path / "index.json", path / "data" / "index.json"):  # prepared data
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return index.parent / json.loads(index.read_text(encoding="utf-8"))["tokenizer_file"]
    return file


def read_file(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        ValueError: It is missing or damaged.
    """
    if not file.is_file():
        raise ValueError(
            f"no tokenizer at {file}: give a {TOKENIZER_FILE} file or a folder that holds one"
        )
    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text at byte {error.start}: not a tokenizer.json"
        ) from None
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is not a tokenizer.json that can be read: {reason}") from None


def read_backend(folder: Path, facts: Facts) -> tokenizers.Tokenizer | None:
    """The tokenizer of GPT-2's old files, vocab.json and merges.txt; None without them.

    Raises:
        ValueError: They belong to another kind of tokenizer, or are damaged.
    """
    vocab, merges = folder / VOCAB_FILE, folder / MERGES_FILE
    if not vocab.is_file() or not merges.is_file():
        return None
    kind = facts.settings.get("tokenizer_class")
    if kind not in GPT2_CLASSES:
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}, and its {VOCAB_FILE} is of a {kind}, which may cut "
            f"text in another way than GPT-2: save it with transformers to get a {TOKENIZER_FILE}"
        )
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{vocab} and {MERGES_FILE} cannot be read: {reason}") from None
    backend = tokenizers.Tokenizer(model)
    prefixed = bool(facts.settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    backend.decoder = decoders.ByteLevel()
    return backend


def add_missing(backend: tokenizers.Tokenizer, facts: Facts) -> None:
    """Give the backend the added tokens that its own file lacks.

    Raises:
        ValueError: One would get another id than the one it is known by.
    """
    for token_id, token in sorted(facts.added.items()):
        if backend.token_to_id(token.content) is None:
            next_id = backend.get_vocab_size(with_added_tokens=True)
            if token_id != next_id:
                raise ValueError(
                    f"the added token {token.content!r} has id {token_id}, and the tokenizer's "
                    f"next free id is {next_id}: some tokens between are missing"
                )
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def special_names(backend: tokenizers.Tokenizer, facts: Facts) -> dict[str, str]:
    """The names of the begin, end and padding tokens; those not named are the end token.

    They are named in the settings or, by id, in the model's config. Without either, a tokenizer's
    only special token is its end token, as in GPT-2's files; an empty dict means that nothing says.
    """
    found = {name: facts.settings[name] for name in SPECIAL_NAMES if facts.settings.get(name)}
    for name in SPECIAL_NAMES:
        token_id = facts.ids.get(f"{name}_id")
        first = token_id[0] if isinstance(token_id, list) and token_id else token_id
        token = backend.id_to_token(first) if type(first) is int and first >= 0 else None
        if token is not None:
            found.setdefault(name, token)
    if "eos_token" not in found:
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        known = special if len(special) == 1 else ["<|endoftext|>"]
        if backend.token_to_id(known[0]) is None:
            return {}
        found["eos_token"] = known[0]
    return dict.fromkeys(SPECIAL_NAMES, found["eos_token"]) | found


def unobeyed(generation: Mapping[str, Any], *, sampled: bool) -> dict[str, Any]:
    """The fields of a generation_config.json that ask for what is not done here.

    Args:
        generation: The fields of the file.
        sampled: Whether tokens are sampled as the file asks.
    """
    return {
        name: value
        for name, value in generation.items()
        if name in NOT_OBEYED and value is not None and value != NOT_OBEYED[name]
        if sampled or name not in SAMPLING_ONLY
    }


def end_ids(facts: Facts) -> frozenset[int]:
    """The ids that end a text, as generation_config.json or config.json lists them.

    Raises:
        ValueError: They are not integers.
    """
    given = facts.ids.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"eos_token_id is {given!r}; it must be an id or a list of ids")
    return frozenset(ids)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _fields(token: Any) -> dict[str, Any]:
    """The arguments of an ``AddedToken``; a plain string has no others."""
    if isinstance(token, str):
        return {"content": token}
    return {name: value for name, value in token.items() if name != "__type"}


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without the file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {in_words(data)}, not an object")
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text at byte {error.start}") from None
