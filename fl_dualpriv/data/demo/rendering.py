"""Turn a 28 x 28 gray sketch into a 32 x 32 RGB image, in a public style or a private domain.

Captions name the public styles. No caption names a private domain. The demo CLIP is trained on images of
`render_public` and their captions; clients hold images of `render_private`. Every random choice comes from the
generator or seed argument, so an image is the same on every machine and in every process. Imports only numpy and scipy.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIDE = 32
"""Side of a rendered image, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (245, 220, 50),
    "orange": (245, 140, 30),
    "purple": (125, 45, 165),
    "pink": (250, 150, 195),
    "brown": (120, 75, 40),
    "gray": (128, 128, 128),
    "cyan": (60, 205, 220),
}

ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "ink": {name: (name,) for name in COLOURS},
    "paper": {name: (name,) for name in COLOURS},
    "stroke": {"thin": ("thin", "fine"), "medium": (), "thick": ("thick", "bold", "heavy")},
    "size": {"small": ("small", "tiny"), "medium": (), "large": ("large", "big")},
    "texture": {
        "plain": ("plain", "clean", "smooth"),
        "striped": ("striped", "lined"),
        "dotted": ("dotted", "spotted"),
        "checked": ("checked",),
        "grainy": ("grainy", "noisy"),
        "shaded": ("shaded",),
    },
    "finish": {
        "sharp": ("sharp", "crisp"),
        "blurry": ("blurry", "soft"),
        "faint": ("faint", "pale"),
        "dashed": ("dashed", "broken"),
        "hollow": ("hollow", "outlined"),
    },
}
"""attribute -> value -> the words that a caption may use for it; captions never name a value without words."""

_COMMON = {"stroke": "medium", "size": "medium", "texture": "plain", "finish": "sharp"}
_COMMON_SHARE = 0.65

DOMAINS: tuple[str, ...] = ("chalkboard", "blueprint", "creased", "rippled", "halftone", "stained")
"""Private domains. No caption of the demo CLIP names or shows one."""

_GRID = np.indices((SIDE, SIDE), dtype=np.float64)
_CENTRE = (SIDE - 1) / 2


@dataclass(frozen=True)
class Style:
    """A public style: one value for each attribute of `ATTRIBUTES`."""

    values: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, attribute: str) -> str:
        return self.values[attribute]


def sample_style(rng: np.random.Generator) -> Style:
    """Draw a random style: ink and paper always contrast, and each other attribute is common two times in three."""
    names = list(COLOURS)
    ink = names[rng.integers(len(names))]
    others = [name for name in names if _contrast(name, ink) > 150]
    values = {"ink": ink, "paper": others[rng.integers(len(others))]}
    for attribute, common in _COMMON.items():
        rare = [value for value in ATTRIBUTES[attribute] if value != common]
        values[attribute] = common if rng.random() < _COMMON_SHARE else rare[rng.integers(len(rare))]
    return Style(values)


