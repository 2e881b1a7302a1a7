"""The key ``prompt.candidates``: public templates from which a start is made or chosen. Standard library only.

The key is a string, because a Flower run config holds only scalars.
"""

import re
from pathlib import Path

from fl_dualpriv.errors import ConfigError

CANDIDATES_KEY = "prompt.candidates"

PUBLISHED_SETS = ("clip-imagenet-80", "clip-imagenet-7")
"""Names of the template sets that OpenAI published with CLIP and that open_clip ships, see `published_templates`."""

MOST_CANDIDATES = 1000


def split_candidates(value: str) -> tuple[str, ...]:
    """Split a list of templates at new lines and at bars with a space on both sides; empty ones are dropped."""
    return tuple(text.strip() for text in re.split(r"\n| \| ", value) if text.strip())


def are_candidates(value: str) -> bool:
    """Return True if a value is empty, names a published set or a file, or is a list of different templates."""
    if value.strip() in ("", *PUBLISHED_SETS) or Path(value).is_absolute():
        return True
    return _are_templates(split_candidates(value))


def read_candidates(value: str) -> tuple[str, ...] | None:
    """Return the templates of a list or of a file; None for a published set, whose templates open_clip holds.

    Raises:
        ConfigError: If the file cannot be read, or does not hold different templates, one a line.
    """
    if value.strip() in PUBLISHED_SETS:
        return None
    if not Path(value).is_absolute():
        return split_candidates(value)
    try:
        templates = split_candidates(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{CANDIDATES_KEY} = {value!r}: the file cannot be read ({reason}); give templates") from None
    if not _are_templates(templates):
        raise ConfigError(
            f"{CANDIDATES_KEY} = {value!r}: each line must be a different template with one {{}} for the class name, "
            f"at most {MOST_CANDIDATES} of them"
        )
    return templates


def _are_templates(templates: tuple[str, ...]) -> bool:
    return (
        0 < len(templates) <= MOST_CANDIDATES
        and len(set(templates)) == len(templates)
        and all(text.count("{}") == 1 and not set("{}") & set(text.replace("{}", "")) for text in templates)
    )
