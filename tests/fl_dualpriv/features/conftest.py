"""The transformers models of the tests of models."""

from tests.fl_dualpriv.models.conftest import hf_clip_dir, hf_siglip_dir, make_hf_clip

__all__ = ["hf_clip_dir", "hf_siglip_dir", "make_hf_clip"]
