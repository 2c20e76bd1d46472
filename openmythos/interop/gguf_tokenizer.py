"""The tokenizer in a GGUF file: byte-level BPE, its special tokens and its chat template.

Text is cut into pieces before the merges. GGUF only names the way to cut; what the names mean is
written in llama.cpp. Here are those that can be said exactly as the models' own files say them.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe, and the names in load).
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import SPECIAL_NAMES, TOKENIZER_FILE, Facts

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types
FIELD = "tokenizer.ggml."
ID_FIELDS = dict(
    zip(SPECIAL_NAMES, ("bos_token_id", "eos_token_id", "padding_token_id"), strict=True)
)
END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends a generated text

SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
MARKS = r"| ?[^\s\p{L}\p{N}]+"
GPT2 = rf"{SHORT}| ?\p{{L}}+| ?\p{{N}}+{MARKS}|\s+(?!\S)"
LLAMA3 = rf"(?i:{SHORT})|{WORD}\p{{L}}+|\p{{N}}{{1,3}}{MARKS}[\r\n]*|{REST}"
QWEN2 = rf"(?i:{SHORT})|{WORD}\p{{L}}+|\p{{N}}{MARKS}[\r\n]*|{REST}"
QWEN35 = (
    rf"(?i:{SHORT})|{WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{REST}"
)
SEED = rf"(?i:{SHORT})|{WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}{MARKS}[\r\n/]*|{REST}"
GPT4O = (
    rf"{WORD}{UPPER}*{LOWER}+(?i:{SHORT})?|{WORD}{UPPER}+{LOWER}*(?i:{SHORT})?|\p{{N}}{{1,3}}"
    rf"{MARKS}[\r\n/]*|{REST}"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{REST}",
)
CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, r"\p{N}")
NO_NAME = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
# By the value of tokenizer.ggml.pre: patterns, one after the other, whose matches become pieces.
CUTS: Mapping[str, tuple[str, ...]] = {
    "default": NO_NAME,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "trillion"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("codeshell", "minerva-7b"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (QWEN2,)),
    "qwen35": (QWEN35,),
    "seed-coder": (SEED,),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O,)),
    "deepseek-coder": DEEPSEEK_CODER,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), DEEPSEEK3),
}
# A piece that is a token is taken whole, and texts begin with bos unless the file says otherwise.
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that these fields describe.

    Raises:
        KeyError: A field is missing.
        ValueError: It is not a byte-level BPE, or cuts text in a way that is not known here.
    """
    kind, cut = fields[FIELD + "model"], fields.get(FIELD + "pre", "default")
    if kind != "gpt2":
        raise ValueError(f"it is of the kind {kind!r}; only byte-level BPE, 'gpt2', can be read")
    if cut not in CUTS:
        raise ValueError(
            f"it cuts text as {cut!r}; allowed: {', '.join(sorted(CUTS))}; or convert the file, "
            f"and put the model's own {TOKENIZER_FILE} into the result"
        )
    tokens, end = fields[FIELD + "tokens"], fields[FIELD + "eos_token_id"]
    if not 0 <= end < len(tokens):
        raise ValueError(f"eos_token_id is {end}, and it has {len(tokens)} tokens")
    given = {name: fields.get(FIELD + field, -1) for name, field in ID_FIELDS.items()}
    given = {name: i for name, i in given.items() if 0 <= i < len(tokens)}  # else: there is none
    names = {name: tokens[given.get(name, end)] for name in ID_FIELDS}
    backend = _backend(
        fields, CUTS[cut], ignore_merges=cut in WHOLE_PIECES, num_ids=max(given.values()) + 1
    )
    marks = {
        "add_bos_token": "bos_token" in given
        and bool(fields.get(FIELD + "add_bos_token", cut in WHOLE_PIECES)),
        "add_eos_token": bool(fields.get(FIELD + "add_eos_token", False)),
    }
    begin = [names["bos_token"]] if marks["add_bos_token"] else []
    stop = [names["eos_token"]] if marks["add_eos_token"] else []
    if begin or stop:
        special = [(name, backend.token_to_id(name)) for name in {*begin, *stop}]
        backend.post_processor = TemplateProcessing([*begin, "$A", *stop], None, special)
    ends = [fields[FIELD + name] for name in END_FIELDS if FIELD + name in fields]
    ends = list(dict.fromkeys(ends))
    settings = {**{name: names[name] for name in given}, **marks, **_templates(fields)}
    facts = Facts(
        settings=settings,
        generation={"eos_token_id": ends} if len(ends) > 1 else {},
        ids={"eos_token_id": ends},
    )
    return Tokenizer(backend, **names, facts=facts)


def _backend(
    fields: Mapping[str, Any], patterns: tuple[str, ...], *, ignore_merges: bool, num_ids: int
) -> tokenizers.Tokenizer:
    """The tokenizer of at least ``num_ids`` ids, without the padding of the model's vocabulary."""
    tokens, types = list(fields[FIELD + "tokens"]), list(fields[FIELD + "token_type"])
    while len(types) > num_ids and types[-1] == UNUSED:
        tokens.pop()
        types.pop()
    merges = [tuple(merge.split(" ", 1)) for merge in fields[FIELD + "merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"its merges do not fit its tokens ({error})") from None
    backend = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytewise])
    backend.decoder = decoders.ByteLevel()
    for special, kinds in ((True, (CONTROL, UNUSED)), (False, (USER_DEFINED,))):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def _templates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The field ``chat_template`` of tokenizer_config.json: one text, or several by name."""
    plain = fields.get("tokenizer.chat_template")
    names = fields.get("tokenizer.chat_templates") or ()
    named = {name: fields[f"tokenizer.chat_template.{name}"] for name in names}
    if plain is not None and named:
        named["default"] = plain
    if named:
        return {"chat_template": [{"name": n, "template": text} for n, text in named.items()]}
    return {} if plain is None else {"chat_template": plain}
