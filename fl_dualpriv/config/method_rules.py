"""Rules for the baselines with separate mathematics: the keys that they support and the values that they need."""

from collections.abc import Callable

from fl_dualpriv.config.rules import QUESTIONS, CrossRule, Values

_HEADS = ("linear-probe", "prototypes")
_SELECTING = ("dpfpl", "full", "local-only", "lowrank", "promptfl", "fedpgp", "zero-shot")
_SELECTING_BY_CLIENT = ("dpfpl", "full", "local-only", "zero-shot")
_FROM_CANDIDATES = ("mean", "select")
_SHRINKABLE = ("dpfpl", "local-only")
_IMAGES_ALONE = (*_HEADS, "fedpgp", "dp-lora", "ffa-lora", "fedotp")


def _must_be(key: str, value: object, methods: tuple[str, ...], reason: str) -> CrossRule:
    """Make the rule that ``key`` must have this value for these methods."""
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
    return CrossRule(
        (key, "method"),
        lambda v: v[key] == value or v["method"] not in methods,
        f"must be {shown} for this method: {reason}",
        f"set it to {shown}, or choose another method",
    )


_SHRUNK = "prompt.personalisation"


def _shrunk_needs(keys: tuple[str, ...], holds: Callable[[Values], bool], reason: str, advice: str) -> CrossRule:
    """Make a rule for noise-aware personal prompts; methods without a personal prompt do not read their key."""
    return CrossRule(
        (_SHRUNK, "method", *keys),
        lambda v: v[_SHRUNK] == "published" or v["method"] not in _SHRINKABLE or holds(v),
        reason,
        f'set it to "published", or {advice}',
    )


def _collective_needs(keys: tuple[str, ...], holds: Callable[[Values], bool], reason: str, advice: str) -> CrossRule:
    """Make a rule for personal prompts that the server makes of all uploads."""
    return CrossRule(
        (_SHRUNK, "method", *keys),
        lambda v: v[_SHRUNK] != "collective" or v["method"] != "dpfpl" or holds(v),
        reason,
        f'set it to "published", or {advice}',
    )


