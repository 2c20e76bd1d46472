"""``openmythos export``: write a checkpoint as a folder that other programs open."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmythos.command.option import AsJson, Dtype, Out, Source, parse_dtype
from openmythos.command.origin import companions_of
from openmythos.terminal import note

if TYPE_CHECKING:
    from openmythos.tokenizer import Tokenizer


def export(
    path: Source,
    out: Out,
    to: Annotated[str, typer.Option(help="The program to export to: hf.")] = "hf",
    dtype: Dtype = None,
    num_loops: Annotated[
        int | None, typer.Option(help="Default depth of the export, its deepest with a cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a folder for Hugging Face transformers, and through it for vLLM and others."""
    if to != "hf":
        raise ValueError(f"--to is {to!r}; allowed: hf; for other families use convert")
    note("reading the checkpoint ...")
    wanted = parse_dtype(dtype)
    from openmythos.interop.export import TOKENIZER_FILES, export_hf
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained, own_tokenizer
    from openmythos.tokenizer_folder import find_file

    model, folder = load_pretrained(path), local_folder(path)
    tokenizer: Tokenizer | Path | None = own_tokenizer(folder)
    beside = find_file(folder).parent
    if tokenizer is None and any((beside / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = beside
    export_hf(
        model,
        out,
        tokenizer=tokenizer,
        dtype=wanted,
        num_loops=num_loops,
        companions=companions_of(folder, measured=wanted is None and num_loops is None),
    )
    if as_json:
        made = {
            "num_loops": num_loops or model.config.num_loops,
            "tokenizer": tokenizer is not None,
        }
        params = sum(p.numel() for p in model.parameters())
        print(json.dumps({"folder": str(out), "format": to, **made, "total_params": params}))
        return
    without = "" if tokenizer is not None else ", without a tokenizer, as the checkpoint has none"
    print(f"wrote {out}{without}")
    print(f"open it: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")
