"""A hook of the documentation site: the page of the commands is what the commands say of themselves."""

import re
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

from pliant.cli import main

PAGE = "reference/commands.md"
EXAMPLES = re.compile(r"(?:^ *(?:pliant|New here\?|Then) .*\n(?:^ {8,}.*\n)*)+", re.MULTILINE)
"""Lines that a help text shows as they are."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Appends every command's help to the page of the commands."""
    if page.file.src_path != PAGE:
        return markdown
    command = get_command(main)
    with command.make_context("pliant", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="pliant")
    _, heading, body = text.partition("\n## ")  # what comes before stands on the page
    return markdown + heading + EXAMPLES.sub(lambda found: f"```text\n{found[0]}```\n", body)
