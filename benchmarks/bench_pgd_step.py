"""Speed of pgd_step and pgd_step_. As a table, CSV and plot: `part-fast bench ops --only pgd_step pgd_step_`."""

OPS = ("pgd_step", "pgd_step_")


def test_speed(speed, case, provider):
    speed(case, provider)
