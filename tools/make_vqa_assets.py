"""Make the question-answering demo: a small real LLaVA, and real questions about pictures that its training never saw.

    pip download easy-vqa==1.0 --no-deps && unzip -q easy_vqa-1.0-py3-none-any.whl
    python -m tools.make_vqa_assets --easy-vqa easy_vqa/data

Source: easy-VQA 1.0 by Victor Zhou (MIT), 4,000 + 1,000 pictures of one shape each. The shape of 3,837 training
pictures is known. The model sees 1,350 of them, and 150 measure it; 1,900 and 437 are the private train and validation
pictures. The private test pictures are easy-VQA's test set. `fl_dualpriv/data/demo_questions.py` describes the data of
the clients.

Time: about 16 minutes of one core (labels 3.5, answers 12). Expected numbers for seed 0: greedy exact match on test
questions 37.8 % under the template, 99.2 % under words that name panel and dye. `--check` prints them for existing
files, in the form of `PROVENANCE.md`. `--questions` writes only the questions.

The reasons for the design, with measurements, are in `vqa_model.Seeing`, `vqa_questions.read_aloud` and `Answering`. A
language model that learned only from answers still guessed after 400 steps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fl_dualpriv.assets import VQA_DEMO_FOLDER
from fl_dualpriv.data.demo_questions import RIGHT_WORDS, TYPES, load_questions
from fl_dualpriv.files import write_bytes
from tools import vqa_questions as vqa
from tools.vqa_model import (
    N_VISUAL,
    WIDTH,
    Seeing,
    fit_projector,
    load,
    make_processor,
    new_model,
    see,
    to_tensor,
)

SHEETS, ASKED, LENGTH, READ = 16, 8, 19, 3
"""Sheets per step, questions about each sheet, tokens of a question (with the words before it, the answer and the end),
and number of readings for six questions."""


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised step, with which small transformers learn in far fewer steps than with AdamW.

    It works in single precision. PyTorch's implementation works in bfloat16, which is slow on many processors.

    Reference:
        Jordan 2024, *Muon: an optimizer for hidden layers in neural networks*; scale of Liu et al. 2025,
        arXiv:2502.16982.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step with the current gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                held.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(held, group["momentum"])
                x = x.T if len(p) > p.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz iteration: singular values approach one
                    square = x @ x.T
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                x = x.T if len(p) > p.shape[1] else x
                p.add_(x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


PROVENANCE = """# Origin of the question-answering demo's files

- **Pictures and questions** (`sheets.npz`, `questions.json`) and the model's training data: easy-VQA 1.0 by Victor
  Zhou, <https://github.com/vzhou842/easy-VQA>, as in the wheel `easy-vqa` 1.0 of the Python package index. MIT License,
  Copyright (c) 2019 Victor Zhou: `LICENSE-easy-vqa`. Changed: pictures made 48 x 48, shapes kept in sixteen steps of
  coverage, put on sheets of four, colours exchanged by a fixed rule (*dyed*). 4.2 % of the pictures are left out,
  because none of their questions reveals the shape. Questions and answers are easy-VQA's own, word for word. Of the
  questions answered by yes or no, equally many with each answer are kept.
- **Weights** (`model.safetensors`) and **tokenizer**: transformers' LLaVA architecture, trained from random weights by
  `tools/make_vqa_assets.py` on 1,350 other pictures of easy-VQA's training set, painted in random colours, with
  questions made from easy-VQA's forms. No picture of `sheets.npz` was used in training. Apache-2.0, like the project.

**The private task.** The model was trained to follow words that name a panel of the sheet and a dye. All private
questions are about the lower right panel, under the dye *swapped*. A prompt starts from the template
*TEMPLATE*, which names no panel and no dye. In its training the model met that panel and that dye under
the words *RIGHT*. A learned prompt finds the meaning of those words again, only from private
questions. It teaches the model nothing that its weights do not hold. Half of the other panels show a colour, and
mostly a shape, that the picture does not have, first those that its questions name. Looking anywhere on the sheet,
instead of at that panel, therefore does no better than a constant answer.

