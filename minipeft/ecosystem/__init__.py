"""What minipeft knows by heart of transformers, PEFT and wrappers. It imports none of them."""
