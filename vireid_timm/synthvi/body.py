"""SynthVI's bodies: draw a person in one pose from one side, from the shadow to the hat."""

import math

import numpy as np

from .canvas import BASE, EDGE, LAYERS, SHADOW, Canvas, View
from .person import (
    BACK_PRINT,
    BAG,
    BAG_TRIM,
    BELT,
    DARK,
    HAIR,
    HAT,
    HAT_TRIM,
    INNER,
    LOWER,
    PRINT,
    SCARF,
    SHOES,
    SKIN,
    SOCKS,
    SOLE,
    STRIPE,
    TRIM,
    UPPER,
    Pattern,
    Person,
    Upper,
)


def draw_labels(person: Person, view: View, size: tuple[int, int]) -> np.ndarray:
    """Draw a person as labels [height, width] uint8: 3 * material + shade, 0 for the background."""
    canvas = Canvas(view, person.body.stature, size)
    _shadow(canvas, person)
    torso = _torso_rows(person)
    back_first = canvas.cos > 0  # someone who faces the camera hides what hangs on their back
    if back_first:
        _back(canvas, person, torso)
    near = 1 if canvas.sin < 0 else -1  # the side of the body nearer the camera
    sideways = abs(canvas.sin) > 0.4
    if sideways:
        _arm(canvas, person, -near)
    _legs(canvas, person, near)
    _upper(canvas, person, torso)
    _straps(canvas, person, torso)
    if not sideways:
        _arm(canvas, person, -near)
    if not back_first:
        _back(canvas, person, torso)
    _hip_bag(canvas, person, torso)
    _arm(canvas, person, near)
    _neck(canvas, person)
    _head(canvas, person)
    labels = np.array(canvas.image)
    _apply_patterns(labels, canvas, person)
    return labels


def _shadow(canvas: Canvas, person: Person) -> None:
    x, y = canvas.point(0, 0, 0.005)
    across, down = canvas.scale
    wide, lean = canvas.size(0.17, 0), -canvas.view.light * 3
    canvas.pen.ellipse(
        [(x - wide + lean) * across, (y - 2.2) * down, (x + wide + lean) * across, (y + 2.4) * down], fill=SHADOW
    )


def _torso_rows(person: Person) -> list[tuple[float, float, float]]:
    """Return rows (t, half-width, half-depth) of the upper garment from the neck to its hem."""
    body, upper = person.body, person.upper
    deep = body.depth
    waist = (body.shoulder + body.hip) / 2
    rows = [
        (body.shoulder + 0.022, 0.036, 0.04),
        (body.shoulder, body.shoulder_width * 0.93, 0.05),
        (body.shoulder - 0.05, body.shoulder_width * upper.loose * 0.92, body.shoulder_width * deep * 0.8),
    ]
    width = body.waist_width * upper.loose
    rows.append((waist, width, width * deep))
    width = body.hip_width * upper.loose
    if upper.hem < body.hip:
        rows.append((body.hip, width, width * deep * 0.95))
    width *= upper.flare
    rows.append((min(upper.hem, waist - 0.02), width, width * deep * 0.95))
    return rows


def _row_at(rows: list[tuple[float, float, float]], t: float) -> tuple[float, float, float]:
    """Interpolate the tube's row at height t."""
    heights = [-row[0] for row in rows]
    return (
        t,
        float(np.interp(-t, heights, [row[1] for row in rows])),
        float(np.interp(-t, heights, [row[2] for row in rows])),
    )


def _rows_between(rows: list[tuple[float, float, float]], top: float, bottom: float, count: int = 4) -> list:
    return [_row_at(rows, top + (bottom - top) * i / (count - 1)) for i in range(count)]


