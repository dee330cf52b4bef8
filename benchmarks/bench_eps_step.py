"""Speed of eps_step_. As a table, CSV and plot: `part-fast bench ops --only eps_step_`."""

OPS = ("eps_step_",)


def test_speed(speed, case, provider):
    speed(case, provider)
