"""``openmythos export`` and ``convert``: a checkpoint in the form that other programs read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmythos.command.option import Out

if TYPE_CHECKING:
    import torch

    from openmythos.interop.mapping import Family
    from openmythos.tokenizer import Tokenizer

Source = Annotated[Path, typer.Argument(help="A checkpoint or run folder of any known family.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; default: as stored.")
]
DTYPES = ("float32", "float16", "bfloat16")


def export(
    path: Source,
    out: Out,
    to: Annotated[str, typer.Option(help="The program to export to: hf.")] = "hf",
    dtype: Dtype = None,
    num_loops: Annotated[
        int | None, typer.Option(help="Default depth of the export, its deepest with a cache.")
    ] = None,
) -> None:
    """Write a folder for Hugging Face transformers, and through it for vLLM and others."""
    if to != "hf":
        raise ValueError(f"--to is {to!r}; allowed: 'hf'; for other families use convert")
    wanted = parse_dtype(dtype)
    from openmythos.interop.export import TOKENIZER_FILES, export_hf
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained

    model, folder = load_pretrained(path), local_folder(path)
    tokenizer: Tokenizer | Path | None = own_tokenizer(folder)
    if tokenizer is None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = folder
    export_hf(model, out, tokenizer=tokenizer, dtype=wanted, num_loops=num_loops)
    without = "" if tokenizer is not None else ", without a tokenizer, as the checkpoint has none"
    print(f"wrote {out}{without}")
    print(f"open it: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


def convert(
    path: Source,
    out: Out,
    to: Annotated[
        str, typer.Option(help="openmythos, or a published family that can express the model.")
    ] = "openmythos",
    dtype: Dtype = None,
) -> None:
    """Write a checkpoint under another family's names, or a published one under ours."""
    wanted = parse_dtype(dtype)
    from openmythos.checkpoint.save import save_pretrained
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained
    from openmythos.interop.writing import save_as

    family = None if to == "openmythos" else family_named(to)
    model, tokenizer = load_pretrained(path, dtype=wanted), own_tokenizer(local_folder(path))
    if family is None:
        save_pretrained(model, out, tokenizer)
    else:
        save_as(family, model, out, tokenizer=tokenizer)
    print(f"wrote {out}")


def family_named(name: str) -> "Family":
    """The family with this word for ``--to``, which is its name in small letters.

    Raises:
        ValueError: There is none; names the others.
    """
    from openmythos.interop.export import FAMILY
    from openmythos.interop.loading import FAMILIES

    words = {
        family.name.lower().removeprefix("the ").replace(" ", "-"): family
        for family in FAMILIES
        if family is not FAMILY  # a folder with code: that is export's
    }
    if name not in words:
        raise ValueError(f"--to is {name!r}; allowed: openmythos, {', '.join(words)}")
    return words[name]


def own_tokenizer(folder: Path) -> "Tokenizer | None":
    """The tokenizer of one of our folders or exports; another project's is not ours to read."""
    from openmythos.checkpoint.load import read_config
    from openmythos.interop.export import MODEL_TYPE
    from openmythos.tokenizer import FILE_NAME, Tokenizer

    data = read_config(folder)
    ours = "format" in data or data.get("model_type") == MODEL_TYPE
    return Tokenizer.load(folder) if ours and (folder / FILE_NAME).is_file() else None


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of ``--dtype``.

    Raises:
        ValueError: It is none of ``DTYPES``.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    import torch

    return None if name is None else getattr(torch, name)
