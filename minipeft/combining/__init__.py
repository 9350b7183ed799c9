"""Several adapters on one model: their life (names, strength, status), and one adapter made of several."""
