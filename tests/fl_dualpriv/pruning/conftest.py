"""Models of transformers in folders, for `load_backbone`."""

from tests.fl_dualpriv.backbones.conftest import hf_clip_dir, hf_siglip_dir, make_hf_clip

__all__ = ["hf_clip_dir", "hf_siglip_dir", "make_hf_clip"]
