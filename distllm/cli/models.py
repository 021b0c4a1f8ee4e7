"""`distllm models`: the families that distllm runs, by the registry. Needs no torch and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from distllm.cli.tables import print_table

if TYPE_CHECKING:
    from distllm.models.family import Family

COLUMNS = ("model_type", "architectures", "models", "notes")
MARKDOWN = """\
# Models

Written by `make docs` from the registry; what to edit is the family's file in `distllm/models/`. A folder is
told by `architectures` in its `config.json`, without them by `model_type`. A key there that changes the
result is read or refused.

Each family is compared with `transformers`, or where that has no class with two other references, on small
random checkpoints in the layout of the real ones: logits within 2e-4 in fp32, prompts and decode steps, over
tp × pp. Names and sizes say which released models have that layout, not that their weights were run.

| model_type | architectures | models | notes |
| --- | --- | --- | --- |
{families}

Any other architecture is refused with the nearest of these, and with what it needs beside:

| architecture | needs |
| --- | --- |
{missing}

How a family is added: [adding-a-model](adding-a-model.md).
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
@click.option("--markdown", is_flag=True, help="Print docs/models.md.")
def models(as_json: bool, markdown: bool) -> None:
    """Show the families of models that distllm runs."""
    from distllm.models.registry import FAMILIES

    rows = [(family.name, family.architectures, family.models, family.notes) for family in FAMILIES]
    if as_json:
        click.echo(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows]))
    elif markdown:
        click.echo(document(FAMILIES), nl=False)
    else:
        print_table("Models", COLUMNS, [(name, ", ".join(kinds), *rest) for name, kinds, *rest in rows])


def document(families: Sequence[Family]) -> str:
    from distllm.models.registry import MISSING

    missing = [f"| `…{part}…` | {knob} |" for part, knob in MISSING.items()]
    return MARKDOWN.format(families="\n".join(map(markdown_row, families)), missing="\n".join(missing))


def markdown_row(family: Family) -> str:
    architectures = ", ".join(f"`{name}`" for name in family.architectures)
    cells = (f"`{family.name}`", architectures, family.models, family.notes)
    return f"| {' | '.join(cells)} |"
