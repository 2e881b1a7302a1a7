"""Rendering: the same arguments give the same image, the styles and domains differ, and captions have the words."""

import numpy as np
import pytest

from fl_dualpriv.data.demo.rendering import (
    ATTRIBUTES,
    DOMAINS,
    SIDE,
    Style,
    render_private,
    render_public,
    sample_style,
)


def a_sketch() -> np.ndarray:
    sketch = np.zeros((28, 28), dtype=np.uint8)
    sketch[5:23, 8] = sketch[5, 8:20] = sketch[14, 8:16] = 255
    return sketch


def test_public_images_repeat_for_the_same_generator_state() -> None:
    first, second = (render_public(a_sketch(), sample_style(rng), rng) for rng in map(np.random.default_rng, (3, 3)))
    assert first.shape == (SIDE, SIDE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("domain", DOMAINS)
def test_private_images_repeat_for_the_same_seed_and_change_with_it(domain: str) -> None:
    image = render_private(a_sketch(), domain, 11)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, render_private(a_sketch(), domain, 11))
    assert (image != render_private(a_sketch(), domain, 12)).any()


def test_domains_differ_from_one_another() -> None:
    images = [render_private(a_sketch(), domain, 0) for domain in DOMAINS]
    means = [image.mean(axis=(0, 1)) for image in images]
    for index, mean in enumerate(means):
        assert all(np.abs(mean - other).max() > 5 for other in means[index + 1 :])


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_every_style_value_shows(attribute: str) -> None:
    base = {"ink": "black", "paper": "white", "stroke": "medium", "size": "medium"}
    base |= {"texture": "plain", "finish": "sharp"}
    images = []
    for value in ATTRIBUTES[attribute]:
        if {**base, attribute: value}["ink"] != {**base, attribute: value}["paper"]:
            style = Style({**base, attribute: value})
            images.append(render_public(a_sketch(), style, np.random.default_rng(0)).astype(int))
    for index, image in enumerate(images):
        assert all(np.abs(image - other).max() > 30 for other in images[index + 1 :])


def test_styles_contrast_and_captions_have_many_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        style = sample_style(rng)
        assert style["ink"] != style["paper"]
    words = {word for values in ATTRIBUTES.values() for names in values.values() for word in names}
    assert len(words) >= 40
    assert not words & set(DOMAINS)


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="not in"):
        render_private(a_sketch(), "marble", 0)
