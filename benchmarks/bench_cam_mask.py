"""Speed of cam_mask. As a table, CSV and plot: `part-fast bench ops --only cam_mask`."""

OPS = ("cam_mask",)


def test_speed(speed, case, provider):
    speed(case, provider)
