"""LoRA of the experts of a mixture, which transformers 5 has in one parameter and transformers 4 had as single layers.

An adapter from transformers 4 has one LoRA for each layer of each expert. Today all experts of a mixture are two parameters,
and a LoRA of such a parameter is one pair for all of them::

    experts.0.gate_proj.lora_A.weight  (r, in)    \\
    experts.0.up_proj.lora_A.weight    (r, in)     |  experts.base_layer.lora_A.weight  (experts * 2r, in)
    experts.0.gate_proj.lora_B.weight  (out, r)    |  experts.base_layer.lora_B.weight  (2 * out, experts * 2r)
    experts.0.up_proj.lora_B.weight    (out, r)   /   of the parameter experts.gate_up_proj
    ...

Reading such a file starts in `fused`:

- `places`: which part of which parameter each old layer is.
- `complete`: whether the file has all the layers that its configuration selects.
- `pair`: the factors of a parameter from those of its old layers.
- `config`: the configuration with these parameters in place of the old layers.

`layout` turns round the pairs that older PEFT and Unsloth laid out in another way. `split` is the way back, to single layers.
"""
