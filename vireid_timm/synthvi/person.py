"""SynthVI's people: everything that an identity fixes.

A person is drawn as a map of *materials* (skin, hair, cloth, the cloth's pattern, leather, ...), not of colours. Each
spectrum has a table with one row per material that gives its appearance, so the spectra share geometry but not
appearance. A pattern vanishes in the infrared if its row equals the row of its cloth.

Lengths are fractions of the person's height. In the body's frame `lateral` points to the person's left, `forward` where
they look, and `t` runs from the feet (0) to the crown (1). A heading of 0 faces the camera; pi shows the back.
"""

from dataclasses import dataclass

import numpy as np

# Materials. The obstacles are not part of a person; their look differs between images.
(
    GROUND,
    SKIN,
    HAIR,
    UPPER,
    UPPER_PATTERN,
    INNER,
    INNER_PATTERN,
    LOWER,
    LOWER_PATTERN,
    SHOES,
    SOLE,
    BAG,
    BAG_TRIM,
    HAT,
    HAT_TRIM,
    SCARF,
    BELT,
    PRINT,
    BACK_PRINT,
    TRIM,
    SOCKS,
    STRIPE,
    DARK,
    OBSTACLE,
    OBSTACLE_TRIM,
) = range(25)
NUM_MATERIALS = 25
PAIRED = {
    UPPER_PATTERN: UPPER,
    INNER_PATTERN: INNER,
    LOWER_PATTERN: LOWER,
    PRINT: UPPER,
    BACK_PRINT: UPPER,
    TRIM: UPPER,
    STRIPE: LOWER,
    BAG_TRIM: BAG,
    HAT_TRIM: HAT,
    SOLE: SHOES,
}  # decoration -> what it decorates

PATTERNS = ('plain', 'horizontal', 'vertical', 'checks', 'dots', 'diagonal', 'band', 'block', 'diamonds', 'chevron')
PRINTS = ('none', 'disc', 'square', 'triangle', 'diamond', 'ring', 'cross', 'bar', 'bars', 'column', 'star')
UPPERS = ('tee', 'shirt', 'tank', 'hoodie', 'jacket', 'coat', 'dress', 'vest')
LOWERS = ('trousers', 'shorts', 'skirt', 'leggings')
HAIRS = ('bald', 'short', 'bob', 'long', 'ponytail', 'bun', 'afro', 'spiky')
HATS = ('none', 'cap', 'beanie', 'brim', 'hood')
BAGS = ('none', 'backpack', 'crossbody', 'shoulder', 'handbag')


@dataclass(frozen=True)
class Pattern:
    """A surface pattern: its kind, the width of one repeat, the share of it that is coloured, and where it starts."""

    kind: str
    period: float
    duty: float
    phase: float


@dataclass(frozen=True)
class Body:
    """Proportions as fractions of the height; `stature` scales the whole person within the image."""

    stature: float
    hip: float
    shoulder: float
    shoulder_width: float
    waist_width: float
    hip_width: float
    depth: float
    head: float
    arm: float
    leg: float
    stride: float


@dataclass(frozen=True)
class Head:
    """Hair, beard, hat and scarf."""

    hair: str
    hair_length: float
    hair_volume: float
    beard: bool
    hat: str
    hat_size: float
    scarf: float


@dataclass(frozen=True)
class Upper:
    """The upper garment. `opening` is the half-angle by which it stands open, 0 when closed; `hem` is a height t."""

    kind: str
    sleeve: float
    hem: float
    flare: float
    loose: float
    opening: float
    closure: str
    collar: str
    belt: float
    cuffs: bool
    hem_band: float
    pattern: Pattern
    inner: Pattern
    front_print: str
    back_print: str
    print_size: float
    print_height: float


@dataclass(frozen=True)
class Lower:
    """The lower garment, socks and shoes. `hem` is a height t."""

    kind: str
    hem: float
    width: float
    flare: float
    stripe: float
    pattern: Pattern
    socks: float
    shoe: float
    shoe_size: float


@dataclass(frozen=True)
class Bag:
    """The bag; `side` is +1 for the person's left."""

    kind: str
    side: int
    width: float
    height: float
    thick: float
    drop: float
    pocket: bool


