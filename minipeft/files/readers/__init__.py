"""Other programs that read adapters: what each takes, as rules, and adapters made for one of them."""
