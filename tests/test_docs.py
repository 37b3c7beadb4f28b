"""Numbers in the README are those of the committed result files."""

from pathlib import Path

import readme


def test_measured_blocks_are_up_to_date():
    text = (Path(readme.__file__).parent.parent / "README.md").read_text()
    assert readme.filled(text) == text, "run: python bench/readme.py"
