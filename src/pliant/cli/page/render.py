"""A page from its blocks: one template, style and script of this package, nothing from anywhere else."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup

from pliant.cli.page.blocks import Section
from pliant.errors import ConfigError

TEMPLATE, STYLE, SCRIPT = "page.html.j2", "page.css", "page.js"
SUFFIX = ".html"
MOST_BYTES = 5_000_000
"""What a page may weigh; a mail or a phone takes that."""


def check_page(file: Path) -> None:
    """Refuses a name that no page can be written to.

    Raises:
        ConfigError: It does not end in .html, is a folder, or lies in one that is not there.
    """
    if file.is_dir():
        raise ConfigError(f"--output must be a file; {str(file)!r} is a folder. Name one in it: {file / 'page.html'}.")
    if file.suffix.lower() != SUFFIX:
        raise ConfigError(f"--output must end in {SUFFIX}; got {str(file)!r}. Choose another name.")
    if not file.parent.is_dir():
        raise ConfigError(
            f"--output must lie in a folder that is there; {str(file.parent)!r} is not. Make it, or choose another."
        )


def write_page(
    file: Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    kicker: str = "",
    most_bytes: int | None = MOST_BYTES,
) -> int:
    """Writes a page, whole or not at all, and returns its bytes.

    Args:
        file: Where to.
        title: Heading and name of the page.
        sections: Its parts.
        subtitle: A sentence under the heading.
        kicker: A word or two above it.
        most_bytes: What it may weigh; None for any weight.

    Raises:
        ConfigError: The page would weigh more.
    """
    from pliant.models.staging import replaced  # imports torch, which checking a name must not

    content = rendered_page(title, sections, subtitle=subtitle, kicker=kicker).encode("utf-8", errors="replace")
    if most_bytes is not None and len(content) > most_bytes:
        raise ConfigError(
            f"a page must weigh at most {most_bytes / 1e6:g} MB; this one has {len(content) / 1e6:.1f}. Give fewer "
            "runs, or a shorter prompt."
        )
    with replaced(file, prefix=f".{file.stem}-") as staged:
        Path(staged).write_bytes(content)
    return len(content)


def rendered_page(title: str, sections: Sequence[Section], *, subtitle: str = "", kicker: str = "") -> str:
    """Returns the text of a page; its arguments are those of :func:`write_page`."""
    style, script = (Markup(_data(name)) for name in (STYLE, SCRIPT))  # our own, not to be escaped
    return _template().render(
        title=title, sections=sections, subtitle=subtitle, kicker=kicker, style=style, script=script
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pliant.cli.page", "."),
        autoescape=select_autoescape(("html", "j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


def _data(name: str) -> str:
    return resources.files("pliant.cli.page").joinpath(name).read_text(encoding="utf-8")
