"""Tokenizer folders as other projects write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from openmythos.tokenizer import byte_tokenizer

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As public models write theirs, with marks around what the assistant generates.
MARKED = {
    "chatml (Qwen, SmolLM)": """{% for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{%- endif %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "headers (Llama 3)": """{{- bos_token }}{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '<|im_end|>\n\n' }}
{%- if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m['content'] | trim + eos_token }}{% endif %}{% endfor %}""",
    "instruction (Mistral)": """{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}
{%- elif m['role'] == 'user' %}
{{- '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}
{%- generation %} {{ m['content'] }}{{ eos_token }}{%- endgeneration %}
{%- endif %}{% endfor %}""",
    "turns (Gemma)": """{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<|im_start|>' + role + '\n' }}
{%- if role == 'model' %}
{%- generation %}{{ m['content'] | trim + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ m['content'] | trim + '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}""",
    "lines (Zephyr)": """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>' }}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endif %}
{% endfor %}""",
}


def vocabulary() -> list[str]:
    """The 256 bytes and two words."""
    letters = sorted(byte_tokenizer()._config["model"]["vocab"])
    return [*(letter for letter in letters if len(letter) == 1), "Ġt", "he"]


def backend(
    *specials: str, begin: str = "", normalizer: Any = None, prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE with these special tokens last, the first of which may begin every text."""
    vocab = {token: index for index, token in enumerate(vocabulary())}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if begin:
        begin_id = made.token_to_id(begin)
        made.post_processor = TemplateProcessing(f"{begin} $A", None, [(begin, begin_id)])
    return made


def write_folder(
    folder: Path, made: tokenizers.Tokenizer | None = None, **files: Mapping[str, Any]
) -> Path:
    """A folder with tokenizer.json and other files of JSON, by name without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    if made is not None:
        made.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def write_chat_folder(folder: Path) -> Path:
    """As an instruct model's: a template, several end ids, sampling, a name that is its own."""
    return write_folder(
        folder,
        backend(END, START_TURN, END_TURN),
        tokenizer_config={"eos_token": END_TURN, "chat_template": CHATML, "padding_side": "right"},
        generation_config={
            "eos_token_id": [260, 258],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
        },
    )
