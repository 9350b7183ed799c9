"""Files whose tensors go by other names than the model's: the keys translated, and the configuration with them.

A file is read in this order, of which `minipeft.files.load` calls 1 and 2 together, then 3 and 4:

1. `experts`: one LoRA for each expert becomes that of the one parameter that has all experts today.
2. `fitted`: the first of these readings that gives every key a place in the model decides.

   - The file's own names.
   - ``key_mapping``, if the user gives one, and no other reading then.
   - `wrapper_parts`: the names without the prefixes that wrappers, such as DDP, and saves by hand put in front of them.
   - Transformers' tables of the weights that it renamed: for all names, then for those without a place alone.
   - `other_class`: the same modules behind another prefix, as in a class with or without a head, or with another modality;
     of the names by those tables, then of the file's own.

   `modules` then knows the name of each module in the file, and `translated_config` names the modules of the model.
3. `wrapper_parts`: the adapter's name in the keys, as in PEFT's ``state_dict()``, is left out.
4. `experts.layout`: factors of fused experts that older PEFT or Unsloth laid out in another way are turned round.

`to_old` and `experts.split` are the way back, for programs that read the old names.
"""