def _upper(canvas: Canvas, person: Person, torso: list) -> None:
    upper, body = person.upper, person.body
    canvas.tube(torso, UPPER)
    top, hem = torso[1][0], torso[-1][0]
    if upper.hem_band:
        canvas.tube(_rows_between(torso, hem + upper.hem_band, hem, 2), TRIM)
    if upper.opening:
        rows = _rows_between(torso, body.shoulder + 0.015, hem - 0.004)
        gap = [upper.opening * share for share in (0.55, 0.7, 0.85, 1.0)]
        canvas.patch(rows, [(-g - 0.09, g + 0.09) for g in gap], DARK)
        canvas.patch(rows, [(-g, g) for g in gap], INNER)
        if hem < body.hip - 0.02:  # the lower garment shows below the shirt
            low = _rows_between(torso, body.hip - 0.02, hem - 0.004)
            canvas.patch(low, [(-upper.opening, upper.opening)] * 4, LOWER)
    elif upper.closure == 'zip':
        canvas.patch(_rows_between(torso, top, hem), [(-0.07, 0.07)] * 4, DARK)
    elif upper.closure == 'buttons':
        for row in _rows_between(torso, top - 0.03, hem + 0.03, 5):
            canvas.patch([row, _row_at(torso, row[0] - 0.016)], [(-0.12, 0.12)] * 2, TRIM)
    _print(canvas, torso, upper.front_print if not upper.opening else 'none', 0.0, PRINT, upper)
    _print(canvas, torso, upper.back_print, math.pi, BACK_PRINT, upper)
    if upper.belt:
        level = (body.shoulder + body.hip) / 2 - 0.05
        canvas.tube(_rows_between(torso, level + upper.belt / 2, level - upper.belt / 2, 2), BELT)


def _print_outline(kind: str) -> list[list[tuple[float, float]]]:
    """Return polygons of a print in -1..1, x to the person's left, y upwards."""
    if kind in ('disc', 'ring', 'star'):
        count = 10 if kind == 'star' else 16
        radius = [1.25 if i % 2 == 0 else 0.5 for i in range(count)] if kind == 'star' else [1.0] * count
        angle = [2 * math.pi * i / count for i in range(count)]
        return [[(r * math.sin(a), r * math.cos(a)) for r, a in zip(radius, angle, strict=True)]]
    return {
        'square': [[(-1, -1), (1, -1), (1, 1), (-1, 1)]],
        'triangle': [[(-1.2, -1), (1.2, -1), (0, 1.2)]],
        'diamond': [[(0, -1.4), (1, 0), (0, 1.4), (-1, 0)]],
        'cross': [
            [(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)],
            [(-0.4, -1.3), (0.4, -1.3), (0.4, 1.3), (-0.4, 1.3)],
        ],
        'bar': [[(-1.5, -0.45), (1.5, -0.45), (1.5, 0.45), (-1.5, 0.45)]],
        'bars': [[(-1.3, -1), (1.3, -1), (1.3, -0.4), (-1.3, -0.4)], [(-1.3, 0.4), (1.3, 0.4), (1.3, 1), (-1.3, 1)]],
        'column': [[(-0.5, -2.2), (0.5, -2.2), (0.5, 1.2), (-0.5, 1.2)]],
    }[kind]


def _print(canvas: Canvas, torso: list, kind: str, angle: float, material: int, upper: Upper) -> None:
    turn = math.remainder(angle + canvas.view.heading, 2 * math.pi)
    if kind == 'none' or abs(turn) > 1.25:
        return
    _, width, depth = _row_at(torso, upper.print_height)
    half = canvas.spread(width, depth)
    for scale, label in ((1.0, material), *(((0.5, UPPER),) if kind == 'ring' else ())):
        for outline in _print_outline(kind):
            points = []
            for x, y in outline:
                seen = max(-math.pi / 2, min(math.pi / 2, turn + x * scale * upper.print_size / max(half, 1e-6)))
                middle, down = canvas.point(0, 0, upper.print_height + y * scale * upper.print_size)
                points.append((middle + canvas.size(half, upper.print_height) * math.sin(seen), down))
            canvas.fill(points, 3 * label + BASE)


