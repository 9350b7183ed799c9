import torch

import minipeft


def prepare(model):
    return minipeft.get_lora_model(model, minipeft.LoraConfig(r=8, target_modules=["c_attn"]))


def make_optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train(model, optimizer, batches):
    model.train()
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
