"""``openmythos convert``: write a checkpoint under another family's names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmythos.command.option import AsJson, Dtype, Out, Source, parse_dtype
from openmythos.command.origin import companions_of
from openmythos.terminal import note

if TYPE_CHECKING:
    from openmythos.interop.mapping import Family


def convert(
    path: Source,
    out: Out,
    to: Annotated[
        str, typer.Option(help="openmythos, or a published family that can express the model.")
    ] = "openmythos",
    dtype: Dtype = None,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Take files that differ from the checkpoint's manifest."),
    ] = False,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="Of a run that trained an adapter: the adapter alone, for PEFT; --to openmythos "
            "names layers as the Hugging Face export does.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint under another family's names, or a published one under ours."""
    note("reading the checkpoint ...")
    wanted = parse_dtype(dtype)
    from openmythos.checkpoint.save import save_pretrained
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained, usable_tokenizer
    from openmythos.interop.writing import save_as

    family = None if to == "openmythos" else family_named(to)
    folder = local_folder(path, verify=not no_verify)
    if adapter_only:
        if dtype is not None:
            raise ValueError(
                f"--adapter-only writes an adapter as it was trained, without --dtype {dtype}: "
                "leave one of them out"
            )
        convert_adapter(folder, family, out)
        print(json.dumps({"folder": str(out), "format": to}) if as_json else f"wrote {out}")
        return
    model = load_pretrained(folder, dtype=wanted, verify=not no_verify)
    tokenizer, remark = usable_tokenizer(folder)
    if remark:
        note(f"note: {remark}")
    companions = companions_of(folder, measured=wanted is None and not no_verify)
    if family is None:
        save_pretrained(model, out, tokenizer, companions=companions)
    else:
        save_as(family, model, out, tokenizer=tokenizer, companions=companions)
    if as_json:
        has = {
            "tokenizer": tokenizer is not None,
            "total_params": sum(p.numel() for p in model.parameters()),
        }
        print(json.dumps({"folder": str(out), "format": to, **has}))
        return
    print(f"wrote {out}")


def convert_adapter(folder: Path, family: "Family | None", out: Path) -> None:
    """Write the adapter of a run alone.

    Raises:
        ValueError: The folder holds none, or the family cannot express it.
    """
    from openmythos.interop.adapter import base_of, is_adapter
    from openmythos.interop.export import FAMILY
    from openmythos.interop.loading import load_config
    from openmythos.interop.peft import write_adapter

    if not is_adapter(folder):
        raise ValueError(f"{folder} has no adapter: leave --adapter-only out")
    write_adapter(folder, load_config(base_of(folder)), family or FAMILY, out)


def family_named(name: str) -> "Family":
    """The family that ``--to`` names, in lower case.

    Raises:
        ValueError: There is none; lists the known ones.
    """
    from openmythos.interop.export import FAMILY
    from openmythos.interop.loading import FAMILIES

    words = {
        family.name.lower().removeprefix("the ").replace(" ", "-"): family
        for family in FAMILIES
        if family is not FAMILY  # written by the export command instead
    }
    if name not in words:
        raise ValueError(f"--to is {name!r}; allowed: openmythos, {', '.join(words)}")
    return words[name]
