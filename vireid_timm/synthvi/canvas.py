"""SynthVI's canvas: body parts drawn as labels, 3 * material + shade."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from .person import GROUND

EDGE, BASE, LIT = range(3)  # the shades of a material
SHADES = np.array([0.62, 0.97, 1.12])  # brightness of the shades
SHADOW = 3 * GROUND + BASE  # the ground's only label, which darkens what lies below
FRAME = (128, 64)  # height and width of an image in drawing units


@dataclass(frozen=True)
class View:
    """How one image shows a person; lengths are in drawing units (FRAME).

    Attributes:
        heading: Direction the person faces: 0 towards the camera, pi/2 to the right of the image.
        tall: Height of a person of stature 1.
        middle: Horizontal position of the person.
        foot: Vertical position of the soles.
        tilt: Positive if seen from above: higher parts are drawn larger.
        phase: Phase of the walking cycle.
        swing: Amplitude of the walking cycle.
        light: -1 if lit from the left, 1 from the right.
    """

    heading: float
    tall: float
    middle: float
    foot: float
    tilt: float
    phase: float
    swing: float
    light: int


_ARC = [(math.sin(math.pi * i / 5), math.cos(math.pi * i / 5)) for i in range(6)]
LAYERS = ((0.55, EDGE), (0.0, BASE))  # (growth of a part, shade): outlines separate parts that look alike


class Canvas:
    """A label map on which body parts are drawn, one over the other.

    Args:
        view: The image's view.
        stature: Stature of the person.
        size: Height and width in pixels; FRAME is stretched over it.
    """

    def __init__(self, view: View, stature: float, size: tuple[int, int]) -> None:
        self.view = view
        self.tall = view.tall * stature
        self.cos, self.sin = math.cos(view.heading), math.sin(view.heading)
        self.scale = size[1] / FRAME[1], size[0] / FRAME[0]
        self.image = Image.new('L', (size[1], size[0]))
        self.pen = ImageDraw.Draw(self.image)

    def size(self, length: float, t: float) -> float:
        """Return a horizontal length at height t in drawing units."""
        return length * self.tall * (1 + self.view.tilt * (2 * t - 1))

    def point(self, lateral: float, forward: float, t: float) -> tuple[float, float]:
        """Project a point of the body's frame, in drawing units."""
        across = self.size(lateral * self.cos + forward * self.sin, t)
        return self.view.middle + across, self.view.foot - self.tall * (t + self.view.tilt * t * (t - 1))

    def depth(self, lateral: float, forward: float) -> float:
        """Return how near the camera a point is; larger is nearer."""
        return forward * self.cos - lateral * self.sin

    def spread(self, lateral: float, forward: float) -> float:
        """Return half the visible width of an upright ellipse with these half-axes."""
        return math.hypot(lateral * self.cos, forward * self.sin)

    def fill(self, points: list[tuple[float, float]], label: int) -> None:
        """Fill a polygon given in drawing units."""
        across, down = self.scale
        self.pen.polygon([(x * across, y * down) for x, y in points], fill=label)

    def trapezoid(
        self, x: float, top: tuple[float, float], bottom: tuple[float, float], label: int, grow: float = 0.0
    ) -> None:
        """Fill an upright trapezoid around x, given (half-width, y) of its top and bottom in drawing units."""
        (wide, y), (low_wide, low_y) = top, bottom
        upper = [(x - wide - grow, y - grow), (x + wide + grow, y - grow)]
        self.fill([*upper, (x + low_wide + grow, low_y + grow), (x - low_wide - grow, low_y + grow)], label)

    def limb(self, material: int, *joints: tuple[float, float, float, float]) -> None:
        """Draw a chain of joints (lateral, forward, t, radius): edges darker, the lit side lighter."""
        ends = [(*self.point(*joint[:3]), self.size(joint[3], joint[2])) for joint in joints]
        glint = 0.3 * self.view.light
        for grow, shift, share, shade in ((0.55, 0.0, 1.0, EDGE), (0.0, 0.0, 1.0, BASE), (0.0, glint, 0.45, LIT)):
            for (x0, y0, r0), (x1, y1, r1) in pairwise(ends):
                length = max(math.hypot(x1 - x0, y1 - y0), 1e-6)
                ux, uy = (x1 - x0) / length, (y1 - y0) / length
                a, b = r0 * share + grow, r1 * share + grow
                x0, x1 = x0 + shift * r0, x1 + shift * r1
                points = [(x0 - ux * a * s - uy * a * c, y0 - uy * a * s + ux * a * c) for s, c in _ARC]
                points += [(x1 + ux * b * s + uy * b * c, y1 + uy * b * s - ux * b * c) for s, c in _ARC]
                self.fill(points, 3 * material + shade)

    def tube(self, rows: list[tuple[float, float, float]], material: int, forward: float = 0.0) -> None:
        """Draw a garment around the body: rows of (t, half-width, half-depth), edges darker, the lit side lighter."""
        sides = []
        for t, width, depth in rows:
            x, y = self.point(0.0, forward, t)
            sides.append((x, y, self.size(self.spread(width, depth), t)))
        lit_side = (0.1, 0.75) if self.view.light > 0 else (-0.75, -0.1)
        for low, high, grow, shade in ((-1, 1, 0.55, EDGE), (-1, 1, 0.0, BASE), (*lit_side, 0.0, LIT)):
            left = [(x + low * half - grow, y) for x, y, half in sides]
            right = [(x + high * half + grow, y) for x, y, half in reversed(sides)]
            self.fill(left + right, 3 * material + shade)

    def patch(self, rows: list[tuple[float, float, float]], angles: list[tuple[float, float]], material: int) -> None:
        """Draw part of a tube's surface, between two body angles per row (0 front, positive to the left)."""
        left, right = [], []
        turn = self.view.heading
        middle = (angles[0][0] + angles[0][1]) / 2 + turn
        turn -= 2 * math.pi * round(middle / (2 * math.pi))  # the nearest of the equivalent angles
        for (t, width, depth), (start, stop) in zip(rows, angles, strict=True):
            x, y = self.point(0.0, 0.0, t)
            half = self.size(self.spread(width, depth), t)
            start, stop = (max(-math.pi / 2, min(math.pi / 2, angle + turn)) for angle in (start, stop))
            left.append((x + half * math.sin(start), y))
            right.append((x + half * math.sin(stop), y))
        if max(b[0] - a[0] for a, b in zip(left, right, strict=True)) > 0.3:
            self.fill(left + right[::-1], 3 * material + BASE)

    def oval(
        self, lateral: float, forward: float, t: float, width: float, height: float, material: int, shade: int = BASE
    ) -> None:
        """Draw an upright ellipse with the given half-axes around a point of the body's frame; `width` is as seen."""
        x, y = self.point(lateral, forward, t)
        wide, high = self.size(width, t), self.tall * height * (1 + self.view.tilt * (2 * t - 1))
        across, down = self.scale
        for grow, layer in LAYERS if shade == BASE else ((0.0, shade),):
            box = (x - wide - grow, y - high - grow, x + wide + grow, y + high + grow)
            self.pen.ellipse(
                [box[0] * across, box[1] * down, box[2] * across, box[3] * down], fill=3 * material + layer
            )
