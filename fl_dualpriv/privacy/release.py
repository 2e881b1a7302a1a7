"""The only function that adds noise to a `ClippedSum`; `server.strategy` noises float results of `combine` itself."""

from torch import Tensor

from fl_dualpriv.privacy.clipping import ClippedSum
from fl_dualpriv.privacy.integer import rounded_gaussian
from fl_dualpriv.privacy.noise import RandomSource, gaussian_noise


def release(clean: ClippedSum, noise_multiplier: float, source: RandomSource) -> Tensor:
    """Return the clipped sum plus Gaussian noise of std ``noise_multiplier`` × its sensitivity, in real units, float64.

    Guarantee:
        This is the Gaussian mechanism with that multiplier for one added or removed row, for any rows in the sum and
        for an empty sum. Floats: as `gaussian_noise`, up to its floating-point position. Integers: sum and noise are
        integers in float64 and are added exactly (each is below 2**52). So the total is round(S + N) of the real-valued
        mechanism, and its support is the same for all data. The product of that integer and the grid is a function of
        the integer: post-processing.

    Args:
        clean: Clipped sum of fewer than MOST_ROWS rows.
        noise_multiplier: z >= 0.
        source: Random source of the noise; nothing else uses it.

    Raises:
        ValueError: If the std of the noise is negative, not finite or, in integers, above 2**46 grid units.
    """
    std, shape = noise_multiplier * clean.sensitivity, tuple(clean.value.shape)
    if clean.grid is None:
        return clean.value + gaussian_noise(source, shape, std).to(clean.value.device)
    return (clean.value + rounded_gaussian(source, shape, std).to(clean.value.device)) * clean.grid
