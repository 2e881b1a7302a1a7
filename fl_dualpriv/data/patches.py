"""The patches of images as features, through the same table as the features of whole images."""

import PIL.Image
from torch import Tensor

from fl_dualpriv.models.base import Backbone
from fl_dualpriv.models.pruning.in_tower import PatchReading


class PatchEncoder:
    """`ImageEncoder` whose features are those of all patches, one after the other.

    Args:
        backbone: A model whose image tower reads CLS.
        reading: Of a patch, see `Backbone.patch_features`.

    Raises:
        ConfigError: If it does not.
    """

    visual_prompts = False

    def __init__(self, backbone: Backbone, reading: PatchReading) -> None:
        self._backbone, self.name, self.device = backbone, backbone.name, backbone.device
        self._reading: PatchReading = reading
        self.shape = backbone.n_patches, backbone.embed_dim
        self.embed_dim = backbone.n_patches * backbone.embed_dim

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """See `ImageEncoder`."""
        return self._backbone.preprocess(image)

    def image_features(self, images: Tensor) -> Tensor:
        """See `ImageEncoder`: (n, patches · embed_dim); each patch has unit norm."""
        return self._backbone.patch_features(images, self._reading).reshape(len(images), self.embed_dim)

    @property
    def feature_key(self) -> str:
        """See `ImageEncoder`."""
        return f"{self._backbone.feature_key} patches {self._reading}"

    @property
    def weight_bytes(self) -> int:
        """See `ImageEncoder`."""
        return self._backbone.weight_bytes
