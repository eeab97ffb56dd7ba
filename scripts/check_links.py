"""Check that every relative link and anchor in the project's Markdown files resolves."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}).*?^\s*\2[`~]*\s*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)[^)]*\)"  # [text](target "title")
    r"|^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)"  # [label]: target
    r"|\b(?:href|src)=\"([^\"]+)\"",
    re.MULTILINE,
)
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file, as GitHub names them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text))
    for heading in HEADING.findall(text):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        unique, count = slug, 0
        while unique in found:
            count += 1
            unique = f"{slug}-{count}"
        found.add(unique)
    return found


def broken_links(path: Path) -> list[str]:
    """One message for each link of ``path`` that leads nowhere."""
    messages = []
    text = CODE_SPAN.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))
    for link in ("".join(groups) for groups in LINK.findall(text)):
        if EXTERNAL.match(link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            messages.append(f"{path.relative_to(ROOT)}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            messages.append(f"{path.relative_to(ROOT)}: {link}: no such anchor")
    return messages


if __name__ == "__main__":
    documents = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
    broken = [message for document in documents for message in broken_links(document)]
    print("\n".join(broken) or f"every relative link resolves in {len(documents)} documents")
    sys.exit(bool(broken))