def _legs(canvas: Canvas, person: Person, near: int) -> None:
    lower, body = person.lower, person.body
    for side in (-near, near):
        _leg(canvas, person, side)
    width = body.hip_width * 1.02
    rows = [(body.hip + 0.06, body.waist_width, body.waist_width * body.depth), (body.hip, width, width * body.depth)]
    if lower.kind == 'skirt':
        wide = width * max(1.0, lower.flare)
        rows.append((min(lower.hem, body.hip - 0.08), wide, wide * max(body.depth, 0.8)))
    else:
        rows.append((body.hip - 0.05, width * 0.95, width * body.depth * 0.9))
    canvas.tube(rows, LOWER)


def _leg(canvas: Canvas, person: Person, side: int) -> None:
    body, lower, view = person.body, person.lower, canvas.view
    swing = side * view.swing * body.stride * math.sin(view.phase)
    bend = 0.08 + 0.9 * view.swing * max(0.0, side * math.cos(view.phase))
    thigh, shin = 0.47 * body.hip, 0.53 * body.hip - 0.02
    lateral = side * body.hip_width * 0.52
    knee = (lateral, thigh * math.sin(swing), body.hip - thigh * math.cos(swing))
    ankle = (lateral, knee[1] + shin * math.sin(swing - bend), knee[2] - shin * math.cos(swing - bend))
    hip, thick = (lateral, 0.0, body.hip), body.leg

    def along(t: float) -> tuple[float, float, float]:
        """Return the point of the leg that is at height t when the person stands still."""
        share = (body.hip - t) / (body.hip - 0.02)
        start, end, share = (hip, knee, share / 0.47) if share < 0.47 else (knee, ankle, (share - 0.47) / 0.53)
        return tuple(a + (b - a) * min(share, 1.0) for a, b in zip(start, end, strict=True))

    canvas.limb(SKIN, (*hip, thick), (*knee, thick * 0.72), (*ankle, thick * 0.5))
    if lower.socks:
        canvas.limb(SOCKS, (*along(lower.socks), thick * 0.66), (*ankle, thick * 0.58))
    toe = (ankle[0] + side * 0.012, ankle[1] + 0.065 * lower.shoe_size, ankle[2] - 0.002)
    canvas.limb(SOLE, (ankle[0], ankle[1] - 0.012, ankle[2] - 0.004, 0.024), (*toe, 0.02))
    instep = (toe[0], toe[1] - 0.008, toe[2] + 0.006)
    canvas.limb(SHOES, (ankle[0], ankle[1], ankle[2] + 0.004, 0.025), (*instep, 0.018))
    if lower.shoe > 0.06:
        canvas.limb(SHOES, (*along(lower.shoe), thick * 0.78), (*ankle, thick * 0.66))
    if lower.kind != 'skirt':
        _trouser_leg(canvas, person, (hip, knee, along(lower.hem)))


def _trouser_leg(canvas: Canvas, person: Person, joints: tuple) -> None:
    lower, thick = person.lower, person.body.leg
    hip, knee, end = joints
    wide = thick * 0.72 * lower.width
    if lower.hem > person.body.hip * 0.53:
        canvas.limb(LOWER, (*hip, thick), (*end, thick * 0.85 * lower.width))
    else:
        flare = lower.flare if lower.kind == 'trousers' else 0.8
        canvas.limb(LOWER, (*hip, thick * 1.02), (*knee, wide), (*end, wide * 0.85 * flare))
    if lower.stripe:
        radius = thick * lower.stripe
        outward = math.copysign(thick * 0.62, hip[0])
        joints = (hip, end) if lower.hem > person.body.hip * 0.53 else joints
        canvas.limb(STRIPE, *((lateral + outward, forward, t, radius) for lateral, forward, t in joints))


