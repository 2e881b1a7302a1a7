import pytest
import torch

from fl_dualpriv.backbones.open_clip import load_backbone, open_clip
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.pruning.visual_tokens import ClsAttentionPruner, check_prunable, cls_attention, encode_pruned


@pytest.fixture(scope="module")
def visual(tiny_clip_dir):
    return open_clip.create_model(f"local-dir:{tiny_clip_dir}", require_pretrained=True).eval().visual


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("ratio", "patches", "kept"),
    # ceil(ratio * patches); 0.07 * 100 is 7.000000000000001 and 0.3 * 10 is 3.0000000000000004 in some orders.
    [(1.0, 16, 16), (0.5, 16, 8), (0.51, 16, 9), (0.07, 100, 7), (0.3, 10, 3), (1e-6, 16, 1), (0.99, 16, 16)],
)
def test_number_of_kept_patches(ratio: float, patches: int, kept: int):
    assert ClsAttentionPruner(keep_ratio=ratio, layer=1).n_kept(patches) == kept


def test_keeps_the_most_attended_in_order_and_fuses_the_rest():
    # dim 1 tokens: CLS 9, patches 10, 20, 30, 40. Attention keeps patches 1 and 3 (of 0-3).
    # Dropped: 10 with weight .1/(.1+.3) = 1/4 and 30 with 3/4 → 25.
    tokens = torch.tensor([[[9.0], [10.0], [20.0], [30.0], [40.0]]])
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.5]])
    pruned = ClsAttentionPruner(keep_ratio=0.5, layer=1)(tokens, attention)
    torch.testing.assert_close(pruned, torch.tensor([[[9.0], [20.0], [40.0], [25.0]]]))


def test_equal_attention_keeps_the_earlier_patch_and_underflow_gives_the_plain_mean():
    tokens = torch.tensor([[[9.0], [1.0], [2.0], [4.0], [8.0]]])
    pruned = ClsAttentionPruner(keep_ratio=0.5, layer=1)(tokens, torch.zeros(1, 4))
    assert pruned.flatten().tolist() == [9.0, 1.0, 2.0, 6.0]  # (4 + 8) / 2


def test_cls_attention_is_the_blocks_own(visual):
    block = visual.transformer.resblocks[1]
    tokens = visual.transformer.resblocks[0](visual._embeds(images()))
    x = block.ln_1(tokens)
    expected = block.attn(x, x, x, need_weights=True, average_attn_weights=True)[1][:, 0, 1:]
    # Same sums in another order: float32 rounding of values below 1.
    torch.testing.assert_close(cls_attention(block, tokens), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.99], ids=["one", "rounds up to all"])
@torch.no_grad()
def test_keeping_everything_is_exactly_the_plain_tower(visual, ratio: float):
    pruned = encode_pruned(visual, images(), ClsAttentionPruner(keep_ratio=ratio, layer=1))
    assert torch.equal(pruned, visual(images()))


@torch.no_grad()
def test_fusing_a_single_patch_only_reorders_tokens(visual):
    # ceil(15/16 * 16) = 15 stay and the "fused" token is the sixteenth itself. Attention does not see the order of its
    # tokens, so the features are those of the plain tower up to rounding.
    pruned = encode_pruned(visual, images(), ClsAttentionPruner(keep_ratio=15 / 16, layer=1))
    torch.testing.assert_close(pruned, visual(images()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_pruning_by_hand(visual):
    pruner, blocks = ClsAttentionPruner(keep_ratio=0.25, layer=2), visual.transformer.resblocks
    seen = []
    handle = blocks[2].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    actual = encode_pruned(visual, images(), pruner)
    handle.remove()
    assert seen == [1 + 4 + 1]  # CLS, ceil(16 / 4) patches, the fused one
    before = blocks[0](visual._embeds(images()))
    after = pruner(blocks[1](before), cls_attention(blocks[1], before))
    expected = visual.ln_post(blocks[2](after)[:, 0]) @ visual.proj
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - visual(images())).abs().max() > 1e-3  # it does something


def test_the_choice_carries_no_gradient_but_the_tokens_do(visual):
    x = images(1).requires_grad_()
    encode_pruned(visual, x, ClsAttentionPruner(keep_ratio=0.5, layer=1)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not cls_attention(visual.transformer.resblocks[0], visual._embeds(x)).requires_grad


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_keep_ratio_out_of_range(ratio: float):
    with pytest.raises(ConfigError, match=r"visual-keep-ratio = .*in \(0, 1\]"):
        ClsAttentionPruner(keep_ratio=ratio, layer=1)


def test_layer_out_of_range(visual):
    with pytest.raises(ConfigError, match="visual-layer = 0: must be at least 1"):
        ClsAttentionPruner(keep_ratio=0.5, layer=0)
    check_prunable(visual, ClsAttentionPruner(keep_ratio=0.5, layer=2))
    with pytest.raises(ConfigError, match=r"visual-layer = 3: this image tower has 3 blocks.*choose 1 to 2"):
        encode_pruned(visual, images(), ClsAttentionPruner(keep_ratio=0.5, layer=3))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        pytest.param({"layers": [1, 1, 1, 1], "width": 8}, "ModifiedResNet", id="resnet"),
        pytest.param({"qk_norm": True}, "custom attention blocks", id="custom block"),
        pytest.param({"pool_type": "avg"}, "pools otherwise", id="average pooling"),
        pytest.param({"attentional_pool": True, "attn_pooler_heads": 2}, "pools otherwise", id="attention pooling"),
    ],
)
def test_other_image_towers_are_refused_only_if_pruning_is_on(make_clip_dir, vision: dict, message: str):
    name = f"local-dir:{make_clip_dir({'vision_cfg': vision})}"
    assert load_backbone(name, "", "cpu", 1.0, 99).image_features(images()).shape[0] == 3
    with pytest.raises(ConfigError, match=rf"{message}.*visual-keep-ratio = 1"):
        load_backbone(name, "", "cpu", 0.5, 1)
