"""Speed of cam. As a table, CSV and plot: `part-fast bench ops --only cam`."""

OPS = ("cam",)


def test_speed(speed, case, provider):
    speed(case, provider)
