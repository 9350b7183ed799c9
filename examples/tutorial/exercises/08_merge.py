"""Exercise 08: merge.

After training, the update can be added to the weight: the merged layer costs nothing extra. Then: minipeft learn check 08
"""

import torch
from transformers.pytorch_utils import Conv1D  # its weight is (in, out), nn.Linear's is (out, in)


def merge(layer, lora_A, lora_B, scaling):
    """Add s B A to the weight of `layer`, an nn.Linear or a Conv1D, in place.

    The weight keeps its dtype. In half precision, compute the sum in float32 and round it once. Returns whatever `unmerge`
    needs.
    """
    raise NotImplementedError


def unmerge(layer, kept):
    """Bring the weight back as it was before, bit for bit; `kept` is what `merge` returned."""
    raise NotImplementedError
