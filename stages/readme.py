"""Copy the miniature's tables from reports/ into README.md, between the comments that name them."""

from pathlib import Path

TABLES = ["alpaca_eval", "open_llm_leaderboard"]


def filled(readme: str, reports: Path) -> str:
    """The README with the tables, and the lines beneath them, of reports/*.md in their places."""
    for name in TABLES:
        page = (reports / f"{name}.md").read_text().replace("# ", "### ", 1).strip()
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, _, rest = readme.partition(begin)
        readme = head + begin + page + "\n" + end + rest.partition(end)[2]
    return readme


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(filled(path.read_text(), Path("reports")))
