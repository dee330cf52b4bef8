"""Speed of epsilon_map. As a table, CSV and plot: `part-fast bench ops --only epsilon_map`."""

OPS = ("epsilon_map",)


def test_speed(speed, case, provider):
    speed(case, provider)
