"""Examples of different lengths for the tests of updates, in the shape that an `UpdateOrder` reads."""

import numpy as np
from tiny_models import VOCABULARY

from minipeft.training.data.collate import Example


class Rows:
    """Sixteen examples of different lengths, some of them with nothing to predict at the start."""

    pad_id = 0

    def __init__(self):
        generator = np.random.default_rng(0)
        self.lengths = generator.integers(4, 13, 16)
        self.examples = []
        for length in self.lengths:
            ids = generator.integers(1, VOCABULARY, length).astype(np.int32)
            labels = ids.copy()
            labels[: length // 3] = -100
            self.examples.append(Example(ids, labels))
        self.targets = np.array([(example.labels[1:] != -100).sum() for example in self.examples])

    def rows(self, indices):
        return [self.examples[index] for index in indices]
