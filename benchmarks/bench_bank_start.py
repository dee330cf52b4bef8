"""Speed of bank_start. As a table, CSV and plot: `part-fast bench ops --only bank_start`."""

OPS = ("bank_start",)


def test_speed(speed, case, provider):
    speed(case, provider)
