"""What is shown."""

from common.console import aligned


def test_columns_are_aligned() -> None:
    cells = [["a", "bc"], ["long", "d"]]
    assert aligned(cells) == ["a     bc", "long   d"]
    assert aligned(cells, left=(0, 1)) == ["a     bc", "long  d"]