@dataclass(frozen=True, eq=False)
class Person:
    """Everything that an identity fixes.

    Attributes:
        visible: Colour of each material, [NUM_MATERIALS, 3] in 0..1.
        near_infrared: Reflectance of each material under an infrared lamp, [NUM_MATERIALS] in 0..1.
        thermal: Apparent warmth of each material, [NUM_MATERIALS] in 0..1.
    """

    body: Body
    head: Head
    upper: Upper
    lower: Lower
    bag: Bag
    visible: np.ndarray
    near_infrared: np.ndarray
    thermal: np.ndarray


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw one number from [low, high)."""
    return low + (high - low) * float(rng.random())


def pick(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
    """Draw one of the names, equally likely unless weights are given."""
    weights = weights or (1.0,) * len(names)
    reached = np.cumsum(weights) / sum(weights)
    return names[min(int(np.searchsorted(reached, rng.random(), side='right')), len(names) - 1)]


def draw_person(rng: np.random.Generator) -> Person:
    """Draw an identity."""
    body = Body(
        stature=uniform(rng, 0.93, 1.05),
        hip=uniform(rng, 0.455, 0.525),
        shoulder=uniform(rng, 0.80, 0.83),
        shoulder_width=uniform(rng, 0.095, 0.135),
        waist_width=uniform(rng, 0.070, 0.115),
        hip_width=uniform(rng, 0.080, 0.115),
        depth=uniform(rng, 0.60, 0.85),
        head=uniform(rng, 0.060, 0.073),
        arm=uniform(rng, 0.022, 0.033),
        leg=uniform(rng, 0.042, 0.056),
        stride=uniform(rng, 0.6, 1.2),
    )
    hat = pick(rng, HATS, (0.55, 0.15, 0.12, 0.10, 0.08))
    head = Head(
        hair=pick(rng, HAIRS, (0.06, 0.24, 0.14, 0.20, 0.12, 0.09, 0.08, 0.07)),
        hair_length=uniform(rng, 0.08, 0.24),
        hair_volume=uniform(rng, 1.08, 1.28),
        beard=bool(rng.random() < 0.15),
        hat=hat,
        hat_size=uniform(rng, 0.8, 1.3),
        scarf=uniform(rng, 0.5, 1.3) if rng.random() < 0.15 else 0.0,
    )
    upper = _draw_upper(rng, body)
    lower = _draw_lower(rng, upper)
    bag = Bag(
        kind=pick(rng, BAGS, (0.34, 0.22, 0.16, 0.12, 0.16)),
        side=-1 if rng.random() < 0.5 else 1,
        width=uniform(rng, 0.06, 0.12),
        height=uniform(rng, 0.09, 0.25),
        thick=uniform(rng, 0.035, 0.075),
        drop=uniform(rng, 0.36, 0.56),
        pocket=bool(rng.random() < 0.6),
    )
    return Person(body, head, upper, lower, bag, _visible_tones(rng), _near_infrared_tones(rng), _thermal_tones(rng))


def _draw_pattern(rng: np.random.Generator, plain: float) -> Pattern:
    kind = 'plain' if rng.random() < plain else PATTERNS[1 + int(rng.integers(len(PATTERNS) - 1))]
    return Pattern(kind, uniform(rng, 0.045, 0.13), uniform(rng, 0.35, 0.65), uniform(rng, 0, 1))


def _draw_upper(rng: np.random.Generator, body: Body) -> Upper:
    kind = pick(rng, UPPERS, (0.17, 0.17, 0.06, 0.13, 0.17, 0.13, 0.10, 0.07))
    sleeves = {'tee': (0.25, 0.5), 'tank': (0.0, 0.0), 'vest': (0.0, 0.0), 'dress': (0.0, 1.0), 'shirt': (0.6, 1.0)}
    hems = {'coat': (-0.28, -0.08), 'dress': (-0.34, -0.1), 'vest': (-0.02, 0.05), 'jacket': (-0.05, 0.06)}
    low, high = hems.get(kind, (-0.06, 0.04))
    layered = kind in ('jacket', 'coat', 'vest')
    front = PRINTS[int(rng.integers(1, len(PRINTS)))] if rng.random() < 0.5 else 'none'
    back = front if rng.random() < 0.5 else PRINTS[int(rng.integers(len(PRINTS)))]
    return Upper(
        kind=kind,
        sleeve=uniform(rng, *sleeves.get(kind, (0.85, 1.0))),
        hem=body.hip + uniform(rng, low, high),
        flare=uniform(rng, 1.0, 1.75) if kind in ('dress', 'coat') else uniform(rng, 0.95, 1.2),
        loose=uniform(rng, 1.0, 1.3),
        opening=uniform(rng, 0.2, 0.9) if layered and rng.random() < 0.65 else 0.0,
        closure=pick(rng, ('none', 'zip', 'buttons')) if layered or kind == 'shirt' else 'none',
        collar='hood' if kind == 'hoodie' else pick(rng, ('none', 'turtle', 'lapel', 'vee'), (0.4, 0.2, 0.2, 0.2)),
        belt=uniform(rng, 0.018, 0.035) if rng.random() < (0.4 if kind in ('dress', 'coat') else 0.12) else 0.0,
        cuffs=bool(rng.random() < 0.25),
        hem_band=uniform(rng, 0.02, 0.06) if rng.random() < 0.25 else 0.0,
        pattern=_draw_pattern(rng, 0.25),
        inner=_draw_pattern(rng, 0.4),
        front_print=front,
        back_print=back,
        print_size=uniform(rng, 0.04, 0.075),
        print_height=uniform(rng, 0.64, 0.73),
    )


def _draw_lower(rng: np.random.Generator, upper: Upper) -> Lower:
    kind = pick(rng, LOWERS, (0.50, 0.18, 0.18, 0.14))
    hems = {'trousers': (0.03, 0.13), 'shorts': (0.26, 0.38), 'skirt': (0.14, 0.38), 'leggings': (0.05, 0.26)}
    return Lower(
        kind=kind,
        hem=uniform(rng, *hems[kind]),
        width=1.02 if kind == 'leggings' else uniform(rng, 1.02, 1.45),
        flare=uniform(rng, 0.9, 1.7),
        stripe=uniform(rng, 0.12, 0.3) if rng.random() < 0.25 else 0.0,
        pattern=_draw_pattern(rng, 0.45),
        socks=uniform(rng, 0.05, 0.24) if rng.random() < 0.5 else 0.0,
        shoe=uniform(rng, 0.10, 0.26) if rng.random() < 0.35 else uniform(rng, 0.025, 0.05),
        shoe_size=uniform(rng, 0.85, 1.2),
    )


def _visible_tones(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour for every material, [NUM_MATERIALS, 3]; decorations contrast with what they decorate."""
    hue, value = rng.random(NUM_MATERIALS), rng.random(NUM_MATERIALS)
    saturation = 0.85 * rng.random(NUM_MATERIALS) ** 2  # most cloth is nearly grey
    value = 0.10 + 0.85 * value
    for decoration, ground in PAIRED.items():
        value[decoration] = _contrasting(value[ground], value[decoration], 0.32)
    channels = (hue[:, None] + np.array([0.0, 2 / 3, 1 / 3])) * 6 % 6
    wheel = np.clip(np.abs(channels - 3) - 1, 0, 1)
    tones = value[:, None] * (1 - saturation[:, None] * (1 - wheel))
    tan = rng.random()
    tones[SKIN] = (1 - tan) * np.array([0.93, 0.75, 0.65]) + tan * np.array([0.36, 0.24, 0.17])
    tones[HAIR] = (
        np.array([0.10, 0.08, 0.07]),
        np.array([0.30, 0.18, 0.10]),
        np.array([0.78, 0.62, 0.35]),
        np.array([0.62, 0.28, 0.12]),
        np.array([0.65, 0.65, 0.66]),
    )[int(rng.integers(5))]
    tones[DARK] = 0.08
    return tones


