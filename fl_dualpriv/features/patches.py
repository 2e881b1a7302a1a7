"""Features of the patches of images; the table that keeps features of whole images keeps these too."""

import PIL.Image
from torch import Tensor

from fl_dualpriv.models.base import Backbone
from fl_dualpriv.models.pruning.in_tower import PatchReading


class PatchEncoder:
    """`ImageEncoder` whose features of an image are those of all its patches, one after the other.

    Args:
        backbone: Model whose image tower reads CLS.
        reading: Way in which a patch is read, see `Backbone.patch_features`.

    Raises:
        ConfigError: If the image tower does not read CLS.
    """

    visual_prompts = False
    mirrors = True

    def __init__(self, backbone: Backbone, reading: PatchReading) -> None:
        self._backbone, self.name, self.device = backbone, backbone.name, backbone.device
        self._reading: PatchReading = reading
        self.shape = backbone.n_patches, backbone.embed_dim
        self.embed_dim = backbone.n_patches * backbone.embed_dim

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Apply the backbone's inference transform; see `ImageEncoder`."""
        return self._backbone.preprocess(image)

    def image_features(self, images: Tensor) -> Tensor:
        """Compute features (n, patches · embed_dim), in which each patch has unit norm; see `ImageEncoder`."""
        return self._backbone.patch_features(images, self._reading).reshape(len(images), self.embed_dim)

    @property
    def feature_key(self) -> str:
        """Key that changes whenever a feature may change; see `ImageEncoder`."""
        return f"{self._backbone.feature_key} patches {self._reading}"

    @property
    def weight_bytes(self) -> int:
        """Memory of the backbone's weights in bytes; see `ImageEncoder`."""
        return self._backbone.weight_bytes