Greedy exact match (%) of the shipped files on the first 200 questions of each type (held-out: 80):

FIGURES

To make them again: `make vqa-assets`.
"""

StepLoss = Callable[[], tuple[Tensor, dict[str, float]]]


def adam_w(parts: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Return AdamW with weight decay for matrices and without it for vectors."""
    parameters = [p for part in parts for p in part.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))]


def muon_and_adam(parts: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon with four times the learning rate for the matrices of layers, and Adam for the rest."""
    parameters = [(p.ndim == 2 and "layers" in key, p) for part in parts for key, p in part.named_parameters()]
    inner, others = ([p for is_inner, p in parameters if is_inner == wanted] for wanted in (True, False))
    return [Muon(inner, 4 * lr), torch.optim.Adam(others, lr, betas=(0.9, 0.98))]


def train(optimizers: list[torch.optim.Optimizer], steps: int, step_loss: StepLoss, name: str) -> None:
    """Train with warm-up, a constant phase and linear decay of the learning rate.

    Args:
        optimizers: Optimizers of all trained parameters.
        steps: Number of steps.
        step_loss: Function that returns loss and figures of a fresh batch.
        name: Name of the phase in the printed lines.
    """
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / (0.05 * steps)) * min(1.0, (1 - s / steps) / 0.6)
        )
        for optimizer in optimizers
    ]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    started = time.process_time()
    for step in range(steps):
        loss, figures = step_loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 49:
            text = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
            print(f"{name} {step + 1}, {time.process_time() - started:.0f} s: {text}", flush=True)


Batch = tuple[Tensor, Tensor, NDArray[np.int64], Tensor]


class Answering:
    """Loss of many questions about a sheet in one sequence: the image, then questions that do not see each other.

    Before the last layer, the state at an answer's position is trained to hold the facts that the answer needs: shape
    and colour of the panel, the thing that a statement names, and its negation. Without these labels the model read
    sheets well after 1,000 steps, but answered yes and no at random.
    Most steps drop visual tokens at random, tokens of a shape last, so that the model also works with pruned tokens.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.facts = nn.Linear(WIDTH, sum(vqa.FACTS))
        self.known: dict[str, list[int]] = {}
        self.before = [self.tokenizer.bos_token_id, *self.ids("USER:")]
        self.right = dict.fromkeys(("read", *TYPES), 0.3)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, from a cache because the same texts come often."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def batch(self, sheets: vqa.Sheets, rows: list[int], rng: np.random.Generator) -> Batch:
        """Draw questions and readings about sheets.

        Returns:
            Token ids and targets (-100: no target), (sheet, ASKED, LENGTH) each; types (-1: a reading), (sheet, ASKED);
            and facts of each question.
        """
        shape = (len(rows), ASKED, LENGTH)
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, -100, dtype=np.int64)
        kinds = rng.integers(-READ, len(TYPES), size=shape[:2]).clip(-1)
        facts = []
        for i, j in np.ndindex(*shape[:2]):
            if kinds[i, j] < 0:
                text = vqa.read_aloud(sheets, rows[i], rng)
                tokens = [self.ids(word)[0] for word, _ in text]
                ids[i, j, : len(text)] = tokens
                told = np.flatnonzero([is_read for _, is_read in text])
                targets[i, j, told - 1] = ids[i, j, told]
                continue
            asked = vqa.ask(TYPES[kinds[i, j]], sheets, rows[i], rng)
            facts.append(asked.facts)
            text = [*self.ids(asked.words), *self.ids(asked.question), *self.ids("ASSISTANT:")]
            end = [*self.ids(asked.answer), self.tokenizer.eos_token_id]
            ids[i, j, : len(text) + 2] = text + end
            targets[i, j, len(text) - 1 : len(text) + 1] = end
        return torch.from_numpy(ids), torch.from_numpy(targets), kinds, torch.tensor(facts)

    def __call__(self, bank: Tensor, sheets: vqa.Sheets, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, and the running accuracy (an average over about thirty steps) of each type.

        Args:
            bank: States of the image tower for each sheet's patches, (sheet, patch, width).
            sheets: The sheets; a step draws some of them.
            rng: Source of all random choices.
        """
        rows = rng.integers(len(bank), size=SHEETS).tolist()
        ids, targets, kinds, facts = self.batch(sheets, rows, rng)
        language = self.model.model.language_model
        number = int(rng.integers(28, N_VISUAL)) if rng.random() < 0.7 else N_VISUAL
        order = (rng.random((SHEETS, N_VISUAL)) - sheets.covered[rows]).argsort(axis=1)
        patches = np.sort(order[:, :number], axis=1)
        visual = self.model.model.multi_modal_projector(bank[np.array(rows)[:, None], patches])
        before = language.embed_tokens(torch.tensor(self.before)).expand(len(visual), -1, -1)
        x = torch.cat([before, visual, language.embed_tokens(ids).flatten(1, 2)], dim=1)
        mask, positions = blind_to_each_other(before.shape[1] + visual.shape[1])
        out = language(inputs_embeds=x, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        last, inner = (
            states[:, -ASKED * LENGTH :].unflatten(1, (ASKED, LENGTH)) for states in (out[0], out.hidden_states[-2])
        )
        asked = targets >= 0
        logits = self.model.lm_head(last[asked])
        loss = F.cross_entropy(logits, targets[asked])
        starts = (targets == self.tokenizer.eos_token_id).roll(-1, dims=2)  # an answer is one word, before the end
        for told, truth in zip(self.facts(inner[starts]).split(vqa.FACTS, dim=-1), facts.T, strict=True):
            loss = loss + 0.25 * F.cross_entropy(told, truth)
        right = (logits.argmax(-1) == targets[asked]).numpy()
        kind = np.broadcast_to(kinds[..., None], asked.shape)[asked.numpy()]
        kind = np.where(targets[asked] == self.tokenizer.eos_token_id, len(TYPES), kind)  # the end counts for no type
        for k, name in enumerate(self.right, start=-1):
            self.right[name] += 0.03 * (right[kind == k].mean() - self.right[name])
        return loss, {"loss": float(loss.detach())} | self.right


def blind_to_each_other(prefix: int) -> tuple[Tensor, Tensor]:
    """Return attention mask (1, 1, tokens, tokens) and positions with which no question sees another one.

    Every question continues the image as if there were no other question.
    """
    question = torch.cat([torch.full((prefix,), -1), torch.arange(ASKED).repeat_interleave(LENGTH)])
    order = torch.arange(len(question))
    seen = (order[:, None] >= order) & ((question == -1) | (question[:, None] == question))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask[None, None], torch.cat([torch.arange(prefix), (prefix + torch.arange(LENGTH)).repeat(ASKED)])[None]


@torch.no_grad()
def exact_match(model: Any, processor: Any, data: Any, words: str, number: int) -> dict[str, float]:
    """Return the share of right greedy answers (%) by type, and the mean over types.

    Args:
        model: The model, loaded from its files.
        processor: Processor of the model.
        data: A `QuestionSet`, of which the first questions of each type are asked.
        words: Words before every question.
        number: Number of questions of each type.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    rows = np.concatenate([np.flatnonzero(data.labels == k)[:number] for k in range(len(TYPES))])
    for block in np.array_split(rows, max(len(rows) // 100, 1)):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{words} {data.questions[i]}"}]}]
            for i in block
        ]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        images = [data.images.image(int(data.image_of[i])) for i in block]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        answers = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for i, answer in zip(block, processor.batch_decode(answers, skip_special_tokens=True), strict=True):
            right[TYPES[data.labels[i]]].append(answer.strip() == data.answers[i])
    figures = {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in right.items()}
    return figures | {"mean": round(float(np.mean(list(figures.values()))), 1)}


def write_model(model: Any, processor: Any, folder: Path) -> None:
    """Write weights in half precision, and the files that transformers needs to load them."""
    with tempfile.TemporaryDirectory() as temporary:
        model.half().save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            write_bytes(folder / file.name, file.read_bytes())


def train_model(pictures: vqa.Pictures, processor: Any, args: argparse.Namespace) -> Any:
    """Train the image tower from labels, then freeze it and train the rest from questions."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, seeing = new_model(processor), Seeing()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(processor.tokenizer)} words", flush=True)
    answering = Answering(model, processor)

    def label_loss() -> tuple[Tensor, dict[str, float]]:
        sheets = vqa.public_sheets(pictures, 64, rng)
        return seeing(*see(model, to_tensor(sheets.pixels)), sheets)

    parts = [model.model.vision_tower, seeing]
    train(adam_w(parts, args.vision_lr), args.vision_steps, label_loss, "labels")
    sheets = vqa.public_sheets(pictures, args.bank, rng)
    with torch.no_grad():
        bank = torch.cat(
            [see(model, to_tensor(part))[0][:, 1:] for part in np.array_split(sheets.pixels, args.bank // 64)]
        )
    fit_projector(model.model.multi_modal_projector, bank)

    def answer_loss() -> tuple[Tensor, dict[str, float]]:
        return answering(bank, sheets, rng)

    parts = [model.model.language_model, model.model.multi_modal_projector, model.lm_head, answering.facts]
    train(muon_and_adam(parts, args.lr), args.steps, answer_loss, "answers")
    return model.eval()


def report(folder: Path, held_out: vqa.Pictures) -> dict[str, dict[str, float]]:
    """Load the written model in single precision, and print its exact matches (%)."""
    model, processor = load(folder)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_questions(dict.fromkeys(("train", "val", "test"), (held_out, 80)), Path(temporary))
        data = {"held-out public pictures": load_questions(Path(temporary)).test, "test": load_questions(folder).test}
    for name, split in data.items():
        for words in (vqa.TEMPLATE, RIGHT_WORDS):
            figures[f"{name}, {words!r}"] = exact_match(model, processor, split, words, 200)
            print(f"{name}, {words!r}:", figures[f"{name}, {words!r}"], flush=True)
    return figures


def provenance(figures: dict[str, dict[str, float]]) -> str:
    """Return the text of `PROVENANCE.md`, with the measured figures."""
    rows = [["words before the question", *TYPES, "mean"], ["---"] * (len(TYPES) + 2)]
    rows += [[name, *map(str, row.values())] for name, row in figures.items()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = PROVENANCE.replace("TEMPLATE", vqa.TEMPLATE).replace("RIGHT", RIGHT_WORDS)
    return text.replace("FIGURES", table)


def write_questions(splits: dict[str, tuple[vqa.Pictures, int]], folder: Path) -> None:
    """Write the files that `load_questions` reads."""
    archive, texts = vqa.private_archive(splits)
    write_bytes(folder / "sheets.npz", archive)
    write_bytes(folder / "questions.json", (json.dumps({**texts, "template": vqa.TEMPLATE}) + "\n").encode())


def main() -> None:
    """Train, write, reload, and print the figures that the header of this file lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easy-vqa", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=VQA_DEMO_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--bank", type=int, default=4096, help="number of sheets for the training questions")
    parser.add_argument("--vision-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--questions", action="store_true", help="train nothing; write only the questions")
    parser.add_argument("--check", action="store_true", help="train and write nothing; print the figures of --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = vqa.cut(vqa.read_pictures(args.easy_vqa / "train"))
    if not args.check:
        test = vqa.read_pictures(args.easy_vqa / "test")
        write_questions(
            {"train": (pictures["train"], 1200), "val": (pictures["val"], 150), "test": (test, 200)}, args.out
        )
        if not args.questions:
            processor = make_processor()
            write_model(train_model(pictures["public"], processor, args), processor, args.out)
            licence = next(args.easy_vqa.parent.parent.glob("easy_vqa-*.dist-info/LICENSE"))
            write_bytes(args.out / "LICENSE-easy-vqa", licence.read_bytes())
    figures = report(args.out, pictures["held-out"])
    if not args.check:
        write_bytes(args.out / "PROVENANCE.md", provenance(figures).encode())


if __name__ == "__main__":
    main()
