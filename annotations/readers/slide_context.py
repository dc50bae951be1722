"""Facts about a slide that some readers need: its size, resolution and offset, for formats not in level-0 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from annotations.errors import UserError

POWERS = (1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0)  # of objectives that scanners name


@dataclass(frozen=True)
class SlideContext:
    """The slide, as far as it is known; None where it is not.

    size_l0: width and height, mpp_l0: micrometres a pixel, both at level 0. offset_nm: where the slide's centre lies from
    the centre of the glass, nanometres (hamamatsu.XOffsetFromSlideCentre, YOffsetFromSlideCentre).
    """

    slide_id: str = ""
    size_l0: tuple[int, int] | None = None
    mpp_l0: float | None = None
    offset_nm: tuple[float, float] | None = None

    @property
    def magnification(self) -> float | None:
        """The objective power a scanner would name for this mpp (0.23 and 0.25: 40), which is what programs scale by."""
        mpp = self.mpp_l0
        if not mpp:
            return None
        return min(POWERS, key=lambda power: abs(np.log(10 / mpp / power)))

    def scale_of_image(self, width: float, height: float, source: str) -> float:
        """Return level-0 pixels a pixel of an image of the whole slide. Raises UserError where the two differ in shape."""
        if self.size_l0 is None:
            raise UserError(f"{source}: is {width:g} x {height:g}, of a slide of unknown size: give its scale or mpp")
        if not (width > 0 and height > 0):
            raise UserError(f"{source}: an image of {width:g} x {height:g}: save it again")
        across, down = self.size_l0[0] / width, self.size_l0[1] / height
        # The image may be rounded by a pixel either way.
        if abs(across - down) > max(across, down) * (1.5 / min(width, height) + 1e-3):
            whole = f"{self.size_l0[0]} x {self.size_l0[1]}"
            raise UserError(
                f"{source}: {width:g} x {height:g} is no reduced copy of the slide's {whole}: say --annotation-mpp, or crop it"
            )
        # An image of the slide's own size has its pixels, and one reduced by a whole number usually means that number.
        for value in (across, down, (across + down) / 2):
            if abs(round(value) - value) <= value * 1.5 / min(width, height) and round(value) >= 1:
                return float(round(value))
        return (across + down) / 2