METHOD_RULES: tuple[CrossRule, ...] = (
    CrossRule(
        ("method", "data.ref"),
        lambda v: v["method"] not in _IMAGES_ALONE or v["data.ref"] not in QUESTIONS,
        "classifies images by class features, and questions have none",
        'set method = "promptfl", or data.ref = "demo" or "folder"',
    ),
    CrossRule(
        ("prompt.init", "method"),
        lambda v: v["prompt.init"] != "zeros" or v["method"] in _HEADS,
        'must not be "zeros" for a method that learns words: all of them would stay equal',
        'set it to "template" or "random"',
    ),
    CrossRule(
        ("prompt.init", "method"),
        lambda v: v["prompt.init"] != "random" or v["method"] not in _HEADS,
        'must not be "random" for a head, because a random start has no benefit there',
        'set it to "template" (the zero-shot class features) or "zeros"',
    ),
    CrossRule(
        ("prompt.init", "prompt.candidates"),
        lambda v: v["prompt.init"] not in _FROM_CANDIDATES or v["prompt.candidates"].strip() != "",
        "needs prompt.candidates, the templates to start from",
        'set prompt.candidates, for example to "a photo of a {} | a drawing of a {}", or init = "template"',
    ),
    CrossRule(
        ("prompt.init", "method", "prompt.learner"),
        lambda v: (
            v["prompt.init"] not in _FROM_CANDIDATES or (v["method"] not in _HEADS and v["prompt.learner"] == "context")
        ),
        "must be of a context of words, and this method or learner has none",
        'set it to "template", or prompt.learner = "context" and a method that learns a prompt',
    ),
    CrossRule(
        ("prompt.candidates", "data.ref"),
        lambda v: v["prompt.candidates"].strip() == "" or v["data.ref"] not in QUESTIONS,
        "must be empty for questions, which have no class names",
        'set it to ""',
    ),
    CrossRule(
        ("prompt.init", "method"),
        lambda v: v["prompt.init"] != "select" or v["method"] in _SELECTING,
        'must not be "select" for this method: no release of its own is defined that chooses its start',
        'set it to "mean", or method = "dpfpl" or another one that learns one prompt',
    ),
    CrossRule(
        ("prompt.select", "prompt.init", "method"),
        lambda v: v["prompt.init"] != "select" or v["prompt.select"] != "client" or v["method"] in _SELECTING_BY_CLIENT,
        'must be "federated" for this method: it has no personal part that can start anywhere',
        'set it to "federated", or method = "dpfpl", "full", "local-only" or "zero-shot"',
    ),
    CrossRule(
        ("prompt.init", "privacy.client.mechanism"),
        lambda v: v["prompt.init"] != "select" or v["privacy.client.mechanism"] == "none",
        'must not be "select" with client-level privacy: the choice is a release at record level only',
        'set it to "mean", or privacy.client.mechanism = "none"',
    ),
    CrossRule(
        ("prompt.init", "privacy.record.trusts-server"),
        lambda v: v["prompt.init"] != "select" or not v["privacy.record.trusts-server"],
        'must not be "select" when the server adds the noise: the noise of the choice is the client\'s',
        'set it to "mean", or trusts-server = false',
    ),
    _must_be("train.optimizer", "sgd", ("prototypes",), "it adds up class sums without an optimizer"),
    _must_be("train.top-m", 0, ("prototypes",), "a record contributes only to its own class"),
    _must_be("train.top-m", 0, ("fedotp",), "its class features differ from image to image"),
    _must_be("privacy.record.noise-space", "prompt", ("prototypes",), "it learns class features directly"),
    _must_be("privacy.record.noise-space", "prompt", ("fedotp",), "its class features come from two prompts"),
    _must_be("pruning.visual-keep-ratio", 1.0, ("fedotp",), "it chooses among all patches itself"),
    _must_be("pruning.update-keep-ratio", 1.0, ("prototypes",), "it has one sum and no update to prune"),
    _must_be("pruning.update-keep-ratio", 1.0, ("fedpgp",), "a step of u and v moves every entry of the prompt"),
    _must_be("privacy.record.trusts-server", False, ("fedpgp",), "its upload is not only a sum over records"),
    _must_be(_SHRUNK, "published", ("lowrank",), "it keeps p_L at rank k, and a shrunk sum has no fixed rank"),
    _must_be(_SHRUNK, "published", ("full",), "it is the control whose p_L moves freely"),
    _must_be(_SHRUNK, "published", ("dpfpl-paper",), "its formulas are the paper's"),
    _must_be(_SHRUNK, "published", ("fedpgp",), "its p_L is the product of two factors, which take their own steps"),
    _must_be(_SHRUNK, "published", ("fedotp",), "its p_L is a second prompt, and no deviation from p_G"),
    CrossRule(
        (_SHRUNK, "method"),
        lambda v: v[_SHRUNK] != "collective" or v["method"] != "local-only",
        "is made of all clients' uploads, and this method uploads nothing",
        'set it to "scalar" or "singular", or method = "dpfpl"',
    ),
    _collective_needs(
        ("privacy.record.trusts-server",),
        lambda v: not v["privacy.record.trusts-server"],
        "is made of single uploads, and with a trusted server these are clean sums without noise",
        "privacy.record.trusts-server = false",
    ),
    _collective_needs(
        ("privacy.client.mechanism",),
        lambda v: v["privacy.client.mechanism"] == "none",
        "gives a client a function of single uploads before the server's noise, which client-level ε does not cover",
        'privacy.client.mechanism = "none"',
    ),
    _collective_needs(
        ("train.global-learning-rate",),
        lambda v: v["train.global-learning-rate"] > 0,
        "is made of uploads, which are zero if the global prompt does not move",
        "a train.global-learning-rate above 0",
    ),
    _shrunk_needs(
        ("train.optimizer",),
        lambda v: v["train.optimizer"] == "sgd",
        "needs p_G to move by the releases themselves, and an optimizer changes their scale",
        'train.optimizer = "sgd"',
    ),
    _shrunk_needs(
        ("privacy.record.noise-space", "privacy.record.mechanism"),
        lambda v: v["privacy.record.noise-space"] == "prompt" or v["privacy.record.mechanism"] == "none",
        "needs to know the noise on each entry of the prompt",
        'privacy.record.noise-space = "prompt"',
    ),
    _shrunk_needs(
        ("pruning.update-block", "pruning.update-keep-ratio"),
        lambda v: v["pruning.update-keep-ratio"] == 1 or v["pruning.update-block"] != "component",
        "has no low-rank factors whose components could be pruned",
        'pruning.update-block = "token"',
    ),
    _shrunk_needs(
        ("pruning.update-frozen", "pruning.update-keep-ratio"),
        lambda v: v["pruning.update-keep-ratio"] == 1 or not v["pruning.update-frozen"],
        "moves every entry of p_L at each step, so that no block can be frozen",
        "pruning.update-frozen = false",
    ),
)
