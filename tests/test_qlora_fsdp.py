"""QLoRA with FSDP2: two processes shard a quantized base and take the steps of one.

Run as a program, ``torchrun --nproc_per_node 2 test_qlora_fsdp.py HOW FOLDER``, this file is one of the processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
HOWS = ("bnb float32", "bnb uint8", "nf4")


@pytest.mark.parametrize("how", HOWS)
def test_two_processes_take_the_steps_of_one(how, tmp_path):
    base().save_pretrained(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [__file__, how, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(
        launch, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone, together = (
        torch.tensor([float(word) for word in line.split()[1:]])
        for line in result.stdout.splitlines()
        if line.startswith(("alone", "together"))
    )
    assert len(alone) == 4
    assert len(alone.unique()) == 4
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def model_of(how, folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import minipeft

    kind, _, storage = how.partition(" ")
    if kind == "bnb":
        stored = getattr(torch, storage)
        stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=stored)
        quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=stored)
    else:
        quantized = minipeft.quantize(base(), kind)
    torch.manual_seed(1)
    config = minipeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return minipeft.get_lora_model(quantized, config).train()


def losses(model, rows):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for batch in torch.randint(4, 96, (4, 4, 8), generator=torch.Generator().manual_seed(0)):
        loss = model(input_ids=batch[rows], labels=batch[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def main():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    alone = losses(model_of(*sys.argv[1:]), slice(None))
    model = model_of(*sys.argv[1:])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    together = losses(model, slice(2 * rank, 2 * rank + 2))
    dist.all_reduce(together)
    if rank == 0:
        print("alone", *alone.tolist())
        print("together", *(together / 2).tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