def _arm(canvas: Canvas, person: Person, side: int) -> None:
    body, upper, view = person.body, person.upper, canvas.view
    swing = -side * 0.9 * view.swing * body.stride * math.sin(view.phase)
    upper_arm, forearm = 0.175, 0.16
    shoulder = (side * body.shoulder_width * 0.92, 0.0, body.shoulder - 0.025)
    elbow = (shoulder[0] + side * 0.018, upper_arm * math.sin(swing), shoulder[2] - upper_arm * math.cos(swing))
    wrist = (
        elbow[0] + side * 0.006,
        elbow[1] + forearm * math.sin(swing + 0.3),
        elbow[2] - forearm * math.cos(swing + 0.3),
    )
    if person.bag.kind == 'handbag' and person.bag.side == side:
        _handbag(canvas, person, wrist)
    thick = body.arm
    canvas.oval(wrist[0], wrist[1], wrist[2] - 0.018, 0.022, 0.026, SKIN)
    canvas.limb(SKIN, (*shoulder, thick * 1.1), (*elbow, thick * 0.88), (*wrist, thick * 0.68))
    under = upper.kind == 'vest' or (upper.kind == 'dress' and upper.opening)
    material, sleeve = (INNER, 0.95) if under else (UPPER, upper.sleeve)
    if sleeve < 0.08:
        return
    wide = thick * (0.2 + 0.9 * upper.loose)
    if sleeve <= 0.5:
        end = tuple(a + (b - a) * sleeve / 0.5 for a, b in zip(shoulder, elbow, strict=True))
        canvas.limb(material, (*shoulder, max(wide, thick * 1.12)), (*end, wide * 0.95))
        return
    cuff = tuple(a + (b - a) * (sleeve - 0.5) / 0.5 for a, b in zip(elbow, wrist, strict=True))
    canvas.limb(material, (*shoulder, max(wide, thick * 1.12)), (*elbow, wide * 0.9), (*cuff, wide * 0.82))
    if upper.cuffs:
        canvas.limb(TRIM, (*cuff, wide * 0.9), (cuff[0], cuff[1], cuff[2] + 0.012, wide * 0.9))


def _handbag(canvas: Canvas, person: Person, wrist: tuple[float, float, float]) -> None:
    bag = person.bag
    top = wrist[2] - 0.055
    bottom = top - bag.height * 0.75
    wide, deep = bag.thick * 0.6, bag.width
    x, y = canvas.point(wrist[0], wrist[1], wrist[2] - 0.01)
    half, (_, level) = canvas.size(canvas.spread(wide, deep), top), canvas.point(wrist[0], wrist[1], top)
    _, low = canvas.point(wrist[0], wrist[1], bottom)
    canvas.fill([(x, y), (x + half * 0.8, level), (x - half * 0.8, level)], 3 * BAG_TRIM + EDGE)
    for grow, shade in LAYERS:
        canvas.trapezoid(x, (half * 0.85, level), (half, low), 3 * BAG + shade, grow)
    if bag.pocket:
        third = level + (low - level) / 3
        canvas.trapezoid(x, (half, third), (half, third + (low - level) / 3), 3 * BAG_TRIM + BASE)


def _back(canvas: Canvas, person: Person, torso: list) -> None:
    """Draw a backpack and, if seen from the front, hair (from behind, hair is drawn with the head)."""
    bag, body = person.bag, person.body
    if bag.kind == 'backpack':
        wide, thick = 0.055 + 0.5 * bag.width, bag.thick
        behind = -_row_at(torso, body.shoulder - 0.08)[2] - thick * 0.8
        top, bottom = body.shoulder + 0.01, body.shoulder - 0.06 - bag.height
        rows = [
            (top, wide * 0.75, thick * 0.7),
            (top - 0.03, wide, thick),
            (bottom + 0.02, wide * 1.03, thick * 1.1),
            (bottom, wide * 0.9, thick),
        ]
        canvas.tube(rows, BAG, behind)
        if bag.pocket:
            middle = (top + bottom) / 2 - 0.01
            canvas.tube(
                [(middle, wide * 0.75, thick * 1.05), (bottom + 0.015, wide * 0.75, thick * 1.12)],
                BAG_TRIM,
                behind * 1.04,
            )
    if canvas.cos > 0:
        _hanging_hair(canvas, person)


