"""Speed of upsample_cam. As a table, CSV and plot: `part-fast bench ops --only upsample_cam`."""

OPS = ("upsample_cam",)


def test_speed(speed, case, provider):
    speed(case, provider)
