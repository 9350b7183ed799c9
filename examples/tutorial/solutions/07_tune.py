import math


def keep_scaling(r, lora_alpha, new_r):
    return lora_alpha / r * new_r


def tune(run, ranks, alphas, seeds):
    means = {}
    for r in ranks:
        for alpha in alphas:
            losses = [run(r, alpha, seed)["evaluation"] for seed in seeds]
            mean = sum(losses) / len(losses)
            if math.isfinite(mean):
                means[r, alpha] = mean
    best = min(means.values())
    good = [setting for setting in means if means[setting] <= 1.01 * best]
    return min(good, key=lambda setting: (setting[0], means[setting]))
