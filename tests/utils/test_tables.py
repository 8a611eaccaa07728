"""Tables as text. Oracle: the tables in this file."""

from qat.utils.tables import text_table


def test_numbers_are_on_the_right_and_nothing_is_cut_or_read_as_markup():
    name = "x" * 200
    table = text_table(["name", "bits"], [(name, 8), ("[bold]\x1b", None), ("c", 16)])
    assert table.splitlines()[1:-1] == [
        f"│ name{' ' * 196} │ bits │",
        f"├{'─' * 202}┼──────┤",
        f"│ {name} │    8 │",
        f"│ [bold]\\x1b{' ' * 190} │    – │",
        f"│ c{' ' * 199} │   16 │",
    ]
