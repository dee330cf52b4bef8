"""Speed of uniform_start. As a table, CSV and plot: `part-fast bench ops --only uniform_start`."""

OPS = ("uniform_start",)


def test_speed(speed, case, provider):
    speed(case, provider)
