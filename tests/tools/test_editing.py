import pytest

from stages.runtime.errors import StageError
from stages.tools import editing
from support.messages import assert_message

TEXT = """\
# Head.
seed: 42                      # model card
assets:
  policy: {repo: a/b, revision: null}  # gated
  harness:
    mmlu:
      repo: c/d               # tail

# The next section.
lengths:
  total: 1024
"""


@pytest.mark.parametrize(
    ("key", "value", "old", "new"),
    [
        ("seed", 1, "seed: 42                      # model card", "seed: 1                       # new"),
        ("assets.policy.revision", "f" * 40, "revision: null}  # gated", f"revision: {'f' * 40}}} # new"),
        ("assets.harness.mmlu.repo", "e/f", "c/d               # tail", "e/f               # new"),
        ("assets.harness.mmlu.count", 4, "# tail\n", "# tail\n      count: 4                # new\n"),
        ("lengths.total", 256, "total: 1024", "total: 256  # new"),
        ("lengths.prompt", 64, "total: 1024", "total: 1024\n  prompt: 64  # new"),
    ],
)
def test_a_value_and_its_comment_change_and_all_other_lines_stay(key: str, value: object, old: str, new: str) -> None:
    document = editing.load(TEXT)
    editing.set_value(document, key, value, "# new")
    assert editing.dump(document) == TEXT.replace(old, new)


@pytest.mark.parametrize(
    ("key", "section"), [("none.a", "none"), ("seed.a", "seed"), ("assets.policy.repo.a", "assets.policy.repo")]
)
def test_a_key_without_a_section_is_refused(key: str, section: str) -> None:
    with pytest.raises(StageError) as error:
        editing.set_value(editing.load(TEXT), key, 1, "# new")
    assert_message(str(error.value), key, f"no section {section}")


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("seed", "seed: 42                      # model card\n"),
        ("assets.policy", "  policy: {repo: a/b, revision: null}  # gated\n"),
        ("assets.harness", "  harness:\n    mmlu:\n      repo: c/d               # tail\n"),
        ("lengths", "lengths:\n  total: 1024\n"),
    ],
)
def test_a_key_goes_with_its_value_and_its_comment_and_all_other_lines_stay(key: str, lines: str) -> None:
    assert lines in TEXT
    assert editing.dump(editing.remove_value(editing.load(TEXT), key)) == TEXT.replace(lines, "")


def test_a_key_within_braces_goes_and_the_comment_stays_in_its_column() -> None:
    document = editing.remove_value(editing.load(TEXT), "assets.policy.revision")
    removed = ", revision: null"
    assert editing.dump(document) == TEXT.replace(f"{removed}}}", "}" + " " * len(removed))


def test_a_list_goes_with_all_its_items() -> None:
    """Items may be indented as far as their key, and comments may stand between them."""
    items = "golden:\n- {text: a, ids: [1]}\n\n# between\n- text: b\n  ids: [2]\n"
    text = f"a: 1\n{items}# of the next key\nb: 2\n"
    assert editing.dump(editing.remove_value(editing.load(text), "golden")) == text.replace(items, "")


def test_a_key_goes_after_others_were_added() -> None:
    document = editing.load(TEXT)
    editing.set_value(document, "lengths.prompt", 64, "# new")
    assert editing.dump(editing.remove_value(document, "lengths.total")) == TEXT.replace("total: 1024", "prompt: 64  # new")


@pytest.mark.parametrize("key", ["none", "seed.a", "assets.policy.revison", "lengths.total.a"])
def test_a_key_that_is_not_there_cannot_go(key: str) -> None:
    with pytest.raises(StageError) as error:
        editing.remove_value(editing.load(TEXT), key)
    assert_message(str(error.value), key, "params.yaml", "no such key", "correct it")


def test_assets_are_found_by_their_repo() -> None:
    names = [name for name, _ in editing.find_assets(editing.load(TEXT)["assets"], "assets")]
    assert names == ["assets.policy", "assets.harness.mmlu"]


def test_the_comment_of_a_key_is_the_end_of_its_line() -> None:
    document = editing.load(TEXT)
    assert editing.get_comment(document, "seed") == "# model card"
    assert editing.get_comment(document["lengths"], "total") is None


def test_a_value_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(StageError) as error:
        editing.parse_value("[1", "--set eta=[1")
    assert_message(str(error.value), "--set eta=[1", "not valid YAML")