def _straps(canvas: Canvas, person: Person, torso: list) -> None:
    bag, body = person.bag, person.body
    if bag.kind == 'backpack':
        rows = _rows_between(torso, body.shoulder + 0.01, body.shoulder - 0.17, 3)
        for side in (-1, 1):
            canvas.patch(rows, [(side * 0.62 - 0.14, side * 0.62 + 0.14)] * 3, BAG)
    elif bag.kind == 'crossbody':
        rows = _rows_between(torso, body.shoulder + 0.015, bag.drop, 6)
        for face in (0.0, math.pi):
            lean = -bag.side if face == 0.0 else bag.side
            angles = [face + lean * 0.65 * (1 - 2 * i / 5) for i in range(6)]
            canvas.patch(rows, [(angle - 0.12, angle + 0.12) for angle in angles], BAG)


def _hip_bag(canvas: Canvas, person: Person, torso: list) -> None:
    """Draw a bag at the hip or high under the arm, unless the body hides it."""
    bag, body = person.bag, person.body
    if bag.kind not in ('crossbody', 'shoulder'):
        return
    top = bag.drop if bag.kind == 'crossbody' else bag.drop + 0.08
    bottom = top - bag.height * 0.8
    lateral = bag.side * (_row_at(torso, top)[1] + bag.thick * 0.5)
    if canvas.depth(lateral, 0) < -0.07:
        return
    if bag.kind == 'shoulder':
        strap = (bag.side * body.shoulder_width * 0.72, 0.0, body.shoulder, 0.011)
        canvas.limb(BAG, strap, (lateral, 0.0, top, 0.011))
    (x, y), (_, low) = canvas.point(lateral, 0, top), canvas.point(lateral, 0, bottom)
    half = canvas.size(canvas.spread(bag.thick, bag.width), top)
    for grow, shade in LAYERS:
        canvas.trapezoid(x, (half, y), (half * 1.05, low), 3 * BAG + shade, grow)
    if bag.pocket:
        canvas.fill(
            [
                (x - half, y),
                (x + half, y),
                (x + half, y + (low - y) * 0.4),
                (x, y + (low - y) * 0.6),
                (x - half, y + (low - y) * 0.4),
            ],
            3 * BAG_TRIM + BASE,
        )


def _neck(canvas: Canvas, person: Person) -> None:
    body, head, upper = person.body, person.head, person.upper
    top = body.shoulder + 0.05
    canvas.limb(SKIN, (0, 0, body.shoulder + 0.005, 0.03), (0, 0.005, top, 0.028))
    if canvas.cos > 0.25 and upper.collar == 'vee':
        x, y = canvas.point(0, 0.05, body.shoulder + 0.02)
        half, low = canvas.size(0.035, 0.8), y + canvas.tall * 0.085
        canvas.fill([(x - half, y), (x + half, y), (x, low)], 3 * SKIN + BASE)
    if upper.collar == 'turtle':
        canvas.limb(TRIM, (0, 0, body.shoulder + 0.012, 0.042), (0, 0, body.shoulder + 0.036, 0.036))
    elif upper.collar == 'lapel':
        for side in (-1, 1):
            if canvas.depth(side * 0.03, 0.02) > -0.02:
                high, low = body.shoulder + 0.016, body.shoulder - 0.05
                canvas.limb(TRIM, (side * 0.045, 0.0, high, 0.014), (side * 0.02, 0.05, low, 0.012))
    elif upper.collar == 'hood' and head.hat != 'hood':
        canvas.oval(0, -0.045, body.shoulder + 0.005, canvas.spread(0.075, 0.05), 0.034, UPPER)
    if head.scarf:
        canvas.oval(0, 0.005, body.shoulder + 0.025, 0.055 * head.scarf**0.5, 0.028 * head.scarf, SCARF)
        if canvas.cos > 0:
            end = body.shoulder - 0.13 * head.scarf
            canvas.limb(SCARF, (0.025, 0.06, body.shoulder + 0.01, 0.018), (0.03, 0.07, end, 0.02))