def _near_infrared_tones(rng: np.random.Generator) -> np.ndarray:
    """Draw reflectances [NUM_MATERIALS], independently of the colours."""
    tones = _partly_vanishing(rng, 0.12 + 0.80 * rng.random(NUM_MATERIALS), 0.30)
    tones[SKIN], tones[HAIR], tones[DARK] = 0.62 + 0.15 * rng.random(), 0.18 + 0.5 * rng.random(), 0.1
    return tones


def _thermal_tones(rng: np.random.Generator) -> np.ndarray:
    """Draw warmth [NUM_MATERIALS]: bare skin is warm, cloth depends on its insulation, bags are cold."""
    tones = _partly_vanishing(rng, 0.38 + 0.34 * rng.random(NUM_MATERIALS), 0.16)
    bag = 0.15 + 0.2 * rng.random()
    tones[SKIN], tones[HAIR], tones[DARK] = 0.90 + 0.06 * rng.random(), 0.55 + 0.15 * rng.random(), 0.8
    tones[BAG], tones[BAG_TRIM], tones[SHOES], tones[SOLE] = bag, bag + 0.08, tones[SHOES] - 0.1, 0.3
    return tones


def _partly_vanishing(rng: np.random.Generator, tones: np.ndarray, contrast: float) -> np.ndarray:
    """Make three in ten decorations equal to what they decorate, and the others differ by `contrast` or more."""
    vanish = rng.random(NUM_MATERIALS)
    for decoration, ground in PAIRED.items():
        kept = _contrasting(tones[ground], tones[decoration], contrast)
        tones[decoration] = tones[ground] if vanish[decoration] < 0.3 else kept
    return tones


def _contrasting(ground: float, tone: float, contrast: float) -> float:
    """Move `tone` at least `contrast` away from `ground`, to its own side if the range 0.05..0.95 allows it."""
    room_above, room_below = 0.95 - ground, ground - 0.05
    above = tone > ground if min(room_above, room_below) >= contrast else room_above > room_below
    reach = contrast + (max(room_above if above else room_below, contrast) - contrast) * abs(tone - 0.5)
    return float(np.clip(ground + reach if above else ground - reach, 0.05, 0.95))
