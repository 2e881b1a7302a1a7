"""From templates to contexts of one length: filling, suffixes, published sets, and starts of runs."""

import logging
from pathlib import Path

import pytest
import torch

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import load_backbone, published_templates
from fl_dualpriv.tasks import candidates
from fl_dualpriv.tasks.candidates import ensemble_features, fitting_candidates

NAMES = ("cat", "red fire truck", "dog")


@pytest.fixture(scope="module")
def text(tiny_clip_dir: Path) -> PromptedText:
    return PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", None, "fp32"), NAMES, "a photo of a {}")


def test_a_short_context_repeats_its_first_token_in_front(text: PromptedText) -> None:
    contexts = fitting_candidates(text, "a photo of a {} | art {}.", 6).contexts
    words = text.template_context(4)
    assert contexts.shape == (2, 6, 32)
    torch.testing.assert_close(contexts[0], torch.cat([words[:1], words[:1], words]))
    assert (contexts[1] == contexts[1][0]).all()
    torch.testing.assert_close(text.template_context(6, filled=True), contexts[0])
    with pytest.raises(ConfigError, match="the template has 4 tokens"):
        text.template_context(6)
    with pytest.raises(ConfigError, match="the template has 4 tokens"):
        text.template_context(3, filled=True)


def test_a_context_of_full_length_gives_the_features_of_its_own_template(text: PromptedText) -> None:
    (context,) = fitting_candidates(text, "a drawing of a {}", 4).contexts
    own = PromptedText(text._backbone, NAMES, "a drawing of a {}")
    torch.testing.assert_close(text.class_features(context), own.zero_shot_features(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a photo of a {} | a photo of one big red {}", r"6 tokens\); set prompt\.n-ctx = 6"),
        ("a {} in a game | a {}", "'in a game' after the class name, and the run's template has ''"),
        ("{}", "no word before the class name"),
        ("a {} | a {}.", "is there twice, but for a full stop"),
    ],
)
def test_a_candidate_that_does_not_fit_is_named(text: PromptedText, given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fitting_candidates(text, given, 4)


def test_published_sets_are_open_clips(text: PromptedText, caplog: pytest.LogCaptureFixture) -> None:
    assert len(published_templates("clip-imagenet-80")) == 80
    assert len(published_templates("clip-imagenet-7")) == 7
    assert "itap of a {}." in published_templates("clip-imagenet-7")
    candidates._say_left_out.cache_clear()
    with caplog.at_level(logging.WARNING, "fl_dualpriv"):
        contexts = fitting_candidates(text, "clip-imagenet-7", 6).contexts
    assert len(contexts) == 6  # "a {} in a video game." has text after the class name
    assert "6 of 7 templates are candidates; 1 are left out" in caplog.text
    with pytest.raises(ConfigError, match=r"set prompt\.n-ctx = 5"):
        fitting_candidates(text, "clip-imagenet-7", 4)


def test_a_published_set_none_of_which_fits_is_refused(text: PromptedText) -> None:
    other = PromptedText(text._backbone, NAMES, "a photo of a {}, up close")
    with pytest.raises(ConfigError, match="none of its 7 templates fits"):
        fitting_candidates(other, "clip-imagenet-7", 6)


def test_the_ensemble_is_the_normalised_mean_of_features(text: PromptedText) -> None:
    contexts = fitting_candidates(text, "a photo of a {} | a drawing of a {} | art of the {}", 4).contexts
    rows = torch.stack([text.class_features(context) for context in contexts])
    by_hand = rows.mean(dim=0)
    by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ensemble_features(torch.stack([text.class_features(c) for c in contexts])), by_hand)
    torch.testing.assert_close(ensemble_features(text.class_features(contexts[0])[None]), rows[0])
