"""The model that ships: its pictures, its vision pretraining, its packing."""