def _hanging_hair(canvas: Canvas, person: Person) -> None:
    head, body = person.head, person.body
    top, size = 1.0 - person.body.head, person.body.head
    wide, deep = size * 0.86 * head.hair_volume, size * 0.7
    if head.hair in ('long', 'bob'):
        end = body.shoulder + 0.03 if head.hair == 'bob' else body.shoulder - head.hair_length + 0.04
        rows = [(top, wide, deep), ((top + end) / 2, wide * 1.08, deep), (end, wide * 0.95, deep * 0.7)]
        canvas.tube(rows, HAIR, -size * 0.35)
    elif head.hair == 'ponytail':
        canvas.limb(HAIR, (0, -size * 0.95, top + 0.02, 0.018), (0, -size * 1.5, top - head.hair_length, 0.022))


def _head(canvas: Canvas, person: Person) -> None:
    head, size = person.head, person.body.head
    middle = 1.0 - size
    wide = canvas.spread(size * 0.76, size * 0.9)
    if canvas.cos <= 0:
        canvas.oval(0, 0, middle, wide, size, SKIN)
    volume = {'bald': 0.0, 'afro': 1.28 * head.hair_volume}.get(head.hair, head.hair_volume)
    if volume:
        raised = 0.25 if head.hair != 'afro' else 0.15
        canvas.oval(0, -size * 0.12, middle + size * raised, wide * volume, size * (0.62 + 0.28 * volume), HAIR)
    if head.hair == 'bun':
        canvas.oval(0, -size * 0.5, 1.0 + size * 0.3, size * 0.42 * head.hair_volume, size * 0.42, HAIR)
    elif head.hair == 'spiky':
        for shift in (-0.5, 0.0, 0.5):
            (x, y), reach = canvas.point(shift * size, 0, 1.0), canvas.size(size, 1.0)
            canvas.fill(
                [
                    (x - reach * 0.35, y + reach * 0.3),
                    (x + reach * 0.35, y + reach * 0.3),
                    (x + shift * reach * 0.4, y - reach * 0.55),
                ],
                3 * HAIR + BASE,
            )
    if canvas.cos > -0.35:
        _face(canvas, person, middle, wide)
    if canvas.cos <= 0:
        _hanging_hair(canvas, person)
    _hat(canvas, person, middle, wide)


def _face(canvas: Canvas, person: Person, middle: float, wide: float) -> None:
    size = person.body.head
    seen = 0.55 + 0.45 * max(0.0, canvas.cos)
    bare = person.head.hair == 'bald'
    canvas.oval(
        0,
        size * 0.42,
        middle - (0 if bare else size * 0.16),
        wide * (1.0 if bare else seen),
        size * (1.0 if bare else 0.84),
        SKIN,
    )
    if person.head.beard:
        canvas.oval(0, size * 0.5, middle - size * 0.62, wide * seen * 0.72, size * 0.36, HAIR)
    if canvas.cos > 0.1:
        for side in (-1, 1):
            if canvas.depth(side * size * 0.35, size * 0.5) > 0:
                height = middle + size * 0.02
                canvas.oval(side * size * 0.36, size * 0.75, height, size * 0.075, size * 0.075, DARK, EDGE)


