def lora_parameters(out_features, in_features, r):
    return r * (out_features + in_features)


def times_fewer(out_features, in_features, r):
    return out_features * in_features / lora_parameters(out_features, in_features, r)


def model_parameters(layers, r, blocks=12):
    return blocks * sum(lora_parameters(out, within, r) for out, within in layers.values())


def training_bytes(total, trainable):
    return 4 * total + 12 * trainable
