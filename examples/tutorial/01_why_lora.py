"""Why LoRA? Because full fine-tuning pays for every weight four times, and LoRA pays once.

    python examples/tutorial/01_why_lora.py

Three ways to train the embedded GPT-2 on one batch: all weights; LoRA; LoRA with `minipeft.lean`. For each, a ledger of
what memory is for, and next to it the peak that a real training step reached, counted array by array.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from material import ASSETS, blocks, check, figure, options, save, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minipeft
from minipeft import LoraConfig

CONFIG = LoraConfig(r=8, target_modules="all-linear")
ITEMS = ["weights", "adapters", "gradients", "optimizer", "activations", "temporary", "logits"]
WAYS = ["full", "lora", "lean"]


class Peak(TorchDispatchMode):
    """While it is entered, follows every array that torch makes; `most` is the most bytes that were alive at once."""

    def __init__(self, held: int):
        super().__init__()
        self.alive, self.now, self.most = {}, held, held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given | self.alive.keys():
                self.made(tensor.untyped_storage())
        return result

    def made(self, storage):
        key, size = storage._cdata, storage.nbytes()

        def freed(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def prepared(way: str):
    model = tiny_model().train()
    model.config.use_cache = False
    if way != "full":
        minipeft.get_lora_model(model, CONFIG)
    return minipeft.lean(model) if way == "lean" else model


def measured(way: str, ids: torch.Tensor) -> tuple[int, int, int]:
    """Trainable parameters, bytes of the file to keep, and bytes at the peak of the second training step."""
    model, ids = prepared(way), ids.clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one makes the optimizer's averages, which stay
    averages = [value for state in optimizer.state.values() for value in state.values()]
    held = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers(), *averages, ids]}
    with Peak(sum(held.values())) as peak:
        step()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = max(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return sum(parameter.numel() for parameter in trained), size, peak.most


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    batch, length = (4, 64) if args.quick else (8, 128)
    ids = blocks("code-train", length)[:batch]
    ledgers, results = {}, {}
    for way in WAYS:
        memory = minipeft.estimate(ASSETS / "tiny", CONFIG, training=way, batch=batch, length=length).memory
        ledgers[way] = {item: memory.get(item, 0) for item in ITEMS}
        results[way] = measured(way, ids)

    print(f"GPT-2 with 1,088,256 parameters, one step of AdamW on {batch} x {length} tokens; kilobytes of 1,000 bytes")
    print(f"{'':>20}" + "".join(f"{way:>10}" for way in WAYS))
    print(f"{'trained parameters':>20}" + "".join(f"{results[way][0]:>10,}" for way in WAYS))
    print(f"{'their gradients':>20}" + "".join(f"{4 * results[way][0] / 1e3:>10,.0f}" for way in WAYS))
    print(f"{'file to keep':>20}" + "".join(f"{results[way][1] / 1e3:>10,.0f}" for way in WAYS))
    print("memory at the moment when most is in use, the end of the forward pass:")
    for item in ITEMS:
        print(f"{item:>20}" + "".join(f"{ledgers[way][item] / 1e3:>10,.0f}" for way in WAYS))
    print(f"{'sum of the ledger':>20}" + "".join(f"{sum(ledgers[way].values()) / 1e3:>10,.0f}" for way in WAYS))
    print(f"{'measured peak':>20}" + "".join(f"{results[way][2] / 1e3:>10,.0f}" for way in WAYS))

    full, lora = results["full"], results["lora"]
    check(
        "every ledger adds up to the measured peak, to the byte",
        all(sum(ledgers[w].values()) == results[w][2] for w in WAYS),
    )
    check(
        "full fine-tuning keeps two averages of 4 bytes for each weight",
        abs(ledgers["full"]["optimizer"] / (8 * full[0]) - 1) < 0.001,
    )
    check(f"LoRA trains {full[0] / lora[0]:.0f} times fewer parameters", full[0] > 10 * lora[0])
    check(f"its file is {full[1] / lora[1]:.0f} times smaller", full[1] > 10 * lora[1])
    if not args.quick:  # on so small a batch there is little to save
        check(
            "LoRA alone hardly makes activations smaller; lean does",
            ledgers["lora"]["activations"] > 0.8 * ledgers["full"]["activations"] > ledgers["lean"]["activations"],
        )

    drawn, [axes] = figure()
    bottom = [0.0] * len(WAYS)
    for item in (item for item in ITEMS if any(ledgers[way][item] for way in WAYS)):
        heights = [ledgers[way][item] / 1e6 for way in WAYS]
        axes.bar(["full fine-tuning", "LoRA", "LoRA, lean"], heights, bottom=bottom, label=item, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(ylabel="megabytes", title="Where the memory of a training step goes")
    axes.legend(loc="upper right", fontsize="small")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()
