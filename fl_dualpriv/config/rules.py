"""Rules that several keys of a run config must satisfy together.

A rule is skipped when one of its keys is wrong by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fl_dualpriv.privacy.limits import LARGEST_CLIP_NORM, MOST_RELEASES, SMALLEST_CLIP_NORM, is_clip_norm

Values = Mapping[str, Any]

_WITHOUT_SHARED_PROMPT = ("local-only", "zero-shot")


class CrossRule(NamedTuple):
    """Rule that several keys must satisfy together; ``holds`` reads only ``keys``, and messages name the first key."""

    keys: tuple[str, ...]
    holds: Callable[[Values], bool]
    need: str
    advice: str


QUESTIONS = ("demo-vqa", "questions")
_RECORD, _CLIENT, _TRUSTS = "privacy.record.mechanism", "privacy.client.mechanism", "privacy.record.trusts-server"
_RULE, _BLOCK, _KEPT = "pruning.update-rule", "pruning.update-block", "pruning.update-keep-ratio"
_PATH_NEEDED = 'must be the directory of the images when data.ref = "folder"'

CROSS_RULES: tuple[CrossRule, ...] = (
    CrossRule(
        ("train.local-steps", "rounds", _RECORD),
        lambda v: v[_RECORD] == "none" or v["train.local-steps"] * v["rounds"] <= MOST_RELEASES,
        f"times rounds must be at most {MOST_RELEASES}: each step of each round is a release that is accounted for",
        "lower one of them",
    ),
    CrossRule(
        ("prompt.rank", "prompt.n-ctx", "prompt.learner"),
        lambda v: v["prompt.rank"] <= v["prompt.n-ctx"] or v["prompt.learner"] != "context",
        "must be at most prompt.n-ctx",
        "lower the rank or add context tokens",
    ),
    CrossRule(
        ("supernodes", "population"),
        lambda v: v["supernodes"] <= v["population"],
        "must be at most population",
        "0 gives every client a separate node",
    ),
    CrossRule(
        ("prompt.learner", "method"),
        lambda v: v["prompt.learner"] == "context" or v["method"] in ("promptfl", "full", "zero-shot"),
        'must be "context" for this method: its own parameters are low-rank factors already',
        'set it to "context", or method = "promptfl", "full" or "zero-shot"',
    ),
    CrossRule(
        ("prompt.learner", "data.ref"),
        lambda v: v["prompt.learner"] != "lora" or v["data.ref"] in QUESTIONS,
        'must not be "lora" for image classification: it adapts a language model',
        'set it to "context" or "head", or data.ref = "questions"',
    ),
    CrossRule(
        ("prompt.learner", "data.ref"),
        lambda v: v["prompt.learner"] not in ("head", "module") or v["data.ref"] not in QUESTIONS,
        "must not learn class features for questions: there are none",
        'set it to "context" or "lora"',
    ),
    CrossRule(
        ("prompt.learner", "privacy.record.noise-space", "train.top-m"),
        lambda v: (
            v["prompt.learner"] != "module" or (v["privacy.record.noise-space"] == "prompt" and v["train.top-m"] == 0)
        ),
        "is a module of your own, whose parameters get the noise and whose gradients are exact",
        'set privacy.record.noise-space = "prompt" and train.top-m = 0, or learner = "context"',
    ),
    CrossRule(
        ("prompt.words", "data.ref"),
        lambda v: v["prompt.words"] == "" or v["data.ref"] in QUESTIONS,
        "must be empty for image classification, whose template comes with the classes",
        "set data.classes",
    ),
    CrossRule(
        ("method", "data.ref"),
        lambda v: v["method"] != "dpfpl-paper" or v["data.ref"] not in QUESTIONS,
        "has formulas for image classification only",
        'set method = "dpfpl"',
    ),
    CrossRule(
        ("train.top-m", "data.ref"),
        lambda v: v["train.top-m"] == 0 or v["data.ref"] not in QUESTIONS,
        "must be 0 for questions: there are no class features to choose from",
        "set it to 0",
    ),
    CrossRule(
        ("privacy.record.noise-space", "data.ref"),
        lambda v: v["privacy.record.noise-space"] == "prompt" or v["data.ref"] not in QUESTIONS,
        'must be "prompt" for questions: there are no class features',
        'set it to "prompt"',
    ),
    CrossRule(
        ("data.augmentation", "data.ref"),
        lambda v: v["data.augmentation"] == "none" or v["data.ref"] not in QUESTIONS,
        'must be "none" for questions: a mirrored image can have another answer',
        'set it to "none"',
    ),
    CrossRule(
        ("data.partition", "data.ref"),
        lambda v: v["data.partition"] != "by-image" or v["data.ref"] in QUESTIONS,
        'must be "iid", "by-class" or "dirichlet" for image classification',
        'set it to "iid": each image is one record',
    ),
    CrossRule(
        ("data.partition", "data.ref"),
        lambda v: v["data.partition"] != "by-domain" or v["data.ref"] != "demo-vqa",
        'must not be "by-domain" for the demo\'s questions, which have no domains',
        'set it to "iid", "by-class" or "by-image"',
    ),
    CrossRule(
        ("data.partition", "data.ref"),
        lambda v: v["data.partition"] != "by-client" or v["data.ref"] in ("auto", "folder"),
        'must not be "by-client" for data without a column of clients',
        'set data.path to a list or a data set of images with a column client, or data.partition = "iid"',
    ),
    CrossRule(
        ("data.partitioner", "data.partition"),
        lambda v: (v["data.partitioner"].strip() != "") == (v["data.partition"] == "flwr-datasets"),
        'is read with data.partition = "flwr-datasets", and only then',
        'name a class, for example "PathologicalPartitioner(num_classes_per_partition=2)", or leave it empty',
    ),
    CrossRule(
        ("evaluation.new-clients", "data.partition"),
        lambda v: v["evaluation.new-clients"] == 0 or v["data.partition"] != "by-node",
        "must be 0 where each node has its own data: a client that joins no round has no node",
        "set it to 0",
    ),
    CrossRule(
        ("data.path", "data.ref"),
        lambda v: v["data.ref"] != "questions" or v["data.path"].strip() != "",
        'must name the questions when data.ref = "questions"',
        'set data.path, or data.ref = "demo-vqa"',
    ),
    CrossRule(
        ("backbone.name", "data.ref"),
        lambda v: (
            (v["backbone.name"] != "demo-vqa")
            if v["data.ref"] not in QUESTIONS
            else v["backbone.name"] == "demo-vqa" or v["backbone.name"].startswith("hf:")
        ),
        "does not fit the data: questions need demo-vqa or hf:NAME of a LLaVA-type model, images a CLIP-type one",
        'set backbone.name, for example to "demo-vqa" with data.ref = "demo-vqa"',
    ),
    CrossRule(
        ("pruning.visual-merge", "pruning.visual-fused"),
        lambda v: v["pruning.visual-merge"] != "attention" or v["pruning.visual-fused"] <= 1,
        "is one weighted mean, so pruning.visual-fused must be 0 or 1",
        'set it to "average", or visual-fused = 1',
    ),
    CrossRule(
        ("pruning.visual-fusion-noise", "pruning.visual-keep-ratio", "pruning.visual-fused"),
        lambda v: (
            v["pruning.visual-fusion-noise"] == "off"
            or (v["pruning.visual-keep-ratio"] < 1 and v["pruning.visual-fused"] > 0)
        ),
        "needs fused tokens, and no token is fused",
        'set it to "off", or fuse tokens with visual-keep-ratio < 1 and visual-fused >= 1',
    ),
    CrossRule(
        ("pruning.visual-fusion-noise", _RECORD),
        lambda v: v["pruning.visual-fusion-noise"] in ("off", "absolute") or v[_RECORD] == "gaussian",
        "is scaled by the noise of the gradients, and there is none",
        'set it to "off" or "absolute"',
    ),
    CrossRule(
        ("pruning.update-rule", "method"),
        lambda v: v["pruning.update-rule"] == "noised" or v["method"] != "dpfpl-paper",
        'must be "noised" for the DP-FPL paper\'s formulas',
        'set it to "noised", or set method = "dpfpl"',
    ),
    CrossRule(
        ("train.optimizer", "method"),
        lambda v: v["train.optimizer"] == "sgd" or v["method"] != "dpfpl-paper",
        'must be "sgd", as in the DP-FPL paper',
        'set it to "sgd", or set method = "dpfpl"',
    ),
    CrossRule(
        ("train.optimizer", _TRUSTS),
        lambda v: v["train.optimizer"] == "sgd" or not v[_TRUSTS],
        'must be "sgd" when the server adds the noise: one clipped sum leaves the client',
        'set it to "sgd", or trusts-server = false',
    ),
    CrossRule(
        (_RULE, "privacy.record.noise-space", _KEPT),
        lambda v: v[_KEPT] == 1 or v[_RULE] in ("noised", "random") or v["privacy.record.noise-space"] == "prompt",
        'needs gradients and noise of the prompt itself, so noise-space must be "prompt"',
        'set noise-space = "prompt", or update-rule = "noised" or "random"',
    ),
    CrossRule(
        (_RULE, "method", _TRUSTS, _KEPT),
        lambda v: v[_KEPT] == 1 or v[_RULE] != "past" or not v[_TRUSTS] or v["method"] != "promptfl",
        "learns from noised gradients, and with a trusted server a client of this method never has one",
        'set trusts-server = false, another method, or update-rule = "random-past"',
    ),
    CrossRule(
        (_BLOCK, _RULE, _KEPT),
        lambda v: v[_KEPT] == 1 or v[_BLOCK] != "component" or v[_RULE] not in ("past", "random-past"),
        'must not be "component" for masks before the clip: components change with every step',
        'set it to "token", or update-rule = "noised", "random" or "shrink"',
    ),
    CrossRule(
        (_BLOCK, "prompt.learner", _KEPT),
        lambda v: v[_KEPT] == 1 or v[_BLOCK] != "matrix" or v["prompt.learner"] == "lora",
        'as "matrix" needs a prompt that is made of matrices',
        'set it to "token", or prompt.learner = "lora"',
    ),
    CrossRule(
        (_BLOCK, "method", _KEPT),
        lambda v: v[_KEPT] == 1 or v[_BLOCK] != "component" or v["method"] in ("dpfpl", "lowrank", "local-only"),
        'as "component" needs a method with low-rank factors',
        'set it to "token", or method = "dpfpl", "lowrank" or "local-only"',
    ),
    CrossRule(
        (_BLOCK, "pruning.update-frozen", "train.optimizer", _KEPT),
        lambda v: (
            v[_KEPT] == 1 or v[_BLOCK] != "component" or not v["pruning.update-frozen"] or v["train.optimizer"] == "sgd"
        ),
        'as "component" cannot be frozen under an optimizer with memory: a component has no fixed coordinates',
        'set update-frozen = false, or train.optimizer = "sgd"',
    ),
    CrossRule(
        (_BLOCK, _RULE, _KEPT),
        lambda v: v[_KEPT] == 1 or v[_BLOCK] != "coordinate" or v[_RULE] != "shrink",
        "as single coordinates cannot be shrunk: that takes blocks of three or more",
        'set it to "token" or "component"',
    ),
    CrossRule(
        ("train.optimizer", "privacy.record.noise-space"),
        lambda v: v["train.optimizer"] != "adam-corrected" or v["privacy.record.noise-space"] == "prompt",
        'needs to know the noise on each coordinate of the prompt, so noise-space must be "prompt"',
        'set noise-space = "prompt", or optimizer = "adam"',
    ),
    CrossRule(
        ("train.top-m", _RECORD),
        lambda v: v["train.top-m"] == 0 or v[_RECORD] == "gaussian",
        'needs privacy.record.mechanism = "gaussian": without per-example gradients it saves nothing',
        "set it to 0",
    ),
    CrossRule(
        ("train.top-m", "method"),
        lambda v: v["train.top-m"] == 0 or v["method"] != "dpfpl-paper",
        "must be 0, as in the DP-FPL paper",
        'set it to 0, or set method = "dpfpl"',
    ),
    CrossRule(
        ("privacy.record.noise-space", "train.top-m"),
        lambda v: v["privacy.record.noise-space"] == "prompt" or v["train.top-m"] == 0,
        'as "feature" has one backward pass for the whole batch, so top-m must be 0',
        "set train.top-m = 0",
    ),
    CrossRule(
        ("privacy.record.clipping", "method"),
        lambda v: v["privacy.record.clipping"] == "flat" or v["method"] != "dpfpl-paper",
        'must be "flat" for this method: its formulas clip the mean of a batch',
        'set it to "flat", or set method = "dpfpl"',
    ),
    CrossRule(
        ("privacy.record.noise-space", "method"),
        lambda v: v["privacy.record.noise-space"] == "prompt" or v["method"] != "dpfpl-paper",
        'must be "prompt", as in the DP-FPL paper',
        'set it to "prompt", or set method = "dpfpl"',
    ),
    CrossRule(
        ("privacy.record.noise-space", _TRUSTS),
        lambda v: v["privacy.record.noise-space"] == "prompt" or not v[_TRUSTS],
        'must be "prompt" when the server adds the noise, because it adds it to sums of prompt gradients',
        "set trusts-server = false",
    ),
    CrossRule(
        ("data.path", "data.ref"),
        lambda v: v["data.ref"] != "folder" or v["data.path"].strip() != "",
        _PATH_NEEDED,
        'set data.path, or data.ref = "demo"',
    ),
    CrossRule(
        ("data.path", "data.ref"),
        lambda v: v["data.ref"] not in ("demo", "shelf", "demo-vqa") or v["data.path"] == "",
        "must be empty for a demo's own data",
        'did you mean data.ref = "folder" or "questions"?',
    ),
    CrossRule(
        ("data.classes", "data.ref", "data.path"),
        lambda v: v["data.classes"] == "" or v["data.ref"] == "folder" or (v["data.ref"] == "auto" and v["data.path"]),
        "must be empty for the demo's images",
        'did you mean data.ref = "folder"?',
    ),
    CrossRule(
        ("data.test-fraction", "data.val-fraction"),
        lambda v: v["data.test-fraction"] + v["data.val-fraction"] < 1,
        "must be less than 1 together with data.val-fraction",
        "leave a share for training",
    ),
    CrossRule(
        ("privacy.client.expected-cohort", "population", _CLIENT),
        lambda v: v[_CLIENT] == "none" or v["privacy.client.expected-cohort"] <= v["population"],
        "must be at most population",
        "lower it, or raise population",
    ),
    CrossRule(
        (_CLIENT, "method"),
        lambda v: v[_CLIENT] == "none" or v["method"] not in _WITHOUT_SHARED_PROMPT,
        'must be "none" for a method that shares no prompt',
        'set it to "none", or choose a method that shares, for example "dpfpl"',
    ),
    CrossRule(
        (_TRUSTS, _RECORD),
        lambda v: not v[_TRUSTS] or v[_RECORD] == "gaussian",
        'needs privacy.record.mechanism = "gaussian"',
        "set the mechanism, or trusts-server = false",
    ),
    CrossRule(
        ("train.global-learning-rate", "privacy.record.clip-norm", _TRUSTS),
        lambda v: (
            not v[_TRUSTS]
            or v["train.global-learning-rate"] == 0
            or is_clip_norm(v["train.global-learning-rate"] * v["privacy.record.clip-norm"])
        ),
        f"times the clip norm must be 0 or from {SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}: "
        "the server clips to this product",
        "change one of them, or set trusts-server = false",
    ),
    CrossRule(
        (_TRUSTS, "train.local-steps"),
        lambda v: not v[_TRUSTS] or v["train.local-steps"] == 1,
        "needs train.local-steps = 1, because a client uploads one clipped sum per round",
        "set train.local-steps = 1, or trusts-server = false",
    ),
    CrossRule(
        (_TRUSTS, _CLIENT),
        lambda v: not v[_TRUSTS] or v[_CLIENT] == "none",
        'needs privacy.client.mechanism = "none"',
        "choose one of the two placements of the server's noise",
    ),
    CrossRule(
        (_TRUSTS, "method"),
        lambda v: not v[_TRUSTS] or v["method"] not in _WITHOUT_SHARED_PROMPT,
        "needs a method that shares a prompt",
        'set trusts-server = false, or choose a method that shares, for example "dpfpl"',
    ),
    CrossRule(
        ("privacy.arithmetic", "method"),
        lambda v: v["privacy.arithmetic"] == "float" or v["method"] != "dpfpl-paper",
        'must be "float", as in the DP-FPL paper',
        'set it to "float", or set method = "dpfpl"',
    ),
    CrossRule(
        ("privacy.arithmetic", _RECORD, _CLIENT),
        lambda v: v["privacy.arithmetic"] == "float" or (v[_RECORD], v[_CLIENT]) != ("none", "none"),
        'needs noise at one level: without it there is nothing for "integer" to protect',
        'set it to "float", or a mechanism to "gaussian"',
    ),
    CrossRule(
        ("method", _CLIENT),
        lambda v: v["method"] != "dpfpl-paper" or v[_CLIENT] == "none",
        'needs privacy.client.mechanism = "none", as in the DP-FPL paper',
        'switch it off, or set method = "dpfpl"',
    ),
    CrossRule(
        ("method", _TRUSTS),
        lambda v: v["method"] != "dpfpl-paper" or not v[_TRUSTS],
        "needs privacy.record.trusts-server = false: it has its own placement of noise",
        'switch it off, or set method = "dpfpl"',
    ),
    CrossRule(
        ("dpfpl-paper.published", "train.local-steps", "method"),
        lambda v: v["dpfpl-paper.published"] == "paper" or v["train.local-steps"] == 1 or v["method"] != "dpfpl-paper",
        "needs train.local-steps = 1: the authors' server averages after each batch",
        'set train.local-steps = 1, or dpfpl-paper.published = "paper"',
    ),
    CrossRule(
        ("method", "pruning.update-keep-ratio"),
        lambda v: v["method"] != "dpfpl-paper" or v["pruning.update-keep-ratio"] == 1,
        "needs pruning.update-keep-ratio = 1, as in the DP-FPL paper",
        'set it to 1, or set method = "dpfpl"',
    ),
)