def _hat(canvas: Canvas, person: Person, middle: float, wide: float) -> None:
    head, size = person.head, person.body.head
    if head.hat == 'none':
        return
    level, big = middle + size * 0.42, wide * (0.98 + 0.18 * head.hat_size)
    if head.hat == 'hood':
        canvas.oval(0, -size * 0.15, middle + size * 0.1, wide * 1.28, size * 1.2, UPPER)
        if canvas.cos > -0.2:
            canvas.oval(0, size * 0.4, middle - size * 0.05, wide * (0.5 + 0.35 * max(canvas.cos, 0)), size * 0.8, SKIN)
        return
    crown = {'cap': 0.75, 'beanie': 0.95, 'brim': 0.9}[head.hat] * head.hat_size
    rows = [
        (level + size * crown, big * 0.55, big * 0.55),
        (level + size * crown * 0.7, big * 0.9, big * 0.9),
        (level - size * 0.05, big, big),
    ]
    canvas.tube(rows, HAT)
    if head.hat == 'cap':
        reach = size * (1.0 + 0.6 * head.hat_size)
        canvas.limb(HAT_TRIM, (0, size * 0.7, level, size * 0.16), (0, reach, level - size * 0.1, size * 0.13))
    elif head.hat == 'beanie':
        rim = big * 1.05
        canvas.tube([(level + size * 0.18, rim, rim), (level - size * 0.2, rim, rim)], HAT_TRIM)
        if head.hat_size > 1.1:
            canvas.oval(0, 0, level + size * crown * 1.1, size * 0.3, size * 0.3, HAT_TRIM)
    else:
        canvas.oval(0, 0, level, size * (1.1 + 0.75 * head.hat_size), size * 0.2, HAT)
        canvas.tube([(level + size * 0.35, big, big), (level + size * 0.12, big, big)], HAT_TRIM)


def _apply_patterns(labels: np.ndarray, canvas: Canvas, person: Person) -> None:
    """Turn cloth into its pattern where the pattern is coloured; changes labels [height, width] in place."""
    height, width = labels.shape
    view, body = canvas.view, person.body
    heights = np.linspace(-0.15, 1.15, 53)
    rows = view.foot - canvas.tall * (heights + view.tilt * heights * (heights - 1))
    t = np.interp((np.arange(height) + 0.5) / canvas.scale[1], rows[::-1], heights[::-1])
    x = ((np.arange(width) + 0.5) / canvas.scale[0] - view.middle) / canvas.tall
    garments = (
        (UPPER, person.upper.pattern, body.shoulder_width, body.shoulder),
        (INNER, person.upper.inner, body.shoulder_width, body.shoulder),
        (LOWER, person.lower.pattern, body.hip_width, body.hip),
    )
    for material, pattern, wide, top in garments:
        if pattern.kind == 'plain':
            continue
        half = canvas.spread(wide, wide * body.depth)
        angle = np.arcsin(np.clip(x / half, -1, 1)) - view.heading
        across = wide * (angle + np.clip(np.abs(x / half) - 1, 0, None) * np.sign(x))
        cloth = (labels >= 3 * material) & (labels < 3 * material + 3)
        labels[cloth & pattern_mask(pattern, across[None, :], (top - t)[:, None])] += 3


def pattern_mask(pattern: Pattern, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return where a pattern is coloured, bool [H, W].

    Args:
        pattern: The pattern.
        across: Position along the cloth of each column, in body heights, [1, W].
        down: Position below the cloth's top of each row, in body heights, [H, 1].
    """
    u, v = across / pattern.period + pattern.phase, down / pattern.period + pattern.phase
    on_u, on_v = u % 1 < pattern.duty, v % 1 < pattern.duty
    if pattern.kind == 'horizontal':
        return on_v & np.ones_like(on_u)
    if pattern.kind == 'vertical':
        return on_u & np.ones_like(on_v)
    if pattern.kind == 'checks':
        return (u % 1 < 0.5) ^ (v % 1 < 0.5)
    if pattern.kind == 'dots':
        return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < (0.25 + 0.25 * pattern.duty) ** 2
    if pattern.kind == 'diagonal':
        return (u + v) % 1 < pattern.duty
    if pattern.kind == 'diamonds':
        return np.abs(u % 1 - 0.5) + np.abs(v % 1 - 0.5) < 0.3 + 0.3 * pattern.duty
    if pattern.kind == 'chevron':
        return (v + np.abs(u % 2 - 1)) % 1 < pattern.duty
    start = 0.05 + 0.14 * pattern.phase
    inside = (down > start) & (down < start + 0.8 * pattern.period) if pattern.kind == 'band' else down > start
    return inside & np.ones_like(on_u)
