from matplotlib.figure import Figure

overfits = "a"
learning_rate_too_low = "b"
learning_rate_too_high = "d"
healthy = "c"
keep_step = 400


def smooth(losses, window):
    return [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]


def draw(steps, training, evaluation, path):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(steps, training, label="training")
    axes.plot(steps, evaluation, label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path)
    return axes