def render_public(sketch: NDArray[np.uint8], style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a sketch in a public style, with small random differences in place, angle, shear and colour.

    Args:
        sketch: Gray values (28, 28), 255 where the pen was.
        style: Style of the image, which captions may name.
        rng: Source of all random differences, which captions do not name.

    Returns:
        RGB values (32, 32, 3).
    """
    scale = {"small": 0.78, "medium": 0.95, "large": 1.12}[style["size"]] * rng.uniform(0.95, 1.05)
    pen = _place(sketch, rng.uniform(-6, 6), scale, rng.uniform(-0.9, 0.9, 2), shear=rng.uniform(-0.08, 0.08))
    pen = {"thin": pen**1.7, "medium": np.minimum(1.25 * pen, 1), "thick": _thicken(pen)}[style["stroke"]]
    finish = style["finish"]
    if finish == "blurry":
        pen = np.minimum(ndimage.uniform_filter(pen, 3) * 1.5, 1)
    elif finish == "faint":
        pen = pen * 0.45
    elif finish == "dashed":
        pen = pen * (((_GRID[0] + _GRID[1] + rng.integers(5)) % 5) < 3.5)
    elif finish == "hollow":
        pen = np.clip(_thicken(pen) - 0.8 * pen, 0, 1)
    paper = _tinted(style["paper"], rng)[None, None] + _texture(style["texture"], rng)[..., None]
    return _compose(pen, _tinted(style["ink"], rng), paper)


def render_private(sketch: NDArray[np.uint8], domain: str, seed: int, severity: float = 1.0) -> NDArray[np.uint8]:
    """Draw a sketch in a private domain; the same arguments give the same image.

    Args:
        sketch: Gray values (28, 28), 255 where the pen was.
        domain: One of `DOMAINS`.
        seed: Seed that fixes everything else about the image.
        severity: Scale of the distortion; the embedded demo uses 1.

    Returns:
        RGB values (32, 32, 3).
    """
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    shear, bend, wave = rng.uniform(-0.12, 0.12), rng.uniform(0, 2 * np.pi), 0.0
    if domain in ("creased", "blueprint"):
        shear = rng.choice([-1, 1]) * rng.uniform(0.06, 0.14) * severity
    elif domain == "rippled":
        wave = rng.uniform(0.4, 0.75) * severity
    warp = wave * np.stack([np.sin(_GRID[1] * 0.5 + bend), np.sin(_GRID[0] * 0.5 + bend)])
    pen = _place(sketch, rng.uniform(-8, 8), rng.uniform(0.88, 1.0), rng.uniform(-1.2, 1.2, 2), shear=shear, warp=warp)
    pen = np.minimum(1.25 * pen, 1)
    grain = rng.normal(size=(SIDE, SIDE))
    if domain == "chalkboard":
        smear = np.mean([np.roll(pen, step, axis=1) for step in range(-3, 4)], axis=0)
        pen = np.clip(pen * (0.75 + 0.35 * severity * grain) + 0.7 * severity * smear, 0, 1)
        ink, paper = np.array([225.0, 225, 205]), np.array([45.0, 65, 55]) + 14 * grain[..., None]
    elif domain == "blueprint":
        lines = np.asarray(((_GRID + rng.integers(5, size=(2, 1, 1))) % 5 < 1).any(axis=0))
        ink, paper = np.array([215.0, 230, 250]), np.array([30.0, 60, 140]) + 40 * severity * lines[..., None]
    elif domain == "creased":
        folds = np.zeros((SIDE, SIDE))
        for _ in range(3):
            turn, offset = rng.uniform(0, np.pi), rng.uniform(-9, 9)
            distance = (_GRID[0] - _CENTRE) * np.sin(turn) + (_GRID[1] - _CENTRE) * np.cos(turn) - offset
            folds += np.where(distance > 0, 1, -1) * rng.uniform(6, 12) - 40 * (np.abs(distance) < 0.8)
        ink, paper = np.array([70.0, 60, 85]), np.array([205.0, 190, 160]) + severity * folds[..., None]
    elif domain == "rippled":
        swell = 18 * np.sin(_GRID[0] * 0.6 + bend) + 10 * np.sin(_GRID[1] * 0.5)
        ink, paper = np.array([10.0, 50, 80]), np.array([120.0, 185, 195]) + severity * swell[..., None]
    elif domain == "halftone":
        tone = ndimage.gaussian_filter(np.minimum(1.3 * pen, 1), 0.5)
        screen = 0.5 + 0.25 * (np.cos(_GRID[0] * 2.1 + bend) + np.cos(_GRID[1] * 2.1))
        pen = np.where(tone > 0.1 + 0.5 * severity * screen, 1.0, 0.0)
        ink, paper = np.array([180.0, 30, 90]), np.array([240.0, 225, 120]) - 40 * screen[..., None]
    else:
        spots = np.zeros((SIDE, SIDE))
        for _ in range(3):
            y, x, radius = rng.uniform(4, 28), rng.uniform(4, 28), rng.uniform(2.0, 3.6) * severity
            spots = np.maximum(spots, np.hypot(_GRID[0] - y, _GRID[1] - x) < radius)
        pen = pen * (1 - 0.7 * spots)
        ink, paper = (
            np.array([50.0, 45, 40]),
            np.array([225.0, 215, 200]) - spots[..., None] * np.array([90.0, 120, 150]),
        )
    return _compose(pen, ink + rng.normal(0, 10, 3), paper + 6 * grain[..., None])


def _place(
    sketch: NDArray[np.uint8],
    degrees: float,
    scale: float,
    shift: NDArray[np.float64],
    *,
    shear: float,
    warp: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float64]:
    """Compute the pen coverage in [0, 1] of the sketch, turned, sheared, scaled about its centre and moved."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    inverse = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1.0, 0.0], [shear, 1.0]]) / scale
    page = _GRID - _CENTRE - shift[:, None, None] + warp
    source = np.tensordot(inverse, page, axes=1) + (np.array(sketch.shape)[:, None, None] - 1) / 2
    return ndimage.map_coordinates(sketch.astype(np.float64), source, order=1, mode="constant") / 255


def _thicken(pen: NDArray[np.float64]) -> NDArray[np.float64]:
    return ndimage.maximum_filter(pen, size=3)


def _texture(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the brightness that the paper's texture adds to each pixel."""
    phase = rng.integers(4)
    if name == "striped":
        return 38 * np.sign(np.sin((_GRID[rng.integers(2)] + phase) * np.pi / 2 + 0.1))
    if name == "dotted":
        return -60 * (((_GRID[0] + phase) % 4 < 1.5) & ((_GRID[1] + phase) % 4 < 1.5))
    if name == "checked":
        return 38 * np.where(((_GRID[0] + phase) // 4 + _GRID[1] // 4) % 2 < 1, 1.0, -1.0)
    if name == "grainy":
        return rng.normal(0, 30, (SIDE, SIDE))
    if name == "shaded":
        return rng.choice([-1, 1]) * 60 * (_GRID[0] / _CENTRE - 1)
    return np.zeros((SIDE, SIDE))


def _tinted(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.array(COLOURS[name], dtype=np.float64) + rng.normal(0, 10, 3)


def _contrast(one: str, other: str) -> float:
    return float(np.linalg.norm(np.subtract(COLOURS[one], COLOURS[other])))


def _compose(pen: NDArray[np.float64], ink: NDArray[np.float64], paper: NDArray[np.float64]) -> NDArray[np.uint8]:
    paper = np.broadcast_to(paper, (SIDE, SIDE, 3))
    return np.clip(paper + pen[..., None] * (ink - paper), 0, 255).round().astype(np.uint8)
