"""Speed of project_linf. As a table, CSV and plot: `part-fast bench ops --only project_linf`."""

OPS = ("project_linf",)


def test_speed(speed, case, provider):
    speed(case, provider)
