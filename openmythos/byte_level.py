"""What makes a tokenizer of the `tokenizers` library one of bytes."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

# Every byte that UTF-8 can hold; then what normalizers compose, decompose, fold, strip or drop.
PROBES = (
    "a",
    " Two  spaces,\tA TAB \r\n\r\n and white space at both ends \n ",
    "".join(map(chr, range(0xC0))),
    "".join(chr(lead << 6) for lead in range(3, 32)),
    "".join(chr(lead << 12 | 0x800 * (lead == 0)) for lead in range(16)),
    "".join(map(chr, (0x10000, 0x40000, 0x80000, 0xC0000, 0x10FFFF))),
    "e\u0301 \u00e9 \u212b \ufb01 \uff21 \u1100\u1161 \ud55c \u0958",
    "\u0130 \u00df \u00ad \u200b \ufeff",
    "It's 1234567890 'quoted' ``text'' ... don't , here . we 've",
)


def byte_characters() -> list[str]:
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


def mark_begin(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Let the begin token stand before every text that is encoded with special tokens."""
    if backend.token_to_id(bos) is not None:
        single, pair = f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1"
        specials = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(single, pair, specials)


def check_byte_level(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The tokenizer's file as JSON.

    Raises:
        ValueError: It is not a byte-level BPE.
    """
    config: dict[str, Any] = json.loads(backend.to_str())
    decoder, model = config["decoder"] or {}, config["model"].get("type")
    kinds = [decoder.get("type")] + [part["type"] for part in decoder.get("decoders", [])]
    if "ByteLevel" not in kinds or model != "BPE":
        raise ValueError(
            f"the tokenizer is not a byte-level BPE (model {model}, decoder "
            f"{decoder.get('type')}): give one that is, only it gives back every byte"
        )
    return config
