"""The seeded runs whose prompts and ledgers must not change when code is moved or renamed."""

from dataclasses import dataclass

from fl_dualpriv.config.methods import METHODS

TWO_ROUNDS = ("rounds=2", "evaluation.every=2", "train.class-prior=none")
OF_QUESTIONS = ("dp-lora", "ffa-lora")
OWN_CONFIG = ("linear-probe", "prototypes", "fedpgp", "dp-lora", "ffa-lora", "fedotp")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the local engine.

    Attributes:
        name: Name of the run in the report.
        config: Configuration file, relative to the checkout.
        values: ``KEY=VALUE`` changes of the configuration.
        renamed: The same changes in the names of older commits, tried where ``values`` are refused.
        is_cut_off: The run is killed after its first round and continued with ``--resume``.
    """

    name: str
    config: str
    values: tuple[str, ...] = ()
    renamed: tuple[str, ...] | None = None
    is_cut_off: bool = False


def _of_method(method: str) -> Case:
    if method in OWN_CONFIG:
        return Case(name=method, config=f"simulations/configs/{method}.toml", values=TWO_ROUNDS)
    config = "simulations/configs/by-class.toml"
    values = (f"method={method}", *TWO_ROUNDS)
    # The published procedure has no update pruning, and nothing is trained without a method.
    pruned_updates = () if method not in ("dpfpl-paper", "zero-shot") else ("pruning.update-keep-ratio=1.0",)
    return Case(name=method, config=config, values=values + pruned_updates)


CASES = (
    Case(name="demo", config="simulations/configs/by-class.toml"),
    Case(name="resume", config="simulations/configs/by-class.toml", values=("rounds=3",), is_cut_off=True),
    Case(name="questions", config="simulations/configs/vqa.toml", values=TWO_ROUNDS),
    Case(
        name="lora",
        config="simulations/configs/vqa.toml",
        values=(
            "prompt.learner=lora",
            "method=promptfl",
            "pruning.update-keep-ratio=1.0",
            "train.local-steps=2",
            *TWO_ROUNDS,
        ),
    ),
    Case(
        name="client level",
        config="simulations/configs/client-level.toml",
        values=("privacy.randomness=seeded", *TWO_ROUNDS),
    ),
    Case(
        name="client level, adaptive clip",
        config="simulations/configs/adaptive-clipping.toml",
        values=("privacy.randomness=seeded", *TWO_ROUNDS),
    ),
    Case(
        name="client level, correlated noise",
        config="simulations/configs/dp-ftrl.toml",
        values=("privacy.randomness=seeded", "rounds=4", "evaluation.every=4", "train.class-prior=none"),
    ),
    Case(
        name="integer", config="simulations/configs/by-class.toml", values=("privacy.arithmetic=integer", *TWO_ROUNDS)
    ),
    Case(
        name="integer, client level",
        config="simulations/configs/client-level.toml",
        values=("privacy.arithmetic=integer", "privacy.randomness=seeded", *TWO_ROUNDS),
    ),
    Case(
        name="trusts-server",
        config="simulations/configs/by-class.toml",
        values=("privacy.record.trusts-server=true", "train.local-steps=1", *TWO_ROUNDS),
    ),
    Case(
        name="patches, isolated",
        config="simulations/configs/fedotp.toml",
        values=("fedotp.patch-reading=isolated", *TWO_ROUNDS),
        renamed=("fedotp.patch-reading=alone", *TWO_ROUNDS),
    ),
    *(_of_method(method) for method in METHODS),
)
