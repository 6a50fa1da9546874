"""The weights that a quantised model was made from, out of its unquantised twin.

Shape legend
    I in features   O out features
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import WrapError
from molora.quantized import bits_of, dequantised, relative


def originals(
    model: nn.Module, layers: Mapping[str, nn.Module], reader: str
) -> dict[str, Tensor]:
    """Weights [O, I] of the unquantised model for some quantised layers of its twin.

    Args:
        model: The model before quantisation.
        layers: Quantised layers by path.
        reader: Who asks, for messages.

    Raises:
        WrapError: A layer is missing, has another shape, is quantised as well, or
            holds weights that were not what was quantised.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for path, layer in layers.items():
        twin = modules.get(path)
        if not isinstance(twin, nn.Linear | Conv1D) or bits_of(twin) is not None:
            raise WrapError(
                f"{reader}: original has no unquantised linear layer {path!r}; give "
                "the model that was quantised, loaded without quantisation"
            )
        weight = twin.weight.detach()
        weight = weight.t() if isinstance(twin, Conv1D) else weight
        rounded = dequantised(layer)
        same = weight.shape == rounded.shape
        # 4 bits cost about a tenth, weights of another model more than all
        if not same or relative(rounded, weight.to(rounded.device)) > 0.5:
            raise WrapError(
                f"{reader}: original is another model: its layer {path!r} does not "
                "hold the weights that were quantised"
            )
        found[path] = weight
    return found
