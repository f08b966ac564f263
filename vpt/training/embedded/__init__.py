"""How the embedded model comes to be: its shape, and its first stage of training."""
