"""Assertions about messages: what they must name, not how they are worded."""


def assert_message(text: str, *parts: str) -> None:
    """Assert that the last line of a message or of a process's stderr names each of the parts: file, row, key, remedy."""
    line = text.strip().splitlines()[-1] if text.strip() else ""
    missing = [part for part in parts if part not in line]
    assert not missing, f"not in the message: {missing}\n{text}"
    assert "Traceback" not in text, text
