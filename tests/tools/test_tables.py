"""The tables of modes on the pages are those of the files."""

import modes


def test_the_pages_have_the_tables_of_the_modes() -> None:
    for page, text in modes.pages().items():
        assert page.read_text() == text, "run python tests/tools/modes.py"
        assert "\n| `meanflow` | " in text
