"""What a run shows while it runs: a bar in a terminal, a line a minute in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

from part_fast.optional import needs

with needs("tqdm", "train"):
    from tqdm import tqdm

SECONDS = 60.0  # between two lines of a log


class Progress:
    """Counts images of a run; shows the epoch, its mean loss so far, and when it tests.

    images: of the whole run. done: of them, before this start. epochs: of the whole run. log: gets the lines.
    shown: False in the processes that do not speak.
    """

    def __init__(self, images: int, done: int, epochs: int, log: Callable[[str], None], shown: bool) -> None:
        self.bar = tqdm(total=images, initial=done, unit="img", dynamic_ncols=True, disable=None if shown else True)
        self.epochs, self.log = epochs, log if shown and self.bar.disable else None
        self.images, self.done, self.here = images, done, 0
        self.began = self.said = time.monotonic()
        self.what = ""
        self.loss: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def phase(self, epoch: int, what: str = "") -> None:
        """Epoch `epoch`, counted from 0, has begun, or is in that phase."""
        self.loss = self.loss if what else None
        self.what = f"epoch {epoch + 1}/{self.epochs}{', ' * bool(what)}{what}"
        self.bar.set_description(self.what)

    def update(self, images: int, loss: float | None = None) -> None:
        """So many images more. loss: the epoch's mean so far, where it is known; a GPU is seldom asked for it."""
        self.here += images
        if loss is not None:
            self.loss = loss
            self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self.bar.update(images)
        now = time.monotonic()
        if self.log is not None and now - self.said >= SECONDS:
            self.said = now
            speed = self.here / (now - self.began)
            left = (self.images - self.done - self.here) / speed / 60
            said = "" if self.loss is None else f", loss {self.loss:.4g}"
            self.log(
                f"in {self.what}: {self.done + self.here} of {self.images} images{said}, {speed:.0f} img/s, "
                f"about {left:.0f} min left"
            )
