"""Fill what is made elsewhere into the documents: the miniature's tables into README.md, the schemas into docs/artifacts.md.

Each stands between the comments that name it.
"""

from pathlib import Path

from stages import markdown, schemas

TABLES = ["alpaca_eval", "open_llm_leaderboard"]


def filled(text: str, name: str, content: str) -> str:
    """The text with `content` between the comments `name` and `/name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, _, rest = text.partition(begin)
    return head + begin + content.strip() + "\n" + end + rest.partition(end)[2]


def columns() -> str:
    """Files, their columns and the columns' types."""
    rows = []
    for path, schema in schemas.ARTIFACTS.items():
        listed = [f"{field.name}: {str(field.type).replace('item: ', '')}" for field in schema]
        rows.append([path, "; ".join(listed)])
    return markdown.table(["path", "columns"], rows, text=True)


def documents(root: Path) -> dict[Path, str]:
    """Document -> its text, filled."""
    readme, artifacts = root / "README.md", root / "docs" / "artifacts.md"
    text = readme.read_text()
    for name in TABLES:
        text = filled(text, name, (root / "reports" / f"{name}.md").read_text().replace("# ", "### ", 1))
    return {readme: text, artifacts: filled(artifacts.read_text(), "schemas", columns())}


if __name__ == "__main__":
    for path, text in documents(Path()).items():
        path.write_text(text)
