"""A training run that survives: data in a known order, exact updates on any number of processes, safe checkpoints, LoRA+.

What a library does, it does here: datasets reads, caches and streams rows, pyarrow holds tokens on disk, torch pads,
shards and communicates, transformers makes schedules, accelerate starts processes, recognises a lack of memory and logs,
filelock locks, safetensors writes. Each file below stays for one reason, tried with datasets 5.2, torchdata 0.11, TRL
1.16, torch 2.13, transformers 5.23 and accelerate 1.15.

data:
- ``sources``: datasets guesses the kind of a folder of mixed files and ignores the others; here that is an error.
- ``readers``: datasets names no line of a bad row, and holds an endless line in memory.
- ``rows``: datasets checks types, not which columns make an example, TRL's checks sit inside its trainer, and the words of
  Alpaca's prompts and the speakers of ShareGPT's conversations are in no library.
- ``chat``: transformers' assistant mask is empty without ``{% generation %}``, and wrong if offsets are trimmed.
- ``encoding``: TRL encodes inside its trainer; datasets' hash of a tokenizer depends on the path it was loaded from.
- ``examples``: the fingerprints of datasets are of paths, not of content.
- ``packing``: TRL packs a copy, 1,000 rows at a time, inside its trainer.
- ``apart``: transformers passes position ids on to the mask in most families, and says nothing in the others.
- ``collate``: transformers' collators need a pad token or mask real eos; accelerate repeats examples in uneven shares.
- ``order``: samplers resume from a generator's state; transformers' groups by length put neighbours in sequence.
- ``stream``: datasets loses its shuffle buffer on resuming, and torchdata with it or else reads all rows again.
- ``texts``: datasets splits rows; here a share of the examples is held out, after packing.

distributed:
- ``ranks``: accelerate gathers, but has no error and no signal that stops all processes; transformers' is inside its trainer.
- ``sharding``: accelerate's FSDP2 silently becomes DDP on a CPU.
- ``deepspeed``: what DeepSpeed's configuration may not contradict is known only here.
- ``launch``: with accelerate or torchrun, fewer processes than asked for may train together, and neither says so.
- ``accelerator``: accelerate leaves out a tracker that is not installed, and runs fp16 on a CPU as float32.

runs:
- ``checkpoints``, ``complete``: transformers' and accelerate's latest checkpoint may be half written.
- ``run_state``, ``snapshot``, ``saved_run``: accelerate's is not exact under dropout, unpickles, and compares nothing.
- ``optimizer_state``: torch's ``get_optimizer_state_dict`` steps an empty optimizer, and rounds a float64 state.
- ``plain``: torch and accelerate pickle what JSON cannot express.
- ``rng``: accelerate and transformers pickle the states of generators, and go on if they cannot load them.
- ``lock``: filelock does not say who holds a lock, and falls back to one that outlives a killed run.
- ``output_dir``: transformers' Trainer writes into a directory that holds another run.
- ``metrics``: trackio keeps the rows that an interruption undid; tensorboard rounds to float32 and loses rows if killed.

And:
- ``updates``: accelerate and transformers wait for each other within a pass, so running out of memory hangs the others.
- ``lora_plus``: PEFT has it for PEFT's own layers.
- ``base_model``: transformers makes the weights that a checkpoint lacks, and its errors have many lines.
- ``optimizers``: transformers makes them inside its trainer.
- ``flags``: transformers' HfArgumentParser has no bounds or exclusions, and its YAML files do not convert values.
- ``method_config``: which of a method's options a flag means is known only here.
- ``report``: no library compares the saved adapter with the trained one.
"""
