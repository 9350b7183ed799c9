"""Exercise 06: draw and read the loss curve.

Fill the gaps, look at the pictures of the four runs (python 06_curve.py), and answer. Then: minipeft learn check 06
"""

from matplotlib.figure import Figure  # figure.subplots() makes an Axes, figure.savefig(path) writes a PNG

STEPS = [100, 200, 300, 400, 500, 600, 700, 800]
RUNS = {  # the loss on the training text and on another text, after each of STEPS
    "a": {
        "training": [3.10, 2.71, 2.42, 2.18, 1.95, 1.74, 1.55, 1.38],
        "evaluation": [3.15, 2.84, 2.66, 2.58, 2.61, 2.70, 2.83, 2.99],
    },
    "b": {
        "training": [3.95, 3.93, 3.92, 3.90, 3.89, 3.87, 3.86, 3.85],
        "evaluation": [3.97, 3.95, 3.94, 3.93, 3.91, 3.90, 3.89, 3.88],
    },
    "c": {
        "training": [3.05, 2.74, 2.61, 2.55, 2.51, 2.49, 2.48, 2.47],
        "evaluation": [3.12, 2.82, 2.70, 2.65, 2.62, 2.60, 2.59, 2.59],
    },
    "d": {
        "training": [2.98, 2.80, 3.65, 5.20, 7.10, 8.40, 8.90, 9.20],
        "evaluation": [3.06, 2.91, 3.80, 5.31, 7.20, 8.52, 8.95, 9.31],
    },
}

overfits = None  # which run learns its training text by heart? "a", "b", "c" or "d"
learning_rate_too_low = None  # which one?
learning_rate_too_high = None  # which one?
healthy = None  # which one would you leave as it is?
keep_step = None  # run "a": the model of which step would you keep?


def smooth(losses, window):
    """At each place the mean of the last `window` losses up to there; near the beginning, of as many as there are."""
    raise NotImplementedError


def draw(steps, training, evaluation, path):
    """Write a PNG with both curves, both axes labelled and a legend. Returns the Axes."""
    raise NotImplementedError


if __name__ == "__main__":
    for name, run in RUNS.items():
        draw(STEPS, run["training"], run["evaluation"], f"run_{name}.png")
